"""Matches the encoding of cuts as fp8, which :mod:`pabc.kernels.encode_rows` computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from pabc.kernels.dtypes import FLOATS, FP8, FP8_MAX, OVER_FP8_MAX, TINY

from ..ir import GETITEM, aten, is_call, is_tensor, value
from .match import Match, first_reason, insert, replace
from .rms import without_casts


def match_encode_rows(node: Node) -> Match | None:
    """Matches rows divided by their scales, as :func:`pabc.passes.encode.encode` writes them.

    # before                                              # after
    %s = clamp_min(mul(amax(abs(%x), -1), 1/448), TINY)
    %v = _to_copy(clamp(div(%x, %s), -448, 448), e4m3)    %v, %s = pabc.encode_rows(%x)
    """
    encoding = _find_encoding(node)
    if encoding is None:
        return None
    x = value(encoding.x)
    shape = (x.numel() // x.shape[-1], x.shape[-1], x.element_size() + FP8.itemsize)
    return Match("encode_rows", shape, _why_not(encoding), partial(_rewrite, encoding))


@dataclass(frozen=True, slots=True)
class _Encoding:
    """An encoding of `x`: the nodes of its values, its scales, and the quotient that reads both."""

    x: Node
    values: Node
    scales: Node
    quotient: Node


def _why_not(encoding: _Encoding) -> str | None:
    from pabc.kernels.rows import MAX_CHANNELS, MAX_ROW_DIMS, merge_rows

    x = value(encoding.x)
    rows, _ = merge_rows(x.shape, [x, value(encoding.values)])
    return first_reason(
        {
            f"{x.dtype}": x.dtype not in FLOATS,
            f"{x.shape[-1]} channels: at most {MAX_CHANNELS}": x.shape[-1] > MAX_CHANNELS,
            f"{len(rows)} dimensions of rows: at most {MAX_ROW_DIMS}": len(rows) > MAX_ROW_DIMS,
            "scales that are read before the values": any(
                user is not encoding.quotient and user < encoding.values
                for user in encoding.scales.users
            ),
        }
    )


def _rewrite(encoding: _Encoding) -> None:
    from pabc.kernels.encode_rows import OP

    both = insert(encoding.values, OP, encoding.x)
    values, scales = (insert(encoding.values, GETITEM, both, i) for i in range(2))
    replace(encoding.scales, scales, unless=encoding.quotient)
    replace(encoding.values, values)


def _find_encoding(node: Node) -> _Encoding | None:
    if not is_call(node, (aten._to_copy.default,)) or node.kwargs.get("dtype") != FP8:
        return None
    clamp = _call(node.args[0], aten.clamp.default, -FP8_MAX, FP8_MAX)
    quotient = clamp and _call(clamp.args[0], aten.div.Tensor)
    if quotient is None or quotient.kwargs:
        return None
    x, scales = quotient.args
    least = _call(scales, aten.clamp_min.default, TINY)
    over = least and _call(least.args[0], aten.mul.Tensor, OVER_FP8_MAX)
    largest = over and _call(over.args[0], aten.amax.default, [-1], True)
    magnitude = largest and _call(largest.args[0], aten.abs.default)
    if magnitude is None or magnitude.args[0] is not x or not is_tensor(x):
        return None
    assert isinstance(x, Node) and isinstance(scales, Node)
    if value(x).dtype != torch.float32:
        return None
    return _Encoding(without_casts(x), node, scales, quotient)


def _call(node: Any, target: Any, *others: Any) -> Node | None:
    """Returns `node` if it is a call of `target` with these arguments after the first."""
    if not is_call(node, (target,)) or (others and tuple(node.args[1:]) != others):
        return None
    assert isinstance(node, Node)
    return node
