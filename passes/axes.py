"""axes: follows every tensor dimension back to the axes of the model's inputs.

A dimension is a product of factors, each along an axis of an input (such as the latents' frames) or
along none. Each op's relation (:mod:`pabc.passes.relations`) tells how it maps dimensions. An op
without a relation loses the provenance of the dimensions that it changes; the factor's `reason`,
which error messages show, names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pabc.internals.ops import HigherOrderOperator

from .facts import Captured, Denoised, Signature
from .ir import (
    GETITEM,
    Axis,
    Dims,
    Factor,
    Reach,
    is_opaque,
    is_tensor,
    model_outputs,
    user_inputs,
    value,
)
from .provenance.factors import blur, combine, learned, length, unknown
from .provenance.follow import follow
from .provenance.positions import find_positions, rejoin
from .relations.arguments import argument, nodes_in
from .relations.table import Relate, find_relation, relate_results
from .relations.terms import Relation


def name_axes_pass(
    gm: GraphModule, captured: Captured, *, latents: str | None = None
) -> tuple[GraphModule, Denoised]:
    """Gives every tensor node `meta["axes"]`, and finds the inputs that are denoised.

    Requires: a canonical ATen graph whose nodes carry fake tensors.
    Ensures: each tensor node has one tuple of factors per dimension, whose sizes multiply to the
    size of the dimension. The latents are the input named `latents`, or else the first input whose
    axes (except channels) reappear in the first output; inputs of three dimensions or more come
    first, then packed tokens (N, C), then token ids. Other inputs in the same list, which are
    samples of one batch, are denoised as well, and so are other streams (audio with video), whose
    axes reappear in some output.
    Raises: ValueError if `latents` names no input, or no input qualifies.

        # before                                # after
        %h = view(%x, [B*T, S, C])              axes: ((B, T), (H, W), (none,))
    """
    names = [node.name for node in user_inputs(gm.graph)]
    if latents is not None and latents not in names:
        raise ValueError(f"latents: expected one of the inputs {names}, found {latents!r}")
    candidates = [latents] if latents is not None else _find_candidates(gm)
    outputs = model_outputs(gm.graph, captured.signature.out_spec.num_outputs)
    relate = cache(relate_results)
    for name in candidates:
        streams = dict.fromkeys(_samples(gm, captured.signature, name), name)
        _propagate(gm, relate, streams)
        if latents is not None or any(_comes_out_again(gm, name, n) for n in outputs[:1]):
            _propagate(gm, relate, streams, conditions=names)
            if others := _find_other_streams(gm, captured.signature, streams, outputs):
                streams |= others
                _propagate(gm, relate, streams, conditions=names)
            return gm, Denoised(name, streams)
    raise ValueError(
        f"latents: expected an input whose axes come out again in the model's output, found none "
        f"among {candidates}; name the denoised input with latents={_why_lost(gm, captured)}"
    )


def verify_axes(gm: GraphModule) -> None:
    """Checks that every tensor node's factors multiply to its shape."""
    for node in gm.graph.nodes:
        if is_tensor(node):
            sizes = tuple(length(product) for product in node.meta["axes"])
            assert sizes == tuple(value(node).shape), (
                f"axes of {node.name} ({node.target}) multiply to {sizes}, its shape is "
                f"{tuple(value(node).shape)}"
            )


def _find_candidates(gm: GraphModule) -> list[str]:
    """Returns the inputs of two dimensions or more, most likely latents first.

    Floating-point inputs of three dimensions or more come first.
    """
    nodes = [n for n in user_inputs(gm.graph) if is_tensor(n) and value(n).ndim >= 2]
    nodes = [n for n in nodes if value(n).dtype != torch.bool]
    nodes.sort(key=lambda n: (not value(n).is_floating_point(), value(n).ndim < 3))
    return [n.name for n in nodes]


def _samples(gm: GraphModule, signature: Signature, name: str) -> tuple[str, ...]:
    """Returns an input and, if all have the same rank, the other inputs in the same list."""
    args, kwargs = signature.in_spec.unflatten(range(len(signature.inputs)))
    index = signature.inputs.index(name)
    ranks = {n.name: value(n).ndim for n in user_inputs(gm.graph) if is_tensor(n)}
    for given in (*args, *kwargs.values()):
        if isinstance(given, (list, tuple)) and index in given:
            others = [signature.inputs[i] for i in given if isinstance(i, int)]
            if all(ranks.get(n) == ranks[name] for n in others):
                return (name, *(n for n in others if n != name))
    return (name,)


