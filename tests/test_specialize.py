import itertools

import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, STYLES, Case, OneBranch
from phases import FakeTrajectory, placeholders, specialize, store_all
from stages import capture_call, facts_of, prologue_of, regions_of, run_to, with_hoisted

from pabc.base.kinds import COARSE
from pabc.passes import PhaseSlots, Regions, tagged, verify_phase
from pabc.passes.ir import Reach, aten, output_node, user_inputs

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText", "Refined", "OneStream")]
FACTORIZED = CASES[0]


def guard(case, captured):
    return run_to(captured(case)[1], "cache")


def attentions(gm):
    """The kinds of all attention that a phase runs, called regions included."""
    called = [gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    return [n.meta["attention"].kind for graph in (gm, *called) for n in tagged(graph)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_equal_the_oracle(case: Case, captured):
    gm = guard(case, captured)
    slots = range(len(regions_of(gm)))
    kept, call = store_all(gm, case.call(step=0)), case.call(step=1)
    subsets = [s for n in (0, 1, 2, len(slots)) for s in itertools.combinations(slots, n)]
    for reused in subsets[::2]:
        stored = [slot for slot in slots if slot not in reused][::2]
        oracle = FakeTrajectory({slot: kept[slot] for slot in reused})
        phase = specialize(gm, reused=reused, stored=stored)
        phase.graph.lint()
        verify_phase(phase, facts_of(phase)[Regions], facts_of(phase)[PhaseSlots])
        cuts = [cut for slot in sorted(reused) for cut in kept[slot]]
        with torch.no_grad():
            expected = gm(oracle, *with_hoisted(gm, call))
            outputs, results = phase(*with_hoisted(phase, call), *cuts)
        assert torch.equal(outputs[0], expected[0]), reused
        wanted = [cut for slot in stored for cut in oracle.writes[slot]]
        assert len(results) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


REUSED = """
    graph(%x, %t, %cut):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %g = mul(%gate, %cut)
        %y = add(%x, %g)
        return ((%y,), ())
"""
COMPUTED = """
    graph(%x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %r = call_module[full_0](%x)
        %v = getitem(%r, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return ((%y,), ())
"""
STORED = COMPUTED.replace(
    "return ((%y,), ())", "%cut = getitem(%r, 0)\n        return ((%y,), (%cut,))"
)


@pytest.mark.parametrize(
    ("reused", "stored", "expected"),
    [((0,), (), REUSED), ((), (), COMPUTED), ((), (0,), STORED)],
    ids=["reused", "computed", "stored"],
)
def test_a_guard_becomes_an_input_or_a_call(reused, stored, expected):
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    assert_same_graph(specialize(gm, reused=reused, stored=stored), expected)


def test_a_norm_that_two_shares_read_runs_unless_both_are_reused(captured):
    (case,) = (c for c in STYLES if c.name == "SharedProjection")
    gm = guard(case, captured)
    assert [r.kind for r in regions_of(gm)][:5] == ["full", "mlp", "mlp", "full", "mlp"]
    for reused, norms in (((0,), 2), ((1,), 2), ((0, 1), 1), ((0, 1, 3, 4), 0)):
        phase = specialize(gm, reused=(*reused, 2), stored=())
        called = [phase.get_submodule(n.target) for n in phase.graph.nodes if "module" in n.op]
        nodes = [n for graph in (phase, *called) for n in graph.graph.nodes]
        assert sum(n.target is aten.layer_norm.default for n in nodes) == norms


def test_reused_cuts_are_inputs_in_slot_order(captured):
    gm = guard(FACTORIZED, captured)
    phase = specialize(gm, reused=(3, 0), stored=(1,))
    names = placeholders(phase)
    assert names[:3] == ["x_bcthw", "t_b", "text_bld"]
    assert names[-2:] == ["spatial_0_cut0", "temporal_0_cut0"]
    assert all(name.startswith("hoisted_") for name in names[3:-2])
    called = [n.target for n in phase.graph.nodes if n.op == "call_module"]
    assert called == ["cross_0", "mlp_0", "mlp_1"]


def test_a_region_with_two_cuts_has_two_inputs(captured):
    gm = guard(next(c for c in CASES if c.name == "JointText"), captured)
    phase = specialize(gm, reused=(0,), stored=())
    assert placeholders(phase)[-2:] == ["joint_0_cut0", "joint_0_cut1"]
    assert attentions(phase) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_attention_of_a_reused_kind_is_left(case: Case, captured):
    gm = guard(case, captured)
    regions = regions_of(gm)
    for kind in {region.kind for region in regions} - {"mlp", *COARSE}:
        reused = [slot for slot, region in enumerate(regions) if region.kind == kind]
        left = attentions(specialize(gm, reused=reused, stored=()))
        assert kind not in left
        others = [k for k in case.kinds if k not in (kind, "other")]
        assert [k for k in left if k != "other"] == others


def test_what_only_reused_regions_needed_is_gone(captured):
    """With all reused, modulation tables of attention and MLP are gone but for the gates."""
    gm = guard(FACTORIZED, captured)
    slots = range(len(regions_of(gm)))
    phase = specialize(gm, reused=slots, stored=())
    assert not any(n.op == "call_module" for n in phase.graph.nodes)
    read = {str(n.target) for n in phase.graph.nodes if n.op == "get_attr"}
    assert not any(".to_q." in name or ".mlp." in name for name in read)
    hoisted = [n for n in phase.graph.nodes if str(n.target).startswith("hoisted_")]
    prologue = prologue_of(gm).graph
    reach, condition = Reach(prologue), user_inputs(prologue)[-1]
    follows = [reach.depends(result, condition) for result in output_node(prologue).args[0]]
    assert any(follows)
    for node, is_condition in zip(hoisted, follows, strict=True):
        assert not (is_condition and node.users), "it is only read by cross attention"


def test_nothing_reused_and_nothing_stored_is_the_model(captured):
    model, _ = captured(FACTORIZED)
    phase = specialize(guard(FACTORIZED, captured), reused=(), stored=())
    call = FACTORIZED.call(step=2)
    with torch.no_grad():
        outputs, kept = phase(*with_hoisted(phase, call))
        assert torch.equal(outputs[0], model(**call))
    assert kept == ()


def test_the_guarded_graph_is_left_as_it_was(captured):
    gm = guard(FACTORIZED, captured)
    before = str(gm.graph)
    specialize(gm, reused=(0, 1), stored=(2,))
    assert str(gm.graph) == before


def test_slots_both_reused_and_stored_are_refused(captured):
    gm = guard(FACTORIZED, captured)
    with pytest.raises(ValueError, match=r"slots: expected none .* reused and stored, found \[1\]"):
        specialize(gm, reused=(0, 1), stored=(1, 2))


def test_verify_catches_a_reused_region_that_is_called(captured):
    phase = specialize(guard(FACTORIZED, captured), reused=(), stored=())
    with pytest.raises(AssertionError, match="spatial_0 is reused and still called"):
        verify_phase(phase, facts_of(phase)[Regions], PhaseSlots((0,), ()))
