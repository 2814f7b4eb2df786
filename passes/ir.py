"""What the passes share: the facts they leave on graphs, and the questions they ask of them.

A graph here is a :class:`torch.fx.Graph` of ATen ops. Facts about one node lie in ``node.meta``
(``"val"``: its fake tensor, ``"axes"``: its :data:`Dims`, ``"attention"``: an :class:`Attention`);
facts about the whole graph are dataclasses (:mod:`pabc.passes.facts`). In a graph with dynamic
shapes, fake tensors have symbols for sizes, and ``"hint"`` is the same at the sizes of the captured
call (:mod:`pabc.passes.tracing.sizes`).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

aten = torch.ops.aten

# One primitive op per line of thought: what an op may do to values, not what models call it.
CONTRACTIONS = frozenset(
    {
        aten.linear.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.inner.default,
        aten.tensordot.default,
        aten.convolution.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        torch.ops.mkldnn._linear_pointwise.default,
    }
)
LAYOUTS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten._to_copy.default,
    }
)
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
MASKS = (torch.bool, torch.uint8)
"""The dtypes of an index that says which elements, not at which positions."""
COLLECTIVES = ("_c10d_functional", "c10d", "c10d_functional")
"""Namespaces of the ops that communicate."""
OPAQUE = "pabc_opaque"
"""Namespace of the ops that stand for modules which a graph calls as they are."""
EFFECT = "effect"
"""Begins the names of those that leave something behind beside their results."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of a model input: where a token axis comes from.

    Where operands disagree about a dimension, the axis of lower `rank` is kept: the latents' own.
    """

    source: str
    dim: int
    rank: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.source}[{self.dim}]"


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a dimension: `size` consecutive positions along `axis`.

    `axis` None means that the positions name no token of an input: features, heads, parameters,
    repeats. A concatenation has `parts` instead, each the factors of one operand.
    `reason` says which node lost the provenance, where one did. `learned`: the positions are a
    weight's or a constant's own, the same for every input.
    """

    size: int
    axis: Axis | None = None
    parts: tuple[tuple[Factor, ...], ...] = ()
    reason: str = ""
    learned: bool = field(default=False, compare=False)

    def axes(self) -> Iterator[Axis]:
        """The axes it lies along, those of its parts included."""
        if self.axis is not None:
            yield self.axis
        for part in self.parts:
            for factor in part:
                yield from factor.axes()


Dims = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention call: the node with its output, and the axes its softmax mixes.

    `query` and `key` are the factors of the sequence dimension of Q and of K; `linear`: it is
    Q (K^T V), whose cost is linear in the tokens.
    """

    name: str
    kind: str
    node: str
    query: tuple[Factor, ...]
    key: tuple[Factor, ...]
    linear: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """One residual branch, outlined to a submodule whose outputs are its cuts.

    `name` is the submodule's attribute, `path` the user's module it came from, `layer` its ordinal
    among regions of its kind, `shapes` and `dtypes` describe the cut tensors; `encoded` those that
    a slot holds in their place (:func:`encode_cuts_pass`), where it does not hold the cuts.
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

    @property
    def kept(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor that a slot holds for it."""
        return self.encoded or tuple(zip(self.shapes, self.dtypes, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a slot holds for it."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in self.kept)


class Reach:
    """Which node depends on which, answered by one bit set per node."""

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
        """Whether `node` is computed from `source`; no node depends on itself."""
        return bool(self._ancestors[self.index[node]] >> self.index[source] & 1)

    def between(self, source: Node, sink: Node) -> list[Node]:
        """Nodes on a path from `source` (excluded) to `sink` (included), in graph order."""
        start, stop = self.index[source], self.index[sink]
        bits = self._ancestors[stop] | (1 << stop)
        return [
            self.nodes[i]
            for i in range(start + 1, stop + 1)
            if bits >> i & 1 and self._ancestors[i] >> start & 1
        ]

    def mask(self, nodes: Iterable[Node]) -> int:
        """A set of nodes, for :meth:`touches`."""
        return sum(1 << self.index[node] for node in nodes)

    def touches(self, node: Node, mask: int) -> bool:
        """Whether `node` is, or depends on, one of the nodes in `mask`."""
        i = self.index[node]
        return bool((self._ancestors[i] | (1 << i)) & mask)


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_opaque(node: Any) -> bool:
    """Whether `node` calls a module that runs as it is."""
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.namespace == OPAQUE


def is_effect(node: Any) -> bool:
    """Whether `node` leaves something behind beside its result: it runs at every step, in order."""
    return is_opaque(node) and str(node.target._opname).startswith(EFFECT)


def is_collective(node: Any) -> bool:
    """Whether `node` communicates with other processes, or waits for it."""
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.namespace in COLLECTIVES


def cannot_be_recorded(node: Node) -> bool:
    """Returns True if an op may wait for the device or for other processes, which a CUDA graph
    cannot contain."""
    return is_opaque(node) or is_collective(node)


def is_contraction(node: Node) -> bool:
    """Whether the op sums over products of two tensors: a projection, a convolution, a product.

    A module that runs as it is may hold any of these.
    """
    if is_opaque(node):
        return True
    if is_call(node, (aten.einsum.default,)):
        return len(node.all_input_nodes) > 1
    return is_call(node, CONTRACTIONS)


def is_pointwise(node: Node) -> bool:
    """Whether each output element depends on one element of each (broadcast) tensor operand."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)  # not all overloads of these are tagged
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet in (
        aten.where,
        aten.masked_fill,
    )


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers, others at each call; attention without dropout does not,
    though its op is tagged so.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, 0)
            return given != 0
    return True