def _why_lost(gm: GraphModule, captured: Captured) -> str:
    """Returns a remark that names the first opaque module, or an empty one."""
    called = {call.op: call for call in captured.calls}
    node = next((n for n in gm.graph.nodes if is_opaque(n) and n.users), None)
    if node is None:
        return ""
    call = called.get(node.target)
    name, reason = (node.name, "") if call is None else (call.path, f": {call.reason}")
    return f" ({name} is opaque{reason})"


def _comes_out_again(gm: GraphModule, name: str, output: Node, *, alone: bool = False) -> bool:
    """Returns True if an output has all axes of an input except the batch and the channels.

    Integer inputs are token ids and have no channels. An input of two dimensions must reappear in
    its own shape, since pooled conditions have a batch dimension, too. `alone`: axes that are
    concatenated with others, as a condition's tokens may be, do not count.
    """
    factors = [f for product in output.meta["axes"] for f in product if not (alone and f.parts)]
    axes = (axis for factor in factors for axis in factor.axes())
    found = {axis.dim for axis in axes if axis.source == name}
    source = value(next(n for n in user_inputs(gm.graph) if n.name == name))
    if not source.is_floating_point():
        return len(found) == source.ndim
    if source.ndim < 3:
        return bool(found) and value(output).shape == source.shape
    return len(found - {0}) >= source.ndim - 2


def _find_other_streams(
    gm: GraphModule,
    signature: Signature,
    streams: Mapping[str, str],
    outputs: Sequence[Node],
) -> dict[str, str]:
    """Returns the other inputs that reappear in outputs, each mapped to its stream's name.

    Only outputs that change from step to step count, since a model may also return a condition.
    """
    reach = Reach(gm.graph)
    inputs = [n for n in user_inputs(gm.graph) if is_tensor(n)]
    changing = reach.mask(n for n in inputs if n.name in streams or value(n).ndim < 2)
    outputs = [output for output in outputs if reach.touches(output, changing)]
    others: dict[str, str] = {}
    for name in _find_candidates(gm):
        if name in streams or name in others:
            continue
        if any(_comes_out_again(gm, name, output, alone=True) for output in outputs):
            others |= dict.fromkeys(_samples(gm, signature, name), name)
    return others


def _propagate(
    gm: GraphModule,
    relate: Relate,
    streams: Mapping[str, str],
    *,
    conditions: Sequence[str] = (),
) -> None:
    """Computes the dimensions of every node, from the axes of the streams and conditions.

    `streams` maps each denoised input to the input whose axes it has. The axes of the first stream
    have the lowest rank, those of conditions the highest. Nodes that depend on no denoised input
    keep no reasons for a lost provenance, since they have no latent axes to lose.
    """
    following: set[Node] = set()
    constants: set[Node] = set()
    sources = {**{name: name for name in conditions}, **streams}
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(streams.values()))}
    for node in gm.graph.nodes:
        if node.name in streams or not following.isdisjoint(node.all_input_nodes):
            following.add(node)
        relation = find_relation(node, relate)
        node.meta["positions"] = find_positions(node, relation)
        if _is_constant(node, constants):
            constants.add(node)
            node.meta["axes"] = _learned(node.meta.get("val"))
            continue
        if not is_tensor(node):
            if isinstance(node.meta.get("val"), (tuple, list)):
                node.meta["axes"] = infer(node, relate=relate)
            continue
        shape = tuple(value(node).shape)
        if node.op == "placeholder" and node.name in sources:
            source = sources[node.name]
            rank = ranks.get(source, len(ranks))
            axes = [Axis(source, i, rank) for i in range(len(shape))]
            dims: Dims = tuple((Factor(s, a),) for s, a in zip(shape, axes, strict=True))
        elif node.op == "call_function":
            dims, node.meta["positions"] = rejoin(node, relation, infer(node, relate=relate))
        else:
            dims = learned(shape)
        node.meta["axes"] = dims if node in following else _without_reasons(dims)


def _is_constant(node: Node, constants: Collection[Node]) -> bool:
    """Returns True if a node is a weight, a constant, or computed from these alone."""
    if node.op == "get_attr":
        return True
    called = node.op == "call_function" and not is_opaque(node)
    return called and all(source in constants for source in node.all_input_nodes)


