"""Axis rules of ops that slide, pool, resize, pad, or fold patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node

from ..ir import Dims, Factor, aten, value
from .factors import anonymous, blur, is_join, join, learned, length, narrow, regroup
from .operands import Rule, lost

Product = tuple[Factor, ...]


def _conv(node: Node, operands: list[Dims]) -> Dims:
    """Strided windows keep the axis of the dimension they slide over."""
    dims, shape = operands[0], tuple(value(node).shape)
    first = len(dims) - len(operands[1]) + 2  # a batch may be missing
    slid = tuple(map(_resized(node), dims[first:], shape[first:]))
    return (*dims[: first - 1], anonymous(shape[first - 1]), *slid)


def _transposed_conv(node: Node, operands: list[Dims]) -> Dims:
    """Each position spreads over a window: the axis is kept, an inner factor added."""
    dims, shape = operands[0], tuple(value(node).shape)
    return (dims[0], anonymous(shape[1]), *map(_spread(node), dims[2:], shape[2:]))


def _spread(node: Node) -> Callable[[Product, int], Product]:
    def spread(product: Product, size: int) -> Product:
        times, rest = divmod(size, length(product))
        return blur(product, size, lost(node)) if rest else product + anonymous(times)

    return spread


def _resized(node: Node) -> Callable[[Product, int], Product]:
    def resize(product: Product, size: int) -> Product:
        return product if length(product) == size else blur(product, size, lost(node))

    return resize


def _windowed(node: Node, operands: list[Dims]) -> Dims:
    """Pooling and resizing keep each dimension's axis."""
    return tuple(map(_resized(node), operands[0], tuple(value(node).shape)))


def _padded(node: Node, operands: list[Dims]) -> Dims:
    """What pads tokens of several axes is a part of its own; of one axis, it goes along with it."""
    result = list(operands[0])
    shape = value(node).shape
    if len(node.args) > 2 and isinstance(node.args[2], str) and node.args[2] != "constant":
        return _windowed(node, operands)
    widths: Sequence[int] = node.args[1]
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        product = result[-i]
        if len(product) == 1 and not is_join(product[0]):
            result[-i] = _resized(node)(product, shape[-i])
            continue
        size = length(product)
        product = narrow(product, max(-before, 0), size - max(-after, 0), lost(node))
        ends = [learned((n,))[0] if n > 0 else () for n in (before, after)]
        parts = [part for part in (ends[0], product, ends[1]) if part]
        result[-i] = join(parts) if len(parts) > 1 else product
    return tuple(result)


def _divide(product: Product, sizes: Sequence[int], node: Node) -> Dims:
    """One dimension viewed as several."""
    return regroup((product,), sizes, lost(node))


def _slide(product: Product, count: int, size: int, step: int, node: Node) -> tuple[Product, ...]:
    """`count` windows of `size` positions: which window, and which position in it.

    Windows that lie side by side are a view; all others draw on the same axis twice.
    """
    if size == step and count * size == length(product):
        outer, inner = _divide(product, (count, size), node)
        return outer, inner
    return blur(product, count, lost(node)), blur(product, size, lost(node))


def _unfold(node: Node, operands: list[Dims]) -> Dims:
    dims = operands[0]
    d, size, step = int(node.args[1]) % len(dims), int(node.args[2]), int(node.args[3])
    outer, inner = _slide(dims[d], value(node).shape[d], size, step, node)
    return (*dims[:d], outer, *dims[d + 1 :], inner)


def _im2col(node: Node, operands: list[Dims]) -> Dims:
    """(C, H, W) to (C * window, windows), rows of windows first."""
    *batch, channels, rows, columns = operands[0]
    kernel, dilation, padding, stride = node.args[1:5]
    counts = [
        (length(product) + 2 * pad - space * (size - 1) - 1) // step + 1
        for product, size, space, pad, step in zip(
            (rows, columns), kernel, dilation, padding, stride, strict=True
        )
    ]
    (row, in_row), (column, in_column) = (
        _slide(product, count, size, step, node)
        for product, count, size, step in zip((rows, columns), counts, kernel, stride, strict=True)
    )
    return (*batch, channels + in_row + in_column, row + column)


def _col2im(node: Node, operands: list[Dims]) -> Dims:
    """(C * window, windows) to (C, H, W)."""
    *batch, inside, windows = operands[0]
    (height, width), kernel, dilation, padding, stride = node.args[1:6]
    counts = [
        (size + 2 * pad - space * (k - 1) - 1) // step + 1
        for size, k, space, pad, step in zip(
            (height, width), kernel, dilation, padding, stride, strict=True
        )
    ]
    row, column = _divide(windows, counts, node)
    channels, in_row, in_column = _divide(inside, (value(node).shape[-3], *kernel), node)
    if (counts[0] * kernel[0], counts[1] * kernel[1]) == (height, width):
        return (*batch, channels, row + in_row, column + in_column)
    return (*batch, channels, blur(row, height, lost(node)), blur(column, width, lost(node)))


def _pixel_unshuffle(node: Node, operands: list[Dims]) -> Dims:
    *batch, channels, rows, columns = operands[0]
    factor = int(node.args[1])
    *_, height, width = value(node).shape
    row, in_row = _divide(rows, (height, factor), node)
    column, in_column = _divide(columns, (width, factor), node)
    return (*batch, channels + in_row + in_column, row, column)


def _pixel_shuffle(node: Node, operands: list[Dims]) -> Dims:
    *batch, inside, rows, columns = operands[0]
    factor = int(node.args[1])
    channels, in_row, in_column = _divide(inside, (value(node).shape[-3], factor, factor), node)
    return (*batch, channels, rows + in_row, columns + in_column)


WINDOW_RULES: dict[object, Rule] = {
    aten.convolution.default: _conv,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv_transpose1d.default: _transposed_conv,
    aten.conv_transpose2d.input: _transposed_conv,
    aten.conv_transpose3d.input: _transposed_conv,
    aten.constant_pad_nd.default: _padded,
    aten.pad.default: _padded,
    aten.unfold.default: _unfold,
    aten.im2col.default: _im2col,
    aten.col2im.default: _col2im,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.pixel_shuffle.default: _pixel_shuffle,
    **dict.fromkeys(
        (
            aten.avg_pool1d.default,
            aten.avg_pool2d.default,
            aten.avg_pool3d.default,
            aten.max_pool2d.default,
            aten.adaptive_avg_pool1d.default,
            aten.adaptive_avg_pool2d.default,
            aten.adaptive_avg_pool3d.default,
            aten.glu.default,
            aten.upsample_nearest1d.vec,
            aten.upsample_nearest2d.vec,
            aten.upsample_nearest3d.vec,
            aten._upsample_nearest_exact2d.vec,
            aten.upsample_linear1d.vec,
            aten.upsample_bilinear2d.vec,
            aten.upsample_trilinear3d.vec,
            aten.upsample_bicubic2d.vec,
        ),
        _windowed,
    ),
}
