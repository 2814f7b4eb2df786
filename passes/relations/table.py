"""The table: what each op does to dimensions. An op that is not in it is unknown to every reader.

Pointwise ops have no entries, but for those that PyTorch does not tag so: one relation fits all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from ..attention_calls import attention_call, is_attention_op
from ..ir import GETITEM, aten, is_pointwise, is_tensor, value
from . import indexing, layouts, reductions, windows
from .einsums import PRODUCTS
from .groups import (
    ALIASES,
    CASTS,
    CONVOLUTIONS,
    COPIES,
    SOFTMAXES,
    SPLITS,
    SQUEEZES,
    VIEWS,
)
from .terms import New, Relation

Relations = Relation | tuple[Relation, ...]
"""One relation for each result of an op with several."""

Relate = Callable[[Node], Relations | None]

_LAYOUTS: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys((*COPIES, *ALIASES, *CASTS), layouts.relate_copy),
    **dict.fromkeys(VIEWS, layouts.relate_view),
    **dict.fromkeys(SQUEEZES, layouts.relate_squeeze),
    **dict.fromkeys(SPLITS, layouts.relate_split),
    aten.as_strided.default: layouts.relate_unknown,
    aten.cat.default: layouts.relate_cat,
    aten.copy.default: layouts.relate_copy_into,
    aten.expand.default: layouts.relate_expand,
    aten.flip.default: layouts.relate_flip,
    aten.permute.default: layouts.relate_permute,
    aten.repeat.default: layouts.relate_repeat,
    aten.repeat_interleave.self_int: layouts.relate_repeat_interleave,
    aten.roll.default: layouts.relate_roll,
    aten.select.int: layouts.relate_select,
    aten.slice.Tensor: layouts.relate_slice,
    aten.stack.default: layouts.relate_stack,
    aten.t.default: layouts.relate_t,
    aten.take.default: layouts.relate_unknown,
    aten.transpose.int: layouts.relate_transpose,
    aten.unbind.int: layouts.relate_unbind,
    aten.unsqueeze.default: layouts.relate_unsqueeze,
    aten.view_as_complex.default: layouts.relate_as_complex,
    aten.view_as_real.default: layouts.relate_as_real,
}
_CONSTANTS: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys(
        (
            aten.new_empty.default,
            aten.new_empty_strided.default,
            aten.new_full.default,
            aten.new_ones.default,
            aten.new_zeros.default,
        ),
        layouts.relate_new,
    ),
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.fill.Scalar,
            aten.full_like.default,
            aten.ones_like.default,
            aten.zero.default,
            aten.zeros_like.default,
        ),
        layouts.relate_like,
    ),
}
_REDUCTIONS: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys(
        (
            aten.all.dim,
            aten.all.dims,
            aten.amax.default,
            aten.amin.default,
            aten.any.dim,
            aten.any.dims,
            aten.argmax.default,
            aten.argmin.default,
            aten.logsumexp.default,
            aten.mean.default,
            aten.mean.dim,
            aten.prod.dim_int,
            aten.std.correction,
            aten.sum.dim_IntList,
            aten.var.correction,
        ),
        reductions.relate_reduction,
    ),
    **dict.fromkeys(
        (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim),
        reductions.relate_vector_norm,
    ),
    **dict.fromkeys((*SOFTMAXES, aten.log_softmax.int), reductions.relate_softmax),
    aten.batch_norm.default: reductions.relate_batch_norm,
    aten.group_norm.default: reductions.relate_sample_norm,
    aten.instance_norm.default: reductions.relate_sample_norm,
    aten.layer_norm.default: reductions.relate_layer_norm,
    aten.rms_norm.default: reductions.relate_layer_norm,
}
_PRODUCTS: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys(PRODUCTS, reductions.relate_product),
    aten.cdist.default: reductions.relate_distances,
    aten.linalg_vecdot.default: reductions.relate_vecdot,
    aten.linear.default: reductions.relate_linear,
    aten.mv.default: reductions.relate_mv,
}
_INDEXING: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys((aten.index_add.default, aten.index_copy.default), indexing.relate_index_add),
    **dict.fromkeys(
        (
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
        ),
        indexing.relate_scatter,
    ),
    aten.argsort.default: indexing.relate_argsort,
    aten.embedding.default: indexing.relate_embedding,
    aten.gather.default: indexing.relate_gather,
    aten.index.Tensor: indexing.relate_index,
    aten.index_put.default: indexing.relate_index_put,
    aten.index_select.default: indexing.relate_index_select,
    aten.masked_scatter.default: indexing.relate_masked_scatter,
    aten.one_hot.default: indexing.relate_one_hot,
    aten.select_scatter.default: indexing.relate_select_scatter,
    aten.slice_scatter.default: indexing.relate_slice_scatter,
}
_WINDOWS: Mapping[Any, Callable[[Node], Relations]] = {
    **dict.fromkeys(CONVOLUTIONS, windows.relate_convolution),
    **dict.fromkeys(
        (
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        windows.relate_transposed_convolution,
    ),
    **dict.fromkeys(
        (
            aten.adaptive_avg_pool1d.default,
            aten.avg_pool1d.default,
            aten.upsample_linear1d.vec,
            aten.upsample_nearest1d.vec,
        ),
        windows.relate_pooling,
    ),
    **dict.fromkeys(
        (
            aten._upsample_nearest_exact2d.vec,
            aten.adaptive_avg_pool2d.default,
            aten.avg_pool2d.default,
            aten.max_pool2d.default,
            aten.upsample_bicubic2d.vec,
            aten.upsample_bilinear2d.vec,
            aten.upsample_nearest2d.vec,
        ),
        windows.relate_pooling_2d,
    ),
    **dict.fromkeys(
        (
            aten.adaptive_avg_pool3d.default,
            aten.avg_pool3d.default,
            aten.upsample_nearest3d.vec,
            aten.upsample_trilinear3d.vec,
        ),
        windows.relate_pooling_3d,
    ),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), windows.relate_padding),
    aten.col2im.default: windows.relate_col2im,
    aten.glu.default: windows.relate_glu,
    aten.im2col.default: windows.relate_im2col,
    aten.pixel_shuffle.default: windows.relate_pixel_shuffle,
    aten.pixel_unshuffle.default: windows.relate_pixel_unshuffle,
    aten.unfold.default: windows.relate_unfold,
}
RELATIONS: Mapping[Any, Callable[[Node], Relations]] = {
    **_LAYOUTS,
    **_CONSTANTS,
    **_REDUCTIONS,
    **_PRODUCTS,
    **_INDEXING,
    **_WINDOWS,
}


def relate_results(node: Node) -> Relations | None:
    """Returns what a call does to dimensions: one relation, or one for each of several results.

    None where nothing is known. Requires: fake tensors of fixed sizes.
    """
    if node.op != "call_function":
        return None
    if is_attention_op(node):
        return _relate_attention(node)
    rule = RELATIONS.get(node.target)
    if rule is not None:
        return rule(node)
    return layouts.relate_pointwise(node) if is_pointwise(node) else None


def find_relation(node: Node, relate: Relate = relate_results) -> Relation | None:
    """Returns what a call with one result does to dimensions, or what makes one of several results.

    That is as if it took its part of the operands itself: `getitem` of a split is a slice.
    """
    if node.op == "call_function" and node.target is GETITEM:
        call, index = node.args
        several = relate(call) if isinstance(call, Node) else None
        return several[index] if isinstance(several, tuple) else None
    found = relate(node)
    return None if isinstance(found, tuple) else found


def _relate_attention(node: Node) -> Relations:
    if is_tensor(node):
        return reductions.relate_attention(node, tuple(value(node).shape))
    output = attention_call(node).output
    shapes = [tuple(getattr(val, "shape", ())) for val in node.meta["val"]]
    return tuple(
        reductions.relate_attention(node, shape)
        if i == output
        else Relation(tuple(map(New, shape)))
        for i, shape in enumerate(shapes)
    )
