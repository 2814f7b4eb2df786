"""Forecasts: weighted sums of what slots hold, in eager mode, in guarded graphs and in phases."""

import pytest
import torch
from graphs import assert_same_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Case, OneBranch
from phases import FakeTrajectory, inline, placeholders, specialize, store_all
from stages import apply, capture_call, facts_of, regions_of, run_to, with_facts, with_hoisted

from pabc.passes import Captured, PhaseSlots, Regions, Reused, encode_cuts_pass, forecast_cut
from pabc.passes.offload import offload_cuts_pass

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText", "Refined", "OneStream")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_sum_is_rounded_once(dtype, depth):
    torch.manual_seed(depth)
    values = [torch.randn(4, 5, dtype=dtype) for _ in range(depth)]
    weights = torch.tensor([1.75, -1.25, 0.5][:depth])
    wide = torch.promote_types(dtype, torch.float32)
    expected = sum(weights[i] * each.to(wide) for i, each in enumerate(values)).to(dtype)
    found = forecast_cut(values, weights)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_hold_is_the_newest_value_itself():
    values = [torch.randn(3), torch.randn(3)]
    assert forecast_cut(values, None) is values[0]
    assert torch.equal(forecast_cut(values, torch.tensor([1.0, 0.0])), values[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_has_no_sums_is_held(dtype):
    values = [torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)]
    assert forecast_cut(values, torch.tensor([2.0, -1.0])) is values[0]


def test_phase_slots_know_where_weights_begin():
    assert PhaseSlots((1, 4, 7), ()).depths == (0, 0, 0)
    assert PhaseSlots((1, 4, 7, 8), (), (2, 0, 3, 1)).first_weights == {1: 0, 7: 2, 8: 5}
    with pytest.raises(ValueError, match="expected one per slot"):
        PhaseSlots((1, 4), (), (2,))


def guard(case: Case, captured, cache_dtype="keep", *, offloads=False):
    gm = run_to(captured(case)[1], "cache")
    graph, regions = apply(encode_cuts_pass, gm, Captured, Regions, cache_dtype=cache_dtype)
    if offloads:  # with the CPU as the accelerator: the ops then copy from it to itself
        graph = offload_cuts_pass(graph, accelerators=("cpu",))
    return with_facts(graph, facts_of(gm).adding(regions))


FORMS = [("keep", False), ("bf16", False), ("fp8", False), ("keep", True), ("bf16", True)]


@pytest.mark.parametrize(("cache_dtype", "offloads"), FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_equal_the_oracle(case: Case, cache_dtype, offloads, captured):
    gm = guard(case, captured, cache_dtype, offloads=offloads)
    kept = [store_all(gm, case.call(step=step)) for step in (2, 1, 0)]
    slots, call = range(len(regions_of(gm))), case.call(step=3)
    torch.manual_seed(0)
    for reused in ((0,), tuple(slots[::2]), tuple(slots)):
        depths = tuple(slot % 4 for slot in reused)
        weights = torch.randn(sum(depths))
        rows = dict(zip(reused, weights.split(depths), strict=True))
        histories = {
            slot: Reused(
                tuple(step[slot] for step in kept[: max(depth, 1)]), row if depth else None
            )
            for (slot, row), depth in zip(rows.items(), depths, strict=True)
        }
        stored = [slot for slot in slots if slot not in reused]
        phase = specialize(gm, reused=reused, stored=stored, depths=depths)
        phase.graph.lint()
        values = [cut for slot in reused for cuts in histories[slot].history for cut in cuts]
        given_weights = [weights] if any(depths) else []
        oracle = FakeTrajectory(histories)
        with torch.no_grad():
            expected = gm(oracle, *with_hoisted(gm, call))
            for graph in (phase, inline(phase)):
                outputs, results = graph(*with_hoisted(phase, call), *given_weights, *values)
                assert torch.equal(outputs[0], expected[0]), reused
                wanted = [tensor for slot in stored for tensor in oracle.writes[slot]]
                for pair in zip(results, wanted, strict=True):
                    assert torch.equal(*(x.contiguous().view(torch.uint8) for x in pair))


FORECAST = """
    graph(%x, %t, %weights, %cut, %before1):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %w0 = select.int(%weights, 0, 0)
        %a = mul(%cut, %w0)
        %w1 = select.int(%weights, 0, 1)
        %b = mul(%before1, %w1)
        %v = add(%a, %b)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return ((%y,), ())
"""


def test_a_forecast_becomes_a_sum_of_inputs():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    phase = specialize(gm, reused=(0,), depths=(2,))
    assert placeholders(phase)[2:] == ["forecast_weights", "full_0_cut0", "full_0_cut0_before1"]
    assert_same_graph(phase, FORECAST)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=4))
def test_weights_of_zero_change_nothing(row):
    torch.manual_seed(1)
    values = [torch.randn(6) for _ in row]
    short = forecast_cut(values, torch.tensor(row))
    padded = forecast_cut([*values, values[-1], values[-1]], torch.tensor([*row, 0.0, 0.0]))
    assert torch.equal(short, padded)
