"""Regions that contain others, on models that nobody prepared: the stack, the blocks and the whole
model are found, and their reuse equals that of module hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from module_hooks import PartHooks
from phases import FakeTrajectory, specialize, store_all
from stages import capture_call, regions_of, run_to, with_hoisted
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import ENTRIES
from zoo.blocks import DEEPER, list_blocks, streams_of

from pabc.base.structure import flatten
from pabc.passes.guard_ops import cache_read

pytestmark = pytest.mark.zoo
TOLERANCE = 1e-5
NO_BLOCKS = {"BriaFibo2", "HunyuanVideo, first frame"}
"""Models that have one block of a kind."""
OTHER_MODULES = {
    "ConsisID": "what faces add stands between its blocks",
    "HunyuanDiT": "the later blocks begin with the projection of a skip",
}
"""Models whose blocks, as pabc finds them, are no modules."""


def build(entry, monkeypatch):
    """Returns a model of the zoo, with two blocks of a kind where the zoo has one, and a call."""
    if entry.name in DEEPER:
        name, more = DEEPER[entry.name]
        make = getattr(diffusers, name)
        monkeypatch.setattr(diffusers, name, lambda **given: make(**{**given, **more}))
    return entry.build()


def tensors(result: Any) -> list[Tensor]:
    parts = result.values() if isinstance(result, dict) else result
    return [x for x in tree_leaves(list(parts)) if isinstance(x, Tensor)]


def next_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call of the next step: other latents, another timestep."""
    generator = torch.Generator().manual_seed(5)
    found = dict(call)
    for name in ("hidden_states", "audio_hidden_states"):
        if name in call:
            found[name] = call[name] + 0.1 * torch.randn(call[name].shape, generator=generator)
    timestep = call.get("timestep")  # one of the models has none
    if timestep is not None:
        found["timestep"] = timestep * 0.9 if timestep.is_floating_point() else timestep - 1
    return found


def inputs(call: Mapping[str, Any]) -> dict[int, Any]:
    """Returns the inputs of a graph that is captured for such a call."""
    return dict(enumerate(flatten(((), dict(call)))[0]))


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


class Reuse:
    """Reuse of slots by the guarded graph, which must equal the phase that reuses them."""

    def __init__(self, model, call):
        self.gm = run_to(capture_call(model, call), "cache")
        self.regions = regions_of(self.gm)
        self.kept = store_all(self.gm, inputs(call))

    def slots(self, kind):
        return [i for i, region in enumerate(self.regions) if region.kind == kind]

    def run(self, call, slots):
        held = {slot: self.kept[slot] for slot in slots}
        phase = specialize(self.gm, reused=slots)
        called = {n.target for n in phase.graph.nodes if n.op == "call_module"}
        for slot in slots:
            assert called.isdisjoint(self.regions[i].name for i in self.regions[slot].covers)
        with torch.no_grad():
            found = tensors(self.gm(FakeTrajectory(held), *with_hoisted(self.gm, inputs(call))))
            cuts = [cut for slot in sorted(slots) for cut in self.kept[slot]]
            outputs, _ = phase(*with_hoisted(phase, inputs(call)), *cuts)
        assert all(map(torch.equal, found, tensors(outputs)))
        return found


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_coarser_regions_of_the_zoo(entry, add_row, monkeypatch):
    model, call = build(entry, monkeypatch)
    later = next_call(call)
    with torch.no_grad():
        plain, changed = tensors(model(**call)), tensors(model(**later))
    reuse = Reuse(model, call)
    assert all(map(torch.equal, reuse.run(call, []), plain))
    assert reuse.slots("stack") and reuse.slots("model")
    assert bool(reuse.slots("block")) == (entry.name not in NO_BLOCKS)

    found = reuse.run(later, reuse.slots("model"))
    assert all(map(torch.equal, found, plain)) and not torch.equal(found[0], changed[0])
    blocks, streams = list_blocks(entry, model), streams_of(entry)
    everything = [[module for block in blocks for module in block]]
    errors = {"stack": compare(reuse, model, everything, streams, call, later, "stack")}
    if reuse.slots("block") and entry.name not in OTHER_MODULES:
        errors["block"] = compare(reuse, model, blocks, streams, call, later, "block")
    assert max(errors.values()) <= TOLERANCE
    stack = reuse.regions[reuse.slots("stack")[0]]
    kinds = [[reuse.regions[i].kind for i in reuse.regions[s].covers] for s in reuse.slots("block")]
    units = [", ".join(kind for kind in unit) for unit in kinds]
    add_row(
        "coarser regions of the zoo",
        model=entry.name,
        stack=" ".join("x".join(map(str, shape)) for shape in stack.shapes),
        error=f"{errors['stack']:.1e}",
        blocks="; ".join(f"{units.count(u)} of ({u})" for u in dict.fromkeys(units)) or "none",
        error_of_blocks=f"{errors['block']:.1e}" if "block" in errors else "-",
    )


def compare(reuse, model, parts, streams, call, later, kind):
    """Returns the largest error against hooks: of each region of a kind, and of all together."""
    slots = reuse.slots(kind)
    parts_of = dict(zip(slots, range(len(parts) - len(slots), len(parts)), strict=True))
    hooks = PartHooks(model, parts, streams)
    try:
        kept = hooks.compute(call)
        groups = [[slot] for slot in slots] + [slots]
        expected = [
            tensors(hooks.reuse(later, {parts_of[slot]: kept[parts_of[slot]] for slot in group}))
            for group in groups
        ]
    finally:
        hooks.close()
    return max(error(reuse.run(later, g), e) for g, e in zip(groups, expected, strict=True))


def test_the_guarded_graph_reads_each_slot_once():
    entry = next(entry for entry in ENTRIES if entry.name == "SD3")
    model, call = entry.build()
    gm = run_to(capture_call(model, call), "cache")
    reads = [n.args[1] for n in gm.graph.nodes if n.target is cache_read]
    assert sorted(reads) == list(range(len(regions_of(gm))))
