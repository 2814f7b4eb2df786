"""ir: facts about nodes, and the predicates and edits of graphs that passes share.

A graph here is a :class:`torch.fx.Graph` of ATen ops. Facts about one node lie in ``node.meta``
(``"val"``: its fake tensor, ``"axes"``: its :data:`Dims`, ``"attention"``: an :class:`Attention`);
facts about the whole graph are dataclasses (:mod:`pabc.passes.facts`). In a graph with dynamic
shapes, fake tensors have symbolic sizes, and ``"hint"`` is the fake tensor with the sizes of the
captured call (:mod:`pabc.passes.tracing.sizes`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from pabc.internals.collectives import NAMESPACES
from pabc.internals.graphs import LazyGraphModule
from pabc.internals.ops import OpOverload, schema_of, split_name

from .relations.groups import CONTRACTIONS

aten = torch.ops.aten

MASKS = (torch.bool, torch.uint8)
"""Dtypes of an index tensor that is a mask, not a list of positions."""
OPAQUE = "pabc_opaque"
"""Namespace of the ops that call opaque modules."""
EFFECT = "effect"
"""Prefix of the names of opaque ops that have side effects."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of a model input, along which tokens lie.

    If operands disagree about a dimension, the axis of the lower `rank` is kept; that of the
    latents is the lowest.
    """

    source: str
    dim: int
    rank: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.source}[{self.dim}]"


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of a dimension: `size` consecutive positions along `axis`.

    `axis` None means that the positions are no tokens of an input, but features, heads, parameters
    or repeats. A concatenation has `parts` instead, each the factors of one operand. `reason` names
    the node that lost the provenance, if one did. `learned`: the positions belong to a weight or a
    constant, and are the same for every input.
    """

    size: int
    axis: Axis | None = None
    parts: tuple[tuple[Factor, ...], ...] = ()
    reason: str = ""
    learned: bool = field(default=False, compare=False)

    def axes(self) -> Iterator[Axis]:
        """Yields the axes that the factor lies along, including those of its parts."""
        if self.axis is not None:
            yield self.axis
        for part in self.parts:
            for factor in part:
                yield from factor.axes()


Dims = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention: the node with its output, and the axes that its softmax mixes.

    `query` and `key` are the factors of the sequence dimension of Q and of K. `linear`: the
    attention is computed as Q (K^T V), at a cost that is linear in the number of tokens.
    """

    name: str
    kind: str
    node: str
    query: tuple[Factor, ...]
    key: tuple[Factor, ...]
    linear: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the model that is reused as a whole, and the submodule that returns its cuts.

    It is a residual branch, outlined to the submodule; or, with `kind` "block", "stack" or "model",
    it contains others, and the submodule makes the cuts of what they compute. `covers` are the
    indices of the regions that are dead code where this one is reused.

    `name` is the submodule's attribute, `path` the user's module it came from, `layer` its ordinal
    among regions of its kind. `shapes` and `dtypes` describe the cuts. `encoded` has the shape and
    dtype of each tensor that a slot holds instead of the cuts (:func:`encode_cuts_pass`); it is
    empty if the slot holds the cuts themselves.
    """

    name: str
    kind: str
    layer: int
    path: str
    attentions: tuple[str, ...]
    cuts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    encoded: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    covers: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """The shape and dtype of each tensor that a slot holds for this region."""
        return self.encoded or tuple(zip(self.shapes, self.dtypes, strict=True))

    @property
    def nbytes(self) -> int:
        """The number of bytes that a slot holds for this region."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in self.kept)


class Reach:
    """The dependencies between the nodes of a graph, kept as one bit set per node."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._ancestors: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                bits |= self._ancestors[i] | (1 << i)
            self._ancestors.append(bits)

    def depends(self, node: Node, source: Node) -> bool:
        """Returns True if `node` is computed from `source`; no node depends on itself."""
        return bool(self._ancestors[self.index[node]] >> self.index[source] & 1)

    def between(self, source: Node, sink: Node) -> list[Node]:
        """Returns the nodes on paths from `source` (excluded) to `sink` (included), in order."""
        start, stop = self.index[source], self.index[sink]
        bits = self._ancestors[stop] | (1 << stop)
        return [
            self.nodes[i]
            for i in range(start + 1, stop + 1)
            if bits >> i & 1 and self._ancestors[i] >> start & 1
        ]

    def mask(self, nodes: Iterable[Node]) -> int:
        """Returns a bit set of nodes, for :meth:`touches`."""
        return sum(1 << self.index[node] for node in nodes)

    def touches(self, node: Node, mask: int) -> bool:
        """Returns True if `node` is one of the nodes in `mask`, or depends on one."""
        i = self.index[node]
        return bool((self._ancestors[i] | (1 << i)) & mask)


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    """Returns True if `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_opaque(node: Any) -> bool:
    """Returns True if `node` calls an opaque module."""
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, OpOverload) and target.namespace == OPAQUE


def is_effect(node: Any) -> bool:
    """Returns True if `node` has side effects, so that it must run at every step, in order."""
    return is_opaque(node) and split_name(node.target)[0].startswith(EFFECT)


def is_collective(node: Any) -> bool:
    """Returns True if `node` is a collective op, or waits for one."""
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, OpOverload) and target.namespace in NAMESPACES


def cannot_be_recorded(node: Node) -> bool:
    """Returns True if a CUDA graph cannot contain the op.

    Such an op may wait for the device or for other processes.
    """
    return is_opaque(node) or is_collective(node)


def is_contraction(node: Node) -> bool:
    """Returns True if the op contracts two tensors: a projection, a convolution, a matrix product.

    An opaque module counts as one, since it may contain any of these.
    """
    if is_opaque(node):
        return True
    if is_call(node, (aten.einsum.default,)):
        return len(node.all_input_nodes) > 1
    return is_call(node, CONTRACTIONS)


def is_pointwise(node: Node) -> bool:
    """Returns True if each output element depends on one element of each broadcast operand."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)  # not all overloads of these are tagged
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet in (
        aten.where,
        aten.masked_fill,
    )


