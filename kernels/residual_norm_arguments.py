"""What `residual_norm` takes: see there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import check
from .rows import is_split

MAX_CHANNELS = 16384
MAX_TERMS = 3
NORMS = ("none", "layer", "rms")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def need(argument: str, expected: str, found: object, is_right: bool) -> None:
    """Raises ValueError where an argument is not as it needs to be."""
    check("residual_norm", argument, expected, found, is_right)


def check_operands(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Of what is read: dtypes, devices, shapes."""
    need("x", "a dimension or more", x.dim(), x.dim() > 0)
    C = x.shape[-1]
    need("x", f"one of {FLOATS}", x.dtype, x.dtype in FLOATS)
    need("x", f"up to {MAX_CHANNELS} channels", C, C <= MAX_CHANNELS)
    need("norm", f"one of {NORMS}", norm, norm in NORMS)
    _check_terms(x, cuts, cut_scales, gates, factors)
    for name, of_C in (("weight", weight), ("bias", bias)):
        if of_C is not None:
            need(name, f"({C},)", tuple(of_C.shape), of_C.shape == (C,))
    others = {"cut_scales": cut_scales, "gates": gates, "scale": [scale], "shift": [shift]}
    others |= {"weight": [weight], "bias": [bias]}
    for name, tensors in others.items():
        for tensor in tensors:
            if tensor is not None:
                need(name, f"one of {FLOATS}", tensor.dtype, tensor.dtype in FLOATS)
                _need_like(name, tensor, x)


def _check_terms(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
) -> None:
    nums = {"cut_scales": len(cut_scales), "gates": len(gates), "factors": len(factors)}
    need("cuts", f"at most {MAX_TERMS}", len(cuts), len(cuts) <= MAX_TERMS)
    for name, num in nums.items():
        need(name, f"one for each cut, {len(cuts)}", num, num == len(cuts))
    for cut, cut_scale in zip(cuts, cut_scales, strict=True):
        need("cuts", f"one of {(*FLOATS, FP8)}", cut.dtype, cut.dtype in (*FLOATS, FP8))
        is_scaled = cut_scale is not None
        need(
            "cut_scales",
            "given for fp8, and only there",
            is_scaled,
            is_scaled == (cut.dtype == FP8),
        )
        _need_like("cuts", cut, x)
        if cut_scale is not None:
            need("cut_scales", "(..., 1)", tuple(cut_scale.shape), cut_scale.shape[-1:] == (1,))


def check_orders(
    x: Tensor, split: Sequence[int], y_order: Sequence[int], n_order: Sequence[int]
) -> None:
    """Of the shape and the order of results."""
    is_right = not split or is_split(split, x.shape)
    need("split", f"{tuple(x.shape)} with dimensions of rows split", tuple(split), is_right)
    dims = list(range(len(split)))
    for name, order in (("y_order", y_order), ("n_order", n_order)):
        is_right = not order or (sorted(order) == dims and order[-1] == dims[-1])
        need(name, f"an order of {dims} that ends in the last", list(order), is_right)


def _need_like(name: str, tensor: Tensor, x: Tensor) -> None:
    need(name, f"on {x.device}", tensor.device, tensor.device == x.device)
    sizes = (*([1] * (x.dim() - tensor.dim())), *tensor.shape)
    fits = len(sizes) == x.dim() and all(a in (1, b) for a, b in zip(sizes, x.shape, strict=True))
    need(name, f"broadcast to {tuple(x.shape)}", tuple(tensor.shape), fits)
