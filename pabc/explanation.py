"""What pabc found in a model, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from pabc.base.format import format_bytes
from pabc.budget import Fit
from pabc.communication import Communication
from pabc.passes import (
    Attention,
    FlopCounter,
    Region,
    fetch_cached,
)
from pabc.plan import Plan


@dataclass(frozen=True)
class RegionFacts:
    """One region as it is shown: `flops` of one call, `nbytes` of what its slot holds."""

    name: str
    kind: str
    path: str
    cuts: tuple[tuple[int, ...], ...]
    nbytes: int
    flops: int
    attentions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What was found; printed, it is a table.

    Attributes:
        attention: qualified module name of each attention -> its kind.
        linear: the names of those that are linear attention, Q (K^T V).
        regions: in execution order.
        flops: kind -> floating-point operations of one call; `"outside"`: everything else that is
            done at every call; `"prologue"`: what is done once a generation.
        outside: attentions that no region holds, and modules that the graph calls and that run as
            they are, each with the reason.
        assumed: what the graph takes for granted of data, read by the model's own Python code:
            other values get a capture of their own.
        compiled: what the model compiles itself: it is traced as written, so that its numerics are
            those of the backend here.
        inputs: the names of the graph's inputs; `latents` names the one that is denoised.
        plan: the plan, where there is a schedule.
        fit: how the plan came to keep within a memory budget, where there is one.
        offloaded: whether slots lie in host memory, and the model on a device.
        compile_seconds: spent on compiling phases so far.
        communication: what ranks send, where a model is divided among some.
        lowered: what Triton kernels compute, and what not and why, in the phases compiled so far.
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
    compile_seconds: float = 0.0
    lowered: tuple[str, ...] = ()
    communication: Communication | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together, were all of them held at once."""
        return sum(region.nbytes for region in self.regions)

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._region_lines(),
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
        held = {name for region in self.regions for name in (region.path,)}
        others = [
            f"  {name}: {kind}{', linear' * (name in self.linear)}, never reused"
            for name, kind in self.attention.items()
            if kind == "other" and name not in held
        ]
        header = ("region", "kind", "module", "cut", "bytes", "MFLOP")
        return [
            f"{len(self.attention)} attentions, {len(self.regions)} regions;"
            f" latents: {self.latents}",
            *_table(header, rows),
            *others,
            *(f"  outside: {line}" for line in self.outside),
            *(f"  assumed: {line}" for line in self.assumed),
            *(f"  compiled by the model, traced as written: {line}" for line in self.compiled),
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
            *(f"  kernels: {line}" for line in self.lowered),
        ]

    def _plan_lines(self) -> list[str]:
        if self.plan is None:
            return []
        missing = [
            f"  the schedule also asks for {what}: nothing matches" for what in self.unmatched
        ]
        peak = self.plan.peak_bytes
        place = ", in host memory" if self.offloaded else ""
        fit = [str(self.fit)] if self.fit is not None else []
        return [
            str(self.plan),
            f"  slots take {format_bytes(peak)} ({peak} bytes) at the fullest step, for each branch"
            f" of a generation{place}",
            *fit,
            *missing,
        ]


def describe(guarded: GraphModule, **facts: Any) -> Explanation:
    """Collects an :class:`Explanation` from a guarded graph; `facts` are passed on."""
    regions: tuple[Region, ...] = guarded.meta["regions"]
    attentions = find_attentions(guarded)
    count_flops = FlopCounter()
    flops = [count_flops(guarded.get_submodule(region.name)) for region in regions]
    per_kind: dict[str, int] = {}
    for region, count in zip(regions, flops, strict=True):
        per_kind[region.kind] = per_kind.get(region.kind, 0) + count
    per_kind["outside"] = count_flops(guarded)
    per_kind["prologue"] = count_flops(guarded.meta["prologue"])
    rows = tuple(
        RegionFacts(r.name, r.kind, r.path, r.shapes, r.nbytes, count, r.attentions)
        for r, count in zip(regions, flops, strict=True)
    )
    signature = guarded.meta["signature"]
    return Explanation(
        attention={a.name: a.kind for a in attentions},
        linear=tuple(a.name for a in attentions if a.linear),
        regions=rows,
        flops=per_kind,
        outside=guarded.meta["outside"] + _modules_outside(guarded),
        assumed=tuple(map(str, guarded.meta["reads"].entries)),
        compiled=guarded.meta.get("compiled", ()),
        inputs=signature.inputs,
        latents=guarded.meta["latents"],
        communication=Communication.of(guarded),
        offloaded=any(node.target is fetch_cached for node in guarded.graph.nodes),
        **facts,
    )


def _modules_outside(guarded: GraphModule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(str, guarded.meta["calls"])))


def find_attentions(guarded: GraphModule) -> list[Attention]:
    """Every tagged attention: in the prologue, in regions in execution order, then outside."""
    graphs = [guarded.get_submodule(region.name) for region in guarded.meta["regions"]]
    return guarded.meta["prologue"].meta["attentions"] + [
        node.meta["attention"]
        for gm in (*graphs, guarded)
        for node in gm.graph.nodes  # type: ignore[union-attr]
        if "attention" in node.meta
    ]


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
