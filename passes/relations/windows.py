"""Relations of ops that slide over positions, pool, resize, pad, or fold patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.fx import Node

from ..ir import value
from .terms import (
    Across,
    Merge,
    Mix,
    New,
    Pad,
    Relation,
    Source,
    Term,
    keep,
    keep_all,
    regroup,
    sources_of,
)


def relate_convolution(node: Node) -> Relation:
    """convolution, conv1d to conv3d: windows slide within each sample."""
    dims, shape = sources_of(node.args[0]), value(node).shape
    first = len(dims) - value(node.args[1]).ndim + 2  # a batch may be missing
    slid = [Across(n, (s,)) for n, s in zip(shape[first:], dims[first:], strict=True)]
    return Relation((*map(keep, dims[: first - 1]), New(shape[first - 1]), *slid))


def relate_transposed_convolution(node: Node) -> Relation:
    """conv_transpose1d to conv_transpose3d: each position spreads over a window."""
    batch, _, *dims = sources_of(node.args[0])
    shape = value(node).shape
    spread = [_spread(n, source) for n, source in zip(shape[2:], dims, strict=True)]
    return Relation((keep(batch), New(shape[1]), *spread))


def _spread(size: int, source: Source) -> Term:
    times, rest = divmod(size, source.size)
    if rest:
        return Across(size, (source,))
    return Merge((Across(source.size, (source,)), New(times)))


def relate_pooling(node: Node, num_dims: int = 1) -> Relation:
    """Pooling and resizing of the last dimensions."""
    shape, dims = value(node).shape, sources_of(node.args[0])
    first = len(dims) - num_dims
    slid = [Across(n, (s,)) for n, s in zip(shape[first:], dims[first:], strict=True)]
    return Relation((*map(keep, dims[:first]), *slid))


relate_pooling_2d = partial(relate_pooling, num_dims=2)
relate_pooling_3d = partial(relate_pooling, num_dims=3)


def relate_glu(node: Node) -> Relation:
    """glu(x, dim): one half of a dimension times a function of the other."""
    shape = value(node).shape
    dim = (int(node.args[1]) if len(node.args) > 1 else -1) % len(shape)
    terms: list[Term] = list(keep_all(node.args[0]))
    terms[dim] = Across(shape[dim], (Source(node.args[0], dim),))
    return Relation(tuple(terms))


def relate_padding(node: Node) -> Relation:
    """pad, constant_pad_nd(x, widths): from the last dimension on, two widths for each."""
    terms: list[Term] = list(keep_all(node.args[0]))
    shape, widths = value(node).shape, node.args[1]
    assert isinstance(widths, Sequence)
    mode = node.args[2] if len(node.args) > 2 else "constant"
    is_constant = not isinstance(mode, str) or mode == "constant"
    for i in range(len(widths) // 2):
        dim = len(terms) - 1 - i
        source, (before, after) = Source(node.args[0], dim), widths[2 * i : 2 * i + 2]
        if is_constant:
            terms[dim] = Pad(shape[dim], source, before, after)
        elif before or after:
            terms[dim] = Across(shape[dim], (source,))
    return Relation(tuple(terms), is_exact=is_constant)


def _slide(source: Source, count: int, size: int, *, is_view: bool) -> tuple[Term, Term]:
    """Returns which of `count` windows, and which of the `size` positions in it.

    Windows that lie side by side are a view; all others draw on the same positions several times.
    """
    if is_view and count * size == source.size:
        outer, inner = regroup([source], (count, size))
        return outer, inner
    return Mix(count, (keep(source),)), Mix(size, (keep(source),))


def relate_unfold(node: Node) -> Relation:
    """unfold(x, dim, size, step): windows, and their positions as a last dimension."""
    terms: list[Term] = list(keep_all(node.args[0]))
    dim, size, step = (int(n) for n in node.args[1:4])
    dim %= len(terms)
    source, count = Source(node.args[0], dim), value(node).shape[dim]
    terms[dim], inner = _slide(source, count, size, is_view=size == step)
    return Relation((*terms, inner), is_exact=not isinstance(inner, Mix))


def relate_im2col(node: Node) -> Relation:
    """im2col: (C, H, W) to (C * window, windows), rows of windows first."""
    *batch, channels, rows, columns = sources_of(node.args[0])
    kernel, dilation, padding, stride = node.args[1:5]
    is_view = kernel == stride and not any(padding) and set(dilation) == {1}
    sizes = zip((rows, columns), kernel, dilation, padding, stride, strict=True)
    (row, in_row), (column, in_column) = (
        _slide(s, _count(s.size, k, d, p, step), k, is_view=is_view) for s, k, d, p, step in sizes
    )
    inside = Merge((keep(channels), in_row, in_column))
    is_exact = not any(isinstance(term, Mix) for term in (row, column))
    return Relation((*map(keep, batch), inside, Merge((row, column))), is_exact=is_exact)


def _count(size: int, kernel: int, dilation: int, padding: int, stride: int) -> int:
    """Returns how many windows there are along a dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def relate_col2im(node: Node) -> Relation:
    """col2im: (C * window, windows) to (C, H, W); windows that overlap are summed."""
    *batch, inside, windows = sources_of(node.args[0])
    sizes, kernel, dilation, padding, stride = node.args[1:6]
    given = zip(sizes, kernel, dilation, padding, stride, strict=True)
    row, column = regroup([windows], [_count(*each) for each in given])
    parts = (value(node).shape[-3], *kernel)
    channels, in_row, in_column = regroup([inside], parts)
    height, width = sizes
    terms = Merge((row, in_row)), Merge((column, in_column))
    is_view = kernel == stride and not any(padding) and set(dilation) == {1}
    is_exact = is_view and [t.size for t in terms] == [height, width]
    if is_exact:
        return Relation((*map(keep, batch), channels, *terms), is_exact=True)
    return Relation((*map(keep, batch), channels, Mix(height, (row,)), Mix(width, (column,))))


def relate_pixel_unshuffle(node: Node) -> Relation:
    """pixel_unshuffle(x, factor): (C, H * f, W * f) to (C * f * f, H, W)."""
    *batch, channels, rows, columns = sources_of(node.args[0])
    *_, height, width = value(node).shape
    factor = int(node.args[1])
    row, in_row = regroup([rows], (height, factor))
    column, in_column = regroup([columns], (width, factor))
    inside = Merge((keep(channels), in_row, in_column))
    return Relation((*map(keep, batch), inside, row, column), is_exact=True)


def relate_pixel_shuffle(node: Node) -> Relation:
    """pixel_shuffle(x, factor): (C * f * f, H, W) to (C, H * f, W * f)."""
    *batch, inside, rows, columns = sources_of(node.args[0])
    factor = int(node.args[1])
    parts = (value(node).shape[-3], factor, factor)
    channels, in_row, in_column = regroup([inside], parts)
    terms = Merge((keep(rows), in_row)), Merge((keep(columns), in_column))
    return Relation((*map(keep, batch), channels, *terms), is_exact=True)
