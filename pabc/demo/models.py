"""Names the demo's trained models, and loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from pabc.demo import latte, sd3
from pabc.demo.model import Model

MODELS: Mapping[str, Callable[..., Model]] = MappingProxyType(
    {latte.Digits.name: latte.load, sd3.Emoji.name: sd3.load}
)
"""The function that loads each model, by the model's name."""


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Model:
    """Returns a trained model in eval mode, from the folder `weights` or from the package.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    return MODELS[name](weights, device)