def value(node: Node) -> torch.Tensor:
    """The fake tensor a node yields: its shape, dtype and device."""
    val = node.meta["val"]
    assert isinstance(val, torch.Tensor), f"{node.name} yields {type(val).__name__}, not a tensor"
    return val


def is_tensor(node: Any) -> bool:
    """Whether `node` yields one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def user_inputs(graph: Graph) -> list[Node]:
    """The graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: Graph) -> Node:
    """The node that returns."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def model_outputs(graph: Graph, num_outputs: int) -> list[Node]:
    """Returns the tensors among the first `num_outputs` results: those that the model returns.

    Values that it writes to inputs follow them.
    """
    results = output_node(graph).args[0][:num_outputs]
    return list(dict.fromkeys(node for node in results if is_tensor(node)))


def module_path(node: Node) -> str:
    """The user's qualified module name of a node; for messages and tables, never for decisions."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def dead_without(cuts: Iterable[Node]) -> set[Node]:
    """The nodes, cuts included, that nothing else needs once the cuts' values are given; what
    leaves something behind is needed.

    Requires: a graph without dead code. Walks no further than what the cuts free.
    """
    dead = set(cuts)
    stack = list(dead)
    while stack:
        for node in stack.pop().all_input_nodes:
            is_free = node.op != "placeholder" and not is_effect(node)
            if node not in dead and is_free and dead.issuperset(node.users):
                dead.add(node)
                stack.append(node)
    return dead


def remove_dead_code(graph: Graph) -> None:
    """Erases calls and attribute reads without users; inputs stay, for they are the signature, and
    so do calls that leave something behind."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not is_effect(node):
            graph.erase_node(node)


def erase_unneeded(nodes: Iterable[Node]) -> set[Node]:
    """Erases those of some calls that have no users, and what only they needed; what was erased."""
    erased: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        stack += inputs
    return erased


def copy_into(
    graph: Graph, nodes: Iterable[Node], mapping: dict[Node, Node], *, prefix: str = ""
) -> None:
    """Copies `nodes` with their metadata to the end of `graph`; `mapping` gains old -> new."""
    for node in nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if prefix:
            mapping[node].target = f"{prefix}.{node.target}"


def attribute(gm: nn.Module, name: str) -> Any:
    """The parameter, buffer or submodule of `gm` under a qualified name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(gm.get_submodule(owner), leaf)


def make_module(root: nn.Module | dict[str, Any], graph: Graph) -> GraphModule:
    """A graph module whose Python code is made when it is first run or asked for.

    Most are never run: each pass makes one.
    """
    return _LazyGraphModule(root, graph)


def layout_key(val: Any) -> Hashable:
    """What code may take for granted of a tensor; of anything else, None."""
    if not isinstance(val, torch.Tensor):
        return None
    return tuple(val.shape), val.stride(), val.dtype, val.device


def freeze(item: Any, index: dict[Node, int]) -> Hashable:
    """Arguments of a node as a hashable value, nodes by their `index`; 0, 0.0, -0.0 and False
    differ."""
    if isinstance(item, Node):
        return Node, index[item]
    if isinstance(item, (tuple, list)):
        return tuple(freeze(x, index) for x in item)
    if isinstance(item, dict):
        return tuple((name, freeze(x, index)) for name, x in item.items())
    if isinstance(item, slice):
        return slice, freeze((item.start, item.stop, item.step), index)
    return type(item), item.hex() if isinstance(item, float) else item


GETITEM = operator.getitem