def _learned(val: Any) -> Any:
    """Returns the dimensions of a constant, or of each of several."""
    if isinstance(val, (tuple, list)):
        return tuple(map(_learned, val))
    return learned(val.shape) if isinstance(val, torch.Tensor) else ()


def _without_reasons(dims: Dims) -> Dims:
    if not any(factor.reason for product in dims for factor in product):
        return dims
    return tuple(tuple(replace(factor, reason="") for factor in product) for product in dims)


def _known(node: Node) -> Any:
    return node.meta["axes"]


def infer(
    node: Node,
    known: Callable[[Node], Any] = _known,
    relate: Relate = relate_results,
) -> Any:
    """Returns the dimensions of a call's result, or of each of several, from those of its operands.

    Args:
        node: the call.
        known: returns the dimensions of an operand.
        relate: returns the relation of a call; may cache the results of the table.
    """
    return _infer_one(node, known, relate) if is_tensor(node) else _several(node, known, relate)


def _infer_one(node: Node, known: Callable[[Node], Any], relate: Relate) -> Dims:
    if node.target is GETITEM:
        return known(node.args[0])[node.args[1]]
    shape = tuple(value(node).shape)
    if 0 in shape:
        return unknown(shape, f"{node.name} has an empty dimension")
    relation = relate(node)
    if isinstance(relation, Relation):
        return follow(relation, known, _lost(node))
    return _guess(node, known, shape)


def _guess(node: Node, known: Callable[[Node], Any], shape: tuple[int, ...]) -> Dims:
    """Returns the dimensions of the result of an op that has no relation.

    If the shape is that of the broadcast operands, the op is taken to be pointwise. A wrong guess
    names a kind wrong, and so decides what is reused, but changes no computation.
    """
    inputs = [n for n in nodes_in(node.args) if is_tensor(n)]
    try:
        broadcast = torch.broadcast_shapes(*(tuple(value(n).shape) for n in inputs))
    except RuntimeError:
        broadcast = torch.Size()
    if inputs and tuple(broadcast) == shape:
        return combine(shape, [known(n) for n in inputs])
    if not inputs:
        return learned(shape)
    return unknown(shape, f"{node.name} ({node.target}) has no rule for axes")


def _lost(node: Node) -> str:
    """Returns the reason why the positions are unknown after `node`."""
    return f"{node.name} ({node.target}) mixes positions"


def _several(node: Node, known: Callable[[Node], Any], relate: Relate) -> tuple[Dims, ...]:
    """Returns the dimensions of the results of an op with several.

    Results of an op without relations (topk, statistics) are compared with its first operand.
    """
    vals = node.meta["val"]
    if is_opaque(node):
        return tuple(unknown(val.shape, f"{node.name} is opaque") for val in vals)
    relations = relate(node)
    if isinstance(relations, tuple):
        return tuple(follow(each, known, _lost(node)) for each in relations)
    if isinstance(node.target, HigherOrderOperator):
        reason = f"{node.name} ({node.target}) has no rule for axes"
        return tuple(unknown(val.shape if _has_shape(val) else (), reason) for val in vals)
    first = known(next(n for n in nodes_in(node.args) if is_tensor(n)))
    shapes = [tuple(val.shape) if _has_shape(val) else () for val in vals]
    return tuple(_like(first, node, shape) for shape in shapes)


def _like(dims: Dims, node: Node, shape: tuple[int, ...]) -> Dims:
    """Returns the dimensions of one of several results, from those of the first operand.

    A dimension whose size differs is a reduced one.
    """
    chosen = argument(node, 1, node.kwargs.get("dim"))
    chosen = (chosen,) if isinstance(chosen, int) else chosen
    if len(shape) < len(dims) and isinstance(chosen, (tuple, list)):
        gone = {d % len(dims) for d in chosen}
        dims = tuple(product for d, product in enumerate(dims) if d not in gone)
    if len(shape) != len(dims):
        return unknown(shape, _lost(node))
    return tuple(
        product if length(product) == size else blur(product, size, _lost(node))
        for product, size in zip(dims, shape, strict=True)
    )


def _has_shape(val: Any) -> bool:
    return isinstance(val, torch.Tensor)
