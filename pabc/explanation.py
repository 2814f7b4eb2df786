"""Describes what pabc found in a model, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pabc.base.format import format_bytes, format_table
from pabc.base.kinds import COARSE
from pabc.budget import Fit
from pabc.communication import Communication
from pabc.passes import Attention, FlopCounter, Guarded, fetch_cached
from pabc.plan import Plan
from pabc.stages import StageRecord


@dataclass(frozen=True)
class RegionFacts:
    """The description of a region.

    Attributes:
        name: the region's name.
        kind: its kind.
        path: the qualified name of its module.
        cuts: the shapes of the values that its slot holds.
        nbytes: the bytes that its slot holds.
        flops: the floating-point operations of one call.
        attentions: the names of the attentions in it.
    """

    name: str
    kind: str
    path: str
    cuts: tuple[tuple[int, ...], ...]
    nbytes: int
    flops: int
    attentions: tuple[str, ...] = ()


@dataclass(frozen=True)
class CoarseFacts:
    """The description of a region that contains others.

    Attributes:
        name: the region's name.
        kind: its kind: "block", "stack" or "model".
        path: the qualified name of the module that contains its branches, where there is one.
        branches: the kinds of the branches that it covers, in execution order.
        cuts: the shapes of the values that its slot holds.
        nbytes: the bytes that its slot holds.
        share: the share of a call's floating-point operations that its reuse saves.
    """

    name: str
    kind: str
    path: str
    branches: tuple[str, ...]
    cuts: tuple[tuple[int, ...], ...]
    nbytes: int
    share: float

    def __str__(self) -> str:
        cuts = " ".join(map(_format_shape, self.cuts))
        return f"{cuts}, {format_bytes(self.nbytes)}, saves {self.share:.1%} of a call"


@dataclass(frozen=True)
class Explanation:
    """The description of a model; `str()` of it is a table.

    Attributes:
        uncaptured: why nothing within the model was looked at; None: it was captured.
        attention: qualified module name of each attention -> its kind.
        linear: the names of the attentions that are linear, Q (K^T V).
        regions: the branches that can be reused, in execution order.
        coarse: the regions that contain these: blocks, the stack of all branches, the model.
        left_out: a message for each coarser region that cannot be reused, with the reason.
        flops: kind -> floating-point operations of one call. `"outside"`: those of each call that
            are in no region; `"prologue"`: those of values that are computed once per generation.
        outside: attentions that are in no region, and opaque modules, each with the reason.
        assumed: values of data that the graph is guarded on, as the model's Python code reads them;
            a call with other values gets a capture of its own.
        compiled: functions that the model compiles itself. They are traced as written, so that
            their numerics are those of pabc's backend.
        inputs: the names of the graph's inputs; `latents` names the denoised one.
        plan: the plan, if there is a schedule.
        fit: the choice of slots for the memory budget, if there is one.
        offloaded: True if the model is on a device and its slots are in host memory.
        unmatched: the kinds and overrides of the schedule that match no slot.
        compile_seconds: seconds spent on compiling phases so far.
        communication: the collectives of each rank, if the model is sharded.
        stages: the records of the compiler's stages, as far as they ran in this process.
        lowered: the ops that Triton kernels replace, and those that they do not, with the reason,
            in the phases compiled so far.
        plan_source: where the plan comes from; empty: not said.
    """

    attention: dict[str, str]
    regions: tuple[RegionFacts, ...]
    flops: dict[str, int]
    outside: tuple[str, ...]
    inputs: tuple[str, ...]
    latents: str
    assumed: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    plan: Plan | None = None
    fit: Fit | None = None
    offloaded: bool = False
    unmatched: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    coarse: tuple[CoarseFacts, ...] = ()
    left_out: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    lowered: tuple[str, ...] = ()
    communication: Communication | None = None
    stages: tuple[StageRecord, ...] = field(default=(), compare=False)
    uncaptured: str | None = None
    plan_source: str = ""

    @property
    def nbytes(self) -> int:
        """The sum of the bytes of all slots, whether or not a plan holds them all at once."""
        return sum(region.nbytes for region in self.regions)

    def __str__(self) -> str:
        if self.uncaptured is not None:
            return "\n".join(
                [
                    "the model is called as it is, and nothing within it is captured; "
                    f"{self.uncaptured}",
                    *self._plan_lines(),
                ]
            )
        return "\n".join(
            [
                *self._region_lines(),
                *self._coarse_lines(),
                *self._kind_lines(),
                *self._plan_lines(),
                *(self.communication.lines(self.plan) if self.communication else ()),
            ]
        )

    def _region_lines(self) -> list[str]:
        rows = [
            (r.name, self._kind_of(r), r.path, " ".join(map(_format_shape, r.cuts)))
            + (format_bytes(r.nbytes),)
            + (f"{r.flops / 1e6:.1f}",)
            for r in self.regions
        ]
        paths = {region.path for region in self.regions}
        others = [
            f"  {name}: {kind}{', linear' * (name in self.linear)}, never reused"
            for name, kind in self.attention.items()
            if kind == "other" and name not in paths
        ]
        header = ("region", "kind", "module", "cut", "bytes", "MFLOP")
        return [
            f"{len(self.attention)} attentions, {len(self.regions)} regions;"
            f" latents: {self.latents}",
            *format_table(header, rows),
            *others,
            *(f"  outside: {line}" for line in self.outside),
            *(f"  assumed: {line}" for line in self.assumed),
            *(f"  compiled by the model, traced as written: {line}" for line in self.compiled),
        ]

    def _coarse_lines(self) -> list[str]:
        groups: dict[tuple[str, tuple[str, ...]], list[CoarseFacts]] = {}
        for each in reversed(self.coarse):
            groups.setdefault((each.kind, each.branches), []).append(each)
        parts = []
        for (kind, branches), members in groups.items():
            if kind == "block":
                count, last = len(members), "" if len(branches) == 1 else "es"
                parts.append(
                    f"{count} block{'s' * (count > 1)} of {len(branches)} branch{last}"
                    f" ({', '.join(branches)})"
                )
            else:
                parts.append(kind)
        return [
            f"coarser regions: {', '.join(parts) or 'none'}",
            *(f"  {kind}: {members[-1]}" for (kind, _), members in groups.items()),
            *(f"  left out: {line}" for line in self.left_out),
        ]

    def _kind_of(self, region: RegionFacts) -> str:
        return (
            f"{region.kind}, linear" if set(region.attentions) & set(self.linear) else region.kind
        )

    def _kind_lines(self) -> list[str]:
        per_call = {kind: n for kind, n in self.flops.items() if kind != "prologue"}
        total = sum(per_call.values()) or 1
        parts = [f"{kind} {count / total:.1%}" for kind, count in per_call.items()]
        return [
            f"{total / 1e9:.3f} GFLOP a call: {', '.join(parts)};"
            f" {self.flops['prologue'] / 1e9:.3f} GFLOP once a generation",
            f"slots {format_bytes(self.nbytes)}",
            *self._stage_lines(),
            *(f"  kernels: {line}" for line in self.lowered),
        ]

    def _stage_lines(self) -> list[str]:
        """Returns a line that names the stages that may change bits, and those that do not."""
        if not self.stages:
            return []
        names: dict[bool, list[str]] = {False: [], True: []}
        for record in self.stages:
            if record.is_on:
                names[record.stage.changes_bits].append(record.name)
        changing = ", ".join(names[True]) or "none"
        return [f"  stages: {', '.join(names[False])} keep bits; may change them: {changing}"]

    def _plan_lines(self) -> list[str]:
        if self.plan is None:
            return []
        missing = [
            f"  the schedule also asks for {what}: nothing matches" for what in self.unmatched
        ]
        peak = self.plan.peak_bytes
        memory = ", in host memory" if self.offloaded else ""
        fit = [str(self.fit)] if self.fit is not None else []
        source = [f"plan: {self.plan_source}"] if self.plan_source else []
        return [
            *source,
            str(self.plan),
            f"  slots take {format_bytes(peak)} ({peak} bytes) at the fullest step, for each branch"
            f" of a generation{memory}",
            *fit,
            *missing,
        ]


def describe(guarded: Guarded, **facts: Any) -> Explanation:
    """Returns the :class:`Explanation` of a guarded graph; `facts` are further fields of it."""
    graph, captured = guarded.graph, guarded.captured
    regions = [region for region in guarded.regions if region.kind not in COARSE]
    attentions = find_attentions(guarded)
    count_flops = FlopCounter(captured.sizes)
    flops = count_flops.of_regions(guarded)
    per_kind: dict[str, int] = {}
    for region, count in zip(regions, flops, strict=False):
        per_kind[region.kind] = per_kind.get(region.kind, 0) + count
    per_kind["outside"] = count_flops(graph)
    total = sum(per_kind.values()) or 1
    per_kind["prologue"] = count_flops(guarded.prologue.graph)
    rows = tuple(
        RegionFacts(r.name, r.kind, r.path, r.shapes, r.nbytes, count, r.attentions)
        for r, count in zip(regions, flops, strict=False)
    )
    return Explanation(
        attention={a.name: a.kind for a in attentions},
        linear=tuple(a.name for a in attentions if a.linear),
        regions=rows,
        coarse=tuple(
            CoarseFacts(
                name=r.name,
                kind=r.kind,
                path=r.path,
                branches=tuple(regions[i].kind for i in r.covers if i < len(regions)),
                cuts=r.shapes,
                nbytes=r.nbytes,
                share=count / total,
            )
            for r, count in zip(guarded.regions, flops, strict=True)
            if r.kind in COARSE
        ),
        left_out=guarded.left_out,
        flops=per_kind,
        outside=(*guarded.marked.outside, *dict.fromkeys(map(str, captured.calls))),
        assumed=tuple(map(str, captured.reads.entries)),
        compiled=captured.compiled,
        inputs=captured.signature.inputs,
        latents=guarded.denoised.latents,
        communication=Communication.of(guarded),
        offloaded=any(node.target is fetch_cached for node in graph.graph.nodes),
        **facts,
    )


def find_attentions(guarded: Guarded) -> list[Attention]:
    """Returns the tagged attentions: of the prologue, of regions in execution order, of neither."""
    graphs = [guarded.graph.get_submodule(region.name) for region in guarded.regions]
    return [*guarded.prologue.attentions] + [
        node.meta["attention"]
        for gm in (*graphs, guarded.graph)
        for node in gm.graph.nodes  # type: ignore[union-attr]
        if "attention" in node.meta
    ]


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
