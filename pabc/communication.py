"""Predicts what processes that share a model send: collectives, bytes, at which steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pabc.base.format import format_bytes
from pabc.passes import (
    Collective,
    Guarded,
    ShardedAxis,
    find_collective,
    find_collectives,
    find_skipped,
)
from pabc.plan import Plan


@dataclass(frozen=True)
class Communication:
    """The collectives of each rank, as :class:`pabc.Explanation` prints them.

    Nothing is sent before the first step: hoisted values do not depend on the latents, and every
    rank computes them.

    Attributes:
        sharded: the sharded axes, outermost first.
        kinds: of each region, in the order of a program's regions.
        regions: the collectives of each, which a step that reuses it does not make.
        outside: the collectives outside of branches.
        covers: of each of these, the regions where whose reuse it is not made.
        gathered: names of the regions whose attention every rank computes unsharded.
    """

    sharded: tuple[ShardedAxis, ...]
    kinds: tuple[str, ...]
    regions: tuple[tuple[Collective, ...], ...]
    outside: tuple[Collective, ...]
    gathered: tuple[str, ...] = ()
    covers: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, guarded: Guarded) -> Communication | None:
        """Returns what a guarded graph sends, or None if it is not sharded."""
        sharded, regions = guarded.shards.axes, guarded.regions
        if not sharded:
            return None
        graphs = [guarded.graph.get_submodule(region.name) for region in regions]
        graph = guarded.graph.graph
        coarse = [i for i, region in enumerate(regions) if region.covers]
        skipped = find_skipped(graph, coarse)
        outside = [(n, found) for n in graph.nodes if (found := find_collective(n)) is not None]
        gathered = sorted({i for each in sharded for i in each.gathered})
        return cls(
            sharded=sharded,
            kinds=tuple(region.kind for region in regions),
            regions=tuple(find_collectives(gm.graph) for gm in graphs),  # type: ignore[arg-type]
            outside=tuple(found for _, found in outside),
            covers=tuple(
                tuple(slot for slot, nodes in skipped.items() if node in nodes)
                for node, _ in outside
            ),
            gathered=tuple(regions[i].name for i in gathered),
        )

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return int(np.prod([each.ranks for each in self.sharded]))

    @property
    def per_call(self) -> tuple[Collective, ...]:
        """The collectives of a step that reuses nothing."""
        return (*(each for region in self.regions for each in region), *self.outside)

    def bytes_at(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Returns the bytes that a rank sends at each step, int64 [num_steps]."""
        return self._at(plan, lambda each: each.nbytes)

    def calls_at(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Returns the number of collectives of each step, int64 [num_steps]."""
        return self._at(plan, lambda each: 1)

    def _at(self, plan: Plan, count: Callable[[Collective], int]) -> npt.NDArray[np.int64]:
        """Returns the sums over what is sent at each step.

        A plan may have no slot for a coarse region, whose parts send in its place.
        """
        columns = {self._find_region(slot.kind, slot.layer): j for j, slot in enumerate(plan.slots)}
        each = [sum(map(count, self.regions[region])) for region in columns]
        total = plan.computed.astype(np.int64) @ np.array(each, dtype=np.int64)
        for collective, covers in zip(self.outside, self.covers, strict=True):
            reused = plan.reuse[:, [columns[region] for region in covers if region in columns]]
            total[~reused.any(axis=1)] += count(collective)
        return total

    def _find_region(self, kind: str, layer: int) -> int:
        """Returns the index of a region: the `layer`-th of its kind."""
        return [i for i, each in enumerate(self.kinds) if each == kind][layer]

    def lines(self, plan: Plan | None) -> list[str]:
        """Returns the lines that :class:`pabc.Explanation` prints."""
        axes = ", ".join(f"{each.axis} among {each.ranks}" for each in self.sharded)
        every = self.per_call
        return [
            f"ranks: {self.ranks}, {axes}; each sends {_format(len(every), _bytes(every))} at a"
            " step that computes everything:",
            *(f"  {row}" for row in self._rows()),
            *(f"  {name}: no rule for its ops; every rank computes it" for name in self.gathered),
            *self._plan_lines(plan),
        ]

    def _rows(self) -> list[str]:
        rows = []
        for kind in dict.fromkeys(self.kinds):
            sent = [c for k, region in zip(self.kinds, self.regions, strict=True) for c in region
                    if k == kind]  # fmt: skip
            rows.append(f"{kind}: {_describe(sent)}")
        return [*rows, f"outside of regions: {_describe(self.outside)}"]

    def _plan_lines(self, plan: Plan | None) -> list[str]:
        if plan is None:
            return []
        calls, sent = self.calls_at(plan), self.bytes_at(plan)
        without = _bytes(self.per_call) * plan.num_steps
        num = len(self.per_call) * plan.num_steps
        total = int(sent.sum())
        ratio = f", {total / without:.2f} of it" if without else ""
        per_phase = "; ".join(
            f"{phase.index}: {_format(int(calls[phase.steps[0]]), int(sent[phase.steps[0]]))}"
            for phase in plan.phases
        )
        return [
            f"  a step of each phase: {per_phase}",
            f"  a generation: {_format(num, without)} without reuse,"
            f" {_format(int(calls.sum()), total)} with{ratio}",
        ]


def _bytes(collectives: Sequence[Collective]) -> int:
    return sum(each.nbytes for each in collectives)


def _describe(collectives: Sequence[Collective]) -> str:
    ops = dict.fromkeys(each.op for each in collectives)
    by_op = [[each for each in collectives if each.op == op] for op in ops]
    return "; ".join(f"{e[0].op} {_format(len(e), _bytes(e))}" for e in by_op) or "nothing"


def _format(count: int, nbytes: int) -> str:
    return f"{count} x, {format_bytes(nbytes)} ({nbytes} bytes)"
