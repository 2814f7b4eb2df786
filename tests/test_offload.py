"""Slots in host memory: what is fetched where, and what is stashed."""

import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, Case, OneBranch
from phases import FakeTrajectory, inline, lift, specialize, store_all
from stages import (
    capture_call,
    compile_flat,
    facts_of,
    regions_of,
    run_graph,
    run_to,
    with_facts,
    with_hoisted,
)

from pabc.passes import (
    offload_cuts_pass,
)
from pabc.passes.guard_ops import cache_read, cache_write, fetch_cached, stash_unless
from pabc.passes.transfers import fetch, stash

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText")]
FACTORIZED = CASES[0]
CPU = torch.device("cpu")


def offload(case, captured, cache_dtype="keep"):
    """With the CPU as the accelerator: the ops then copy from it to itself."""
    gm = run_to(captured(case)[1], "encode", cache_dtype=cache_dtype)
    return with_facts(offload_cuts_pass(gm, accelerators=("cpu",)), facts_of(gm))


def test_on_a_cpu_the_graph_is_left_as_it_is(captured):
    gm = run_to(captured(FACTORIZED)[1], "encode")
    assert offload_cuts_pass(gm) is gm


def test_a_read_is_fetched_and_a_write_stashed(captured):
    gm = offload(FACTORIZED, captured)
    for node in gm.graph.nodes:
        if node.target is cache_read:
            (fetched,) = node.users
            assert fetched.target is fetch_cached and fetched.args == (node, (CPU,))
        if node.target is cache_write:
            assert not node.users and node.args[3].target is stash_unless


GUARDED = """
    graph(%trajectory, %x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %h = cache_read(%trajectory, 0)
        %f = fetch_cached(%h, (device('cpu'),))
        %c = forecast_cached(%f)
        %region = get_attr[full_0]
        %u = compute_unless(%c, %region, %x)
        %s = stash_unless(%c, (device('cpu'),), %u)
        %w = cache_write(%trajectory, 0, %c, %s)
        %v = getitem(%u, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return (%y,)
"""
REUSED = """
    graph(%x, %t, %kept):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %v = pabc.fetch(%kept, device('cpu'))
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return ((%y,), ())
"""
STORED = """
    graph(%x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %r = call_module[full_0](%x)
        %v = getitem(%r, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        %cut = getitem(%r, 0)
        %kept = pabc.stash(%cut)
        return ((%y,), (%kept,))
"""


def test_reads_are_fetched_and_writes_stashed_in_every_phase():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "encode", disable=("nest",))
    gm = with_facts(offload_cuts_pass(gm, accelerators=("cpu",)), facts_of(gm))
    assert_same_graph(gm, GUARDED)
    assert_same_graph(specialize(gm, reused=(0,)), REUSED)
    assert_same_graph(specialize(gm, stored=(0,)), STORED)


@pytest.mark.parametrize("cache_dtype", ["keep", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_equal_the_oracle_and_the_graph_without_offload(case: Case, cache_dtype, captured):
    gm, call = offload(case, captured, cache_dtype), case.call(step=1)
    plain = run_to(captured(case)[1], "encode", cache_dtype=cache_dtype)
    slots = range(len(regions_of(gm)))
    kept = store_all(gm, case.call(step=0))
    for reused in ((), (0,), tuple(slots[::2]), tuple(slots)):
        stored = [slot for slot in slots if slot not in reused]
        held = {slot: kept[slot] for slot in reused}
        oracle, other = FakeTrajectory(held), FakeTrajectory(held)
        phase = specialize(gm, reused=reused, stored=stored)
        phase.graph.lint()
        expected = run_graph(plain, call, other)
        assert torch.equal(run_graph(gm, call, oracle), expected)
        with torch.no_grad():
            inputs = [*with_hoisted(phase, call), *(t for slot in reused for t in kept[slot])]
            outputs, results = inline(phase)(*inputs)
        assert torch.equal(outputs[0], expected)
        for writes in (oracle.writes, other.writes):
            wanted = [t for slot in stored for t in writes[slot]]
            for a, b in zip(results, wanted, strict=True):
                a, b = a.contiguous(), b.contiguous()
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_phase_fetches_one_ahead_and_stashes_what_it_stores(captured):
    gm = offload(FACTORIZED, captured, "fp8")
    phase = specialize(gm, reused=(0, 3), stored=(1,))
    nodes = list(phase.graph.nodes)
    held = [n for n in nodes if n.op == "placeholder"][-4:]
    fetches = [n for n in nodes if n.target is fetch]
    following = [*held[1:], None]
    assert [n.args[0] for n in fetches] == held
    assert [(*n.args[2:], None)[0] for n in fetches] == following
    assert sum(n.target is stash for n in nodes) == 2
    called = [n for n in nodes if n.op == "call_module" and n.target == "spatial_0"]
    assert not called
    computed = next(n for n in nodes if n.op == "call_module" and n.target not in ("decode_0",))
    assert nodes.index(fetches[1]) < nodes.index(computed) < nodes.index(fetches[2])


def test_inductor_takes_the_ops(captured):
    gm = offload(FACTORIZED, captured, "bf16")
    kept, call = store_all(gm, FACTORIZED.call(step=0)), FACTORIZED.call(step=1)
    phase = specialize(gm, reused=(0, 1, 2), stored=(3, 4))
    flat, weights = lift(inline(phase))
    inputs = [*with_hoisted(phase, call), *(t for slot in range(3) for t in kept[slot])]
    with torch.no_grad():
        found = compile_flat(flat)(*weights, *inputs)
        expected = flat(*weights, *inputs)
    assert (found[0] - expected[0]).abs().max() <= 1e-5
    for result, other in zip(found[1:], expected[1:], strict=True):
        assert (result.dtype, result.stride()) == (other.dtype, other.stride())
        torch.testing.assert_close(result, other, rtol=2.0**-7, atol=1e-5)
