"""encode: makes slots hold cuts in a smaller form, by casts in the graph, which can be fused.

A region's cuts are encoded after the region was computed, and decoded where they are reused. A step
that computes a region goes on with the exact cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pabc.kernels.dtypes import FP8, FP8_MAX, OVER_FP8_MAX, TINY

from .facts import Captured, Regions
from .guard_ops import (
    Cuts,
    cache_read,
    cache_write,
    decode_cached,
    encode_unless,
    forecast_cached,
    slot_of,
)
from .ir import Region, attribute, copy_into, make_module, output_node, value
from .tracing.sizes import Sizes, concrete, hint

CacheDtype = Literal["keep", "bf16", "fp8"]


def form_of(cut: torch.Tensor, cache_dtype: CacheDtype) -> CacheDtype:
    """Returns the form in which a slot holds a cut: "keep", unless encoding makes it smaller."""
    if cache_dtype == "keep" or not cut.is_floating_point() or cut.ndim == 0:
        return "keep"
    if cache_dtype == "bf16":
        return "bf16" if cut.element_size() > torch.bfloat16.itemsize else "keep"
    num = cut.shape[-1]
    encoded = num * FP8.itemsize + torch.float32.itemsize
    return "fp8" if encoded < num * cut.element_size() else "keep"


def encode(cut: torch.Tensor, form: CacheDtype) -> Cuts:
    """Returns the tensors that a slot holds instead of a cut.

    `"bf16"`: one tensor, rounded. `"fp8"`: the values divided by a scale, as e4m3, and the scales
    (float32), one per token, that is, per row of the last dimension: the row's largest magnitude
    divided by 448. If a row has values that are not finite, its scale is not finite.
    """
    if form == "keep":
        return (cut,)
    if form == "bf16":
        return (cut.to(torch.bfloat16),)
    exact = cut.to(torch.float32)
    scale = (exact.abs().amax(-1, keepdim=True) * OVER_FP8_MAX).clamp_min(TINY)
    # A quotient may round to just above the largest value, and far above it the cast gives NaN.
    return (exact / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def decode(kept: Sequence[torch.Tensor], form: CacheDtype, dtype: torch.dtype) -> torch.Tensor:
    """Returns the cut that was encoded as `kept`, up to the rounding of the form."""
    if form == "fp8":
        values, scale = kept
        return (values.to(torch.float32) * scale).to(dtype)
    return kept[0].to(dtype)


def encode_cuts_pass(
    gm: GraphModule, captured: Captured, regions: Regions, *, cache_dtype: CacheDtype
) -> tuple[GraphModule, Regions]:
    """Decodes the result of each cache read, and encodes the operand of each cache write.

    Requires: a guarded graph (:func:`insert_cache_pass`).
    Ensures: slots hold encoded cuts (:attr:`Region.encoded`), except those of regions whose cuts
    would not become smaller, and all with `"keep"`; outputs of a step that reuses nothing are
    bitwise as before.

        # before                                # after
        %h = cache_read(%trajectory, 0)         %h = cache_read(%trajectory, 0)
        %c = forecast_cached(%h)                %d = decode_cached(%h, decode_0)
        %u = compute_unless(%c, spatial_0, %x)  %c = forecast_cached(%d)
        %r = cache_write(%trajectory, 0,        %u = compute_unless(%c, spatial_0, %x)
                         %c, %u)                %e = encode_unless(%c, encode_0, %u)
        %v = getitem(%r, 0)                     %w = cache_write(%trajectory, 0, %c, %e)
                                                %v = getitem(%u, 0)
    """
    codecs = _find_codecs(gm, regions.all, captured.sizes, cache_dtype)
    if not codecs:
        return gm, regions
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        codec = codecs.get(slot_of(node))
        if codec is not None and node.target is forecast_cached:
            decoder = graph.get_attr(f"decode_{codec.index}")
            decoded = graph.call_function(decode_cached, (mapping[node.args[0]], decoder))
            mapping[node] = graph.call_function(forecast_cached, (decoded,))
            mapping[node].meta.update(node.meta)
        elif codec is not None and node.target is cache_write:
            trajectory, slot, cached, cuts = (mapping.get(n, n) for n in node.args)
            encoder = graph.get_attr(f"encode_{codec.index}")
            encoded = graph.call_function(encode_unless, (cached, encoder, cuts))
            graph.call_function(cache_write, (trajectory, slot, cached, encoded))
            mapping[node] = cuts
        else:
            copy_into(graph, [node], mapping)
            if codec is not None and node.target is cache_read:
                mapping[node].meta["val"] = codec.vals
    reads = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    root = {name: attribute(gm, name) for name in reads}
    for codec in codecs.values():
        root[f"encode_{codec.index}"] = codec.encoder
        root[f"decode_{codec.index}"] = codec.decoder
    encoded = (
        replace(region, encoded=codecs[slot].layout) if slot in codecs else region
        for slot, region in enumerate(regions.all)
    )
    return make_module(root, graph), replace(regions, all=tuple(encoded))


@dataclass(frozen=True)
class _Codec:
    """The encoder and decoder of cuts of one layout.

    `vals` are the fake tensors that the encoder returns; `layout` has their shapes and dtypes.
    """

    index: int
    encoder: GraphModule
    decoder: GraphModule
    vals: Cuts
    layout: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _find_codecs(
    gm: GraphModule, regions: Sequence[Region], sizes: Sizes | None, cache_dtype: CacheDtype
) -> Mapping[int | None, _Codec]:
    """Returns the codec of each slot whose cuts become smaller; cuts of one layout share it."""
    known: dict[str, _Codec] = {}
    codecs: dict[int | None, _Codec] = {}
    for slot, region in enumerate(regions):
        cuts = _cuts(gm.get_submodule(region.name))
        forms = tuple(form_of(hint(cut), cache_dtype) for cut in cuts)
        if set(forms) == {"keep"}:
            continue
        vals = tuple(map(value, cuts))
        key = repr([(v.shape, v.stride(), v.dtype, v.device) for v in vals])
        if key not in known:
            known[key] = _trace_codec(len(known), vals, forms, sizes)
        codecs[slot] = known[key]
    return codecs


def _cuts(region: nn.Module) -> tuple[Node, ...]:
    assert isinstance(region, GraphModule)
    return output_node(region.graph).args[0]


def _trace_codec(
    index: int, cuts: Cuts, forms: tuple[CacheDtype, ...], sizes: Sizes | None
) -> _Codec:
    """Traces a codec with fake tensors; its ops take no sizes, so that it works for all sizes."""
    nums = [2 if form == "fp8" else 1 for form in forms]

    def encode_all(*cuts: torch.Tensor) -> Cuts:
        pairs = zip(cuts, forms, strict=True)
        return tuple(kept for cut, form in pairs for kept in encode(cut, form))

    def decode_all(*kept: torch.Tensor) -> Cuts:
        rest = iter(kept)
        groups = [[next(rest) for _ in range(num)] for num in nums]
        triples = zip(groups, forms, cuts, strict=True)
        return tuple(decode(group, form, cut.dtype) for group, form, cut in triples)

    with torch.no_grad():
        encoder = make_fx(encode_all)(*cuts)
        encoded = tuple(n.meta["val"] for n in output_node(encoder.graph).args[0])
        decoder = make_fx(decode_all)(*encoded)
    known = [concrete(val, sizes.hints) if sizes is not None else val for val in encoded]
    layout = tuple((tuple(val.shape), val.dtype) for val in known)
    return _Codec(index, encoder, decoder, encoded, layout)
