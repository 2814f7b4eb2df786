"""flops: floating-point operations of one call of an op."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pabc.internals.fakes import detect_fake_mode, unset_fake_temporarily


def count_op_flops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns the FLOPs of `op` by PyTorch's own formulas; tensors among its arguments are fake."""
    with unset_fake_temporarily():
        mode = detect_fake_mode((args, kwargs))
    assert mode is not None
    with mode, FlopCounterMode(display=False) as counter:
        op(*args, **kwargs)
    return counter.get_total_flops()


def count_attention_flops(query: torch.Tensor, *, keys: int, features: int, width: int) -> int:
    """Returns the FLOPs of both products of an attention, `query @ key^T` and `scores @ value`.

    `keys` is the number of keys that each query is compared with, `features` the size of the
    dimension that the scores sum over, `width` the features of a value.
    """
    products = 2 * query.numel() * keys
    return products + 2 * query.numel() // features * (keys * width)