def is_random(node: Node) -> bool:
    """Returns True if the op draws random numbers.

    Attention without dropout draws none, although PyTorch tags its op as random.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for i, argument in enumerate(schema_of(node.target).arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, 0)
            return given != 0
    return True


def value(node: Node) -> torch.Tensor:
    """Returns the fake tensor of a node: its shape, strides, dtype and device."""
    val = node.meta["val"]
    assert isinstance(val, torch.Tensor), f"{node.name} yields {type(val).__name__}, not a tensor"
    return val


def is_tensor(node: Any) -> bool:
    """Returns True if `node` yields one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def viewed(node: Node) -> Node:
    """Returns the node that `node` is, or may be, a view of."""
    while node.target is GETITEM or _may_be_view(node):
        node = node.args[0]
    return node


def _may_be_view(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.all_input_nodes:
        return False
    returns = schema_of(node.target).returns
    return any(r.alias_info is not None for r in returns) and isinstance(node.args[0], Node)


def user_inputs(graph: Graph) -> list[Node]:
    """Returns the graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: Graph) -> Node:
    """Returns the output node of the graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def model_outputs(graph: Graph, num_outputs: int) -> list[Node]:
    """Returns the tensors among the first `num_outputs` results, which are the model's outputs.

    The results after them are the new values of inputs that the model writes to.
    """
    results = output_node(graph).args[0][:num_outputs]
    return list(dict.fromkeys(node for node in results if is_tensor(node)))


def module_path(node: Node) -> str:
    """Returns the qualified name of the user's module that a node is from; for messages only."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def copy_into(
    graph: Graph, nodes: Iterable[Node], mapping: dict[Node, Node], *, prefix: str = ""
) -> None:
    """Copies `nodes` with their metadata to the end of `graph`, and adds old -> new to `mapping`.

    `prefix` is put before the targets of the copies.
    """
    for node in nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if prefix:
            mapping[node].target = f"{prefix}.{node.target}"


def attribute(gm: nn.Module, name: str) -> Any:
    """Returns the parameter, buffer or submodule of `gm` with a qualified name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(gm.get_submodule(owner), leaf)


def make_module(root: nn.Module | dict[str, Any], graph: Graph) -> GraphModule:
    """Returns a graph module that generates its Python code when it is first run.

    Each pass makes a graph module, and most of them never run.
    """
    return LazyGraphModule(root, graph)


GETITEM = operator.getitem
