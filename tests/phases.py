"""Phases of a guarded graph: specialized, inlined, lifted; and the cuts that they reuse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from stages import facts_of, with_facts, with_hoisted
from torch import Tensor
from torch.fx import GraphModule

from pabc.passes import (
    PhaseSlots,
    Regions,
    Reused,
    inline_regions_pass,
    lift_weights_pass,
    specialize_phase_pass,
)
from pabc.passes.ir import attribute


def specialize(
    gm: GraphModule,
    *,
    reused: Iterable[int] = (),
    stored: Iterable[int] = (),
    depths: tuple[int, ...] = (),
) -> GraphModule:
    """Returns the phase of a guarded graph that reuses and stores these slots."""
    slots = PhaseSlots(tuple(sorted(reused)), tuple(sorted(stored)), depths)
    phase = specialize_phase_pass(gm, facts_of(gm)[Regions], slots)
    return with_facts(phase, facts_of(gm).adding(slots))


def inline(phase: GraphModule) -> GraphModule:
    """Returns a phase without calls of its regions."""
    regions = facts_of(phase).get(Regions) or Regions(())
    return with_facts(inline_regions_pass(phase, regions), facts_of(phase))


def lift(gm: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Returns a graph that takes its weights as its first inputs, and these weights."""
    graph, lifted = lift_weights_pass(gm)
    facts = facts_of(gm).adding(lifted)
    return with_facts(graph, facts), [attribute(gm, name) for name in lifted.weights]


class FakeTrajectory:
    """A trajectory that returns given cuts, or what a step reuses, and records which slots are read
    and written."""

    def __init__(self, values=()):
        self.values = dict(values)
        self.reads, self.writes = [], {}

    def read(self, slot):
        self.reads.append(slot)
        found = self.values.get(slot)
        return found if found is None or isinstance(found, Reused) else Reused((found,))

    def write(self, slot, cuts):
        assert slot not in self.writes
        self.writes[slot] = cuts


def store_all(gm, call):
    """Returns the cuts that a step without reuse writes to each slot."""
    trajectory = FakeTrajectory()
    with torch.no_grad():
        gm(trajectory, *with_hoisted(gm, call))
    return trajectory.writes


def placeholders(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
