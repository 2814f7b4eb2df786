"""facts: frozen dataclasses that passes exchange about a whole graph.

A pass takes the facts that it needs as arguments and returns the graph and
the facts that it finds. Facts about one node lie in ``node.meta`` (see :mod:`pabc.passes.ir`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
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
    """The mapping between the graph's flat inputs and outputs and the model's arguments and result.

    Attributes:
        in_spec: the structure of the model's arguments.
        out_spec: the structure of the model's result.
        inputs: the names of the graph's inputs, one per flattened argument.
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
        lifted: positions, among the flattened arguments, of the numbers to lift to inputs.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    opaque: Mapping[str, str] = field(default_factory=dict)
    lifted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The facts about the model's forward that capture found.

    Attributes:
        signature: the mapping to the model's own arguments and result.
        reads: the values read from tensor data that the graph is specialized on.
        modules: the Python state of the model that the graph is specialized on.
        calls: one entry per call of an opaque module or hook.
        aliases: the other names under which the model's modules share a tensor, by its name.
        writes: positions of the inputs that the forward writes to; their new values follow the
            outputs.
        deleted: paths, within the arguments, of the entries that the forward deletes.
        written: Python state that the forward writes and never reads.
        compiled: functions and modules that the model compiles itself; they are traced uncompiled.
        sizes: the sizes for which a graph with dynamic shapes is valid; None: a graph with fixed
            shapes, those of the captured call.
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
    """The inputs that are denoised.

    Attributes:
        latents: the name of the latents, the first denoised input.
        streams: name of each denoised input -> name of the input whose axes it has: itself, or the
            first sample of the list that it is in.
    """

    latents: str
    streams: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Enlarged:
    """The graph of a larger call, which shows where token axes of one position lie.

    Attributes:
        graph: the graph, with axes; None: no kind depends on such an axis, or the model accepts no
            larger call.
        denoised: the denoised inputs of that graph.
    """

    graph: GraphModule | None = None
    denoised: Denoised | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """The softmaxes that the search for attention could not place.

    Attributes:
        unclaimed: a message for each softmax over tokens that is part of no attention.
    """

    unclaimed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Marked:
    """The residual branches whose nodes are marked as regions.

    Attributes:
        branches: the kind and the names of the attentions of each region, by ordinal.
        outside: a message for each attention that is in no region, with the reason.
    """

    branches: tuple[tuple[str, tuple[str, ...]], ...]
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardedAxis:
    """A sharded axis of the latents.

    Attributes:
        axis: the axis.
        ranks: the number of ranks that share the axis.
        gathered: the regions that every rank computes whole, since an op in them has no shard rule.
    """

    axis: Axis
    ranks: int
    gathered: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shards:
    """The sharding of a graph.

    Attributes:
        axes: the sharded axes, the outermost first; empty: nothing is sharded.
        digest: SHA-256, as hex, of the unsharded graph and of its sharding; equal on all ranks.
    """

    axes: tuple[ShardedAxis, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True)
class PrologueGraph:
    """The prologue, which runs once per generation.

    Attributes:
        graph: the model's inputs -> the hoisted values, the last inputs of the main graph.
        steady: positions of the inputs whose values it reads, which do not change during a
            generation.
        attentions: the attentions in the prologue.
    """

    graph: GraphModule
    steady: tuple[int, ...] = ()
    attentions: tuple[Attention, ...] = ()


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions that can be reused; region i is slot i of a plan.

    Attributes:
        all: the outlined branches in execution order, then those of kind "block" in execution
            order, then the one of kind "stack", then that of kind "model".
        left_out: a message for each coarser region that cannot be reused, with the reason.
    """

    all: tuple[Region, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """The guarded graph with all facts about it, from which every backend starts.

    Attributes:
        graph: the guarded graph. Its inputs are the state of a step, the model's flattened
            arguments, and the hoisted values.
        captured: the facts that capture found.
        denoised: the denoised inputs.
        marked: the residual branches, and the attentions that are in no region.
        shards: the sharding of the graph.
        prologue: the part that runs once per generation.
        regions: the regions, in the order of :class:`Regions`; region i is slot i of a plan.
        left_out: a message for each coarser region that cannot be reused, with the reason.
    """

    graph: GraphModule
    captured: Captured
    denoised: Denoised
    marked: Marked
    shards: Shards
    prologue: PrologueGraph
    regions: tuple[Region, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PhaseSlots:
    """The slots that a phase reuses and stores.

    Attributes:
        reused: the slots that the phase reuses, ascending; they are the last inputs of its graph.
        stored: the slots whose new contents the phase returns, ascending.
        depths: for each reused slot, of how many steps its values are added up; 0: the newest is
            held. By default, all are held.
    """

    reused: tuple[int, ...]
    stored: tuple[int, ...]
    depths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        depths = self.depths or (0,) * len(self.reused)
        if len(depths) != len(self.reused):
            raise ValueError(f"depths: expected one per slot of {self.reused}, found {depths}")
        object.__setattr__(self, "depths", depths)

    @property
    def first_weights(self) -> dict[int, int]:
        """The position of the first weight of each slot that is forecast."""
        starts = accumulate(self.depths, initial=0)
        return {s: at for s, at, k in zip(self.reused, starts, self.depths, strict=False) if k}


@dataclass(frozen=True, slots=True)
class ResultIndex:
    """The position of one of the model's outputs among a flat graph's results."""

    index: int


@dataclass(frozen=True, slots=True)
class Lifted:
    """The mapping between a flat graph's inputs and results and the model's weights and outputs.

    Attributes:
        weights: the names of the weights, which are the first inputs.
        outputs: for each output of the model, its position among the results (a
            :class:`ResultIndex`), or its value if it is a constant.
    """

    weights: tuple[str, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class InputSizes:
    """The sizes that a phase is compiled for.

    Attributes:
        values: symbol -> size; empty: the graph has fixed shapes.
    """

    values: SizeBinding


@dataclass(frozen=True, slots=True)
class KernelMatch:
    """A part of a graph that a Triton kernel may compute.

    Attributes:
        kernel: the kernel's name.
        node: the name of the part's last node.
        shape: the shape by which measured gains are looked up.
        reason: the reason why the part was not lowered; None: it was lowered.
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
    """A part of a phase that is compiled separately.

    Attributes:
        graph: a flat graph.
        key: the computation of the graph and the layouts of its inputs; blocks with equal keys
            share code.
    """

    graph: GraphModule
    key: Hashable


@dataclass(frozen=True, slots=True)
class Blocks:
    """The distinct blocks that a phase calls, by the names of their submodules."""

    by_name: Mapping[str, Block]


class Facts:
    """The known facts about a graph, at most one of each type."""

    def __init__(self, facts: Iterable[object] = ()) -> None:
        self._facts = {type(fact): fact for fact in facts}

    def __getitem__(self, kind: type[T]) -> T:
        """Returns the fact of this type. Raises: KeyError that names the type if there is none."""
        fact = self._facts[kind]
        assert isinstance(fact, kind)
        return fact

    def get(self, kind: type[T]) -> T | None:
        """Returns the fact of this type, or None."""
        return self[kind] if kind in self._facts else None

    def adding(self, fact: object) -> Facts:
        """Returns these facts with `fact` added; it replaces one of its type."""
        return Facts((*self._facts.values(), fact))
