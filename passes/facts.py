"""Facts: what passes find about a whole graph and tell one another.

A pass takes the facts that it needs as arguments and returns those that it finds beside the graph.
Each is one frozen dataclass. Facts about one node lie in ``node.meta`` (see :mod:`pabc.passes.ir`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.fx import GraphModule

from pabc.base.structure import Structure

from .ir import Attention, Axis, Region
from .tracing.calls import ResultForm
from .tracing.effects import WrittenName
from .tracing.guards import Reads
from .tracing.modules import ModelState
from .tracing.opaque import OpaqueCall
from .tracing.sizes import SizeBinding, Sizes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Signature:
    """How the graph's inputs and outputs pack into the model's own arguments and result.

    Attributes:
        in_spec: the structure of the model's arguments.
        out_spec: the structure of its result.
        inputs: the name of each graph input, one per flattened argument.
    """

    in_spec: Structure
    out_spec: ResultForm
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """The call that is captured.

    Attributes:
        model: the model, in eval mode.
        args: its positional arguments, as :func:`pabc.passes.bind_call` returns them.
        kwargs: its keyword arguments, as :func:`pabc.passes.bind_call` returns them.
        opaque: qualified names of modules that the graph calls instead of containing them, each
            with the reason.
        lifted: positions among the flattened arguments of numbers that become inputs.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    opaque: Mapping[str, str] = field(default_factory=dict)
    lifted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What capture found out about the model's forward.

    Attributes:
        signature: how inputs and outputs pack into the model's own.
        reads: the values read from tensor data that the graph is specialized on.
        modules: the Python state of the model that the graph is specialized on.
        calls: one entry per call of an opaque module or hook.
        aliases: the other names under which the model's modules share a tensor, by its name.
        writes: positions of the inputs that the forward writes to; their new values follow the
            outputs.
        deleted: paths within the arguments of what the forward deletes from them.
        written: Python state that the forward writes and never reads.
        compiled: what the model compiles itself; it is traced as written.
        sizes: the sizes that a graph with dynamic shapes serves; None: those of the call alone.
    """

    signature: Signature
    reads: Reads
    modules: ModelState
    calls: tuple[OpaqueCall, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    writes: tuple[int, ...] = ()
    deleted: tuple[tuple[Any, ...], ...] = ()
    written: tuple[WrittenName, ...] = ()
    compiled: tuple[str, ...] = ()
    sizes: Sizes | None = None


@dataclass(frozen=True, slots=True)
class Denoised:
    """Which inputs are denoised.

    Attributes:
        latents: the name of the latents, the first of them.
        streams: each denoised input's name -> the input whose axes it has: itself, or the first
            sample of the list that it is in.
    """

    latents: str
    streams: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Enlarged:
    """The graph of a larger call, which shows where token axes of one position lie.

    Attributes:
        graph: the graph, with axes; None: no kind hinges on such an axis, or the model takes no
            larger call.
        denoised: the denoised inputs of that graph.
    """

    graph: GraphModule | None = None
    denoised: Denoised | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """What the search for attention left over.

    Attributes:
        unclaimed: a line for each softmax over tokens that is part of no attention.
    """

    unclaimed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Marked:
    """The residual branches that are marked on the nodes.

    Attributes:
        branches: the kind of each region and the names of its attentions, by region.
        outside: a line for each attention that no region holds, with the reason.
    """

    branches: tuple[tuple[str, tuple[str, ...]], ...]
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardedAxis:
    """One axis of the latents that is sharded.

    Attributes:
        axis: the axis.
        ranks: the number of ranks that share it.
        gathered: the regions that every rank computes as a whole, since an op in them has no rule.
    """

    axis: Axis
    ranks: int
    gathered: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shards:
    """How a graph is sharded.

    Attributes:
        axes: what is sharded, the outermost first; empty: nothing.
        digest: SHA-256, as hex, of the whole graph and of how it is sharded; equal on all ranks.
    """

    axes: tuple[ShardedAxis, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True)
class PrologueGraph:
    """What runs once a generation.

    Attributes:
        graph: the model's inputs -> the hoisted values, which are the last inputs of the graph.
        steady: positions of the inputs whose values it reads.
        attentions: the attentions in it.
    """

    graph: GraphModule
    steady: tuple[int, ...] = ()
    attentions: tuple[Attention, ...] = ()


@dataclass(frozen=True, slots=True)
class Regions:
    """The outlined regions.

    Attributes:
        all: in execution order; region i is slot i of a plan.
    """

    all: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """All that is known once the guarded graph is made; whatever runs a model starts from it.

    Attributes:
        graph: the guarded graph. Its inputs are the state of a step, the model's flattened
            arguments, and the hoisted values.
        captured: what capture found.
        denoised: which inputs are denoised.
        marked: the branches, and what no region holds.
        shards: how the graph is sharded.
        prologue: what runs once a generation.
        regions: the regions, in execution order; region i is slot i of a plan.
    """

    graph: GraphModule
    captured: Captured
    denoised: Denoised
    marked: Marked
    shards: Shards
    prologue: PrologueGraph
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class PhaseSlots:
    """What a phase does with slots.

    Attributes:
        reused: the slots that it reuses, ascending: the last inputs of its graph.
        stored: the slots whose cuts it returns, ascending.
    """

    reused: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResultIndex:
    """The place of one of the model's outputs among a flat graph's results."""

    index: int


@dataclass(frozen=True, slots=True)
class Lifted:
    """How a flat graph's inputs and results relate to the model's.

    Attributes:
        weights: the names of the weights that its first inputs take.
        outputs: per output of the model its place among the results, or the constant that it is.
    """

    weights: tuple[str, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class InputSizes:
    """The sizes that a phase is compiled for.

    Attributes:
        values: symbol -> its size; empty: the graph has fixed shapes.
    """

    values: SizeBinding


@dataclass(frozen=True, slots=True)
class KernelMatch:
    """A part of a graph that a Triton kernel may compute.

    Attributes:
        kernel: the kernel's name.
        node: the name of the part's last node.
        shape: the shape by which gains are looked up.
        reason: why the part was left alone; None: it was lowered.
    """

    kernel: str
    node: str
    shape: tuple[int, ...]
    reason: str | None


@dataclass(frozen=True, slots=True)
class KernelMatches:
    """The parts that kernels may compute, in graph order."""

    all: tuple[KernelMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a phase that is compiled by itself.

    Attributes:
        graph: a flat graph.
        key: equal for blocks that may share code: what the graph computes, and the layouts of its
            inputs.
    """

    graph: GraphModule
    key: Hashable


@dataclass(frozen=True, slots=True)
class Blocks:
    """The distinct blocks that a phase calls, by the name of the submodule."""

    by_name: Mapping[str, Block]


class Facts:
    """The facts that are known of a graph: at most one of each type."""

    def __init__(self, facts: Iterable[object] = ()) -> None:
        self._facts = {type(fact): fact for fact in facts}

    def __getitem__(self, kind: type[T]) -> T:
        """Returns the fact of this type. Raises: KeyError naming it where there is none."""
        fact = self._facts[kind]
        assert isinstance(fact, kind)
        return fact

    def get(self, kind: type[T]) -> T | None:
        """Returns the fact of this type, or None."""
        return self[kind] if kind in self._facts else None

    def adding(self, fact: object) -> Facts:
        """Returns these facts and `fact`, which replaces that of its type."""
        return Facts((*self._facts.values(), fact))
