"""What an entry of the zoo is, and the sizes that all of them have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, T, H, W, L, C = 2, 3, 6, 8, 5, 4


@dataclass(frozen=True)
class Entry:
    """A model, one call of it, and the kind of each attention module by name pattern.

    `shared`: pattern of attention modules that also hold an MLP, both in one output projection.
    """

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    kinds: Mapping[str, str]
    shared: str = ""

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode, nothing in it zero, and the keyword arguments of a call."""
        torch.manual_seed(0)
        model, call = self.make()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model.eval(), {"return_dict": False, **call}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def steps(dtype: torch.dtype = torch.long) -> Tensor:
    return torch.full((B,), 3, dtype=dtype)


SELF_AND_CROSS = {"*.attn1": "full", "*.attn2": "cross"}
