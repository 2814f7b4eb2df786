import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, Case, OneBranch
from phases import FakeTrajectory
from stages import capture_call, facts_of, regions_of, run_graph, run_to
from torch import nn

import pabc
from pabc.passes import (
    Regions,
    cache_read,
    cache_write,
    compute_unless,
    forecast_cached,
    verify_cache,
)

FACTORIZED = next(case for case in MODELS if case.name == "Factorized")
JOINT = next(case for case in MODELS if case.name == "JointText")


def run(gm, trajectory, call):
    return run_graph(gm, call, trajectory)


def test_a_region_becomes_a_read_a_guarded_call_and_a_write(captured):
    gm = run_to(captured(FACTORIZED)[1], "cache")
    regions = regions_of(gm)
    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    first = next(iter(gm.graph.nodes))
    assert (first.op, first.target) == ("placeholder", "trajectory")
    for slot, region in enumerate(regions):
        (write,) = (n for n in gm.graph.nodes if n.target is cache_write and n.args[1] == slot)
        trajectory, _, cached, computed = write.args
        assert trajectory is first
        assert cached.target is forecast_cached
        (held,) = cached.args
        assert held.target is cache_read and held.args == (first, slot)
        assert computed.target is compute_unless and computed.args[0] is cached
        assert computed.args[1].target == region.name


def test_a_call_is_guarded():
    assert_same_graph(
        run_to(capture_call(OneBranch(), OneBranch.call()), "cache", disable=("nest",)),
        """
        graph(%trajectory, %x, %t):
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %h = cache_read(%trajectory, 0)
            %c = forecast_cached(%h)
            %region = get_attr[full_0]
            %u = compute_unless(%c, %region, %x)
            %r = cache_write(%trajectory, 0, %c, %u)
            %v = getitem(%r, 0)
            %g = mul(%gate, %v)
            %y = add(%x, %g)
            return (%y,)

        full_0(%x):
            %w = get_attr[project.weight]
            %h = linear(%x, %w)
            %o = scaled_dot_product_attention(%h, %h, %h)
            %w_out = get_attr[out.weight]
            %p = linear(%o, %w_out)
            return (%p,)
        """,
    )


@pytest.mark.parametrize("case", [FACTORIZED, JOINT], ids=str)
def test_a_trajectory_that_never_reuses_gives_the_models_bits(case: Case, captured):
    model, gm = captured(case)
    gm = run_to(gm, "cache")
    trajectory, call = FakeTrajectory(), case.call(step=1)
    with torch.no_grad():
        assert torch.equal(run(gm, trajectory, call), model(**call))
    slots = list(range(len(regions_of(gm))))
    assert trajectory.reads == slots and list(trajectory.writes) == slots
    for region, cuts in zip(regions_of(gm), trajectory.writes.values(), strict=True):
        assert tuple(tuple(cut.shape) for cut in cuts) == region.shapes
        assert tuple(cut.dtype for cut in cuts) == region.dtypes


def test_a_reused_region_is_not_run_nor_written(captured, monkeypatch):
    gm = run_to(captured(FACTORIZED)[1], "cache")
    call = FACTORIZED.call()
    filled = FakeTrajectory()
    full = run(gm, filled, call)
    body = gm.get_submodule(regions_of(gm)[1].name)
    reusing = FakeTrajectory({1: tuple(cut + 1 for cut in filled.writes[1])})

    def refuse(*_):
        raise AssertionError("a reused region was run")

    monkeypatch.setattr(type(body), "forward", refuse)
    changed = run(gm, reusing, call)
    assert not torch.equal(changed, full)
    assert 1 not in reusing.writes and set(reusing.writes) == set(filled.writes) - {1}


def test_a_graph_without_regions_only_gains_an_input():
    gm = capture_call(nn.Linear(3, 3), {"input": torch.randn(2, 4, 3)})
    gm = run_to(gm, "cache", disable=("nest",))
    names = [node.target for node in gm.graph.nodes if node.op == "placeholder"]
    assert names == ["trajectory", "input"]
    assert not any(n.target in (cache_read, cache_write) for n in gm.graph.nodes)


def test_verify_catches_a_region_without_a_write(captured):
    gm = run_to(captured(FACTORIZED)[1], "cache")
    verify_cache(gm, facts_of(gm)[Regions])
    write = next(n for n in gm.graph.nodes if n.target is cache_write)
    write.replace_all_uses_with(write.args[3])
    gm.graph.erase_node(write)
    with pytest.raises(AssertionError, match="cache_write"):
        verify_cache(gm, facts_of(gm)[Regions])


class ReturnsAConstant(OneBranch):
    def forward(self, x, t):
        return super().forward(x, t), torch.tensor(3.0)


@pytest.mark.parametrize("reused", [(), ("full",), ("model",)])
def test_callers_may_write_to_a_constant_that_is_returned(reused):
    model, call = ReturnsAConstant().eval(), OneBranch.call()
    schedule = pabc.Schedule.from_masks((3, 2, 1), dict.fromkeys(reused, (False, True, False)))
    fast = pabc.compile(model, schedule, backend="eager")
    for _ in range(3):
        with torch.no_grad():
            constant = fast(**call)[1]
        assert constant == 3
        constant.fill_(7)
