"""Outlining: each region one call, in the order that they run; no bit changes."""

import pytest
import torch
from graphs import assert_same_graph
from models import CASES, MODELS, Case, OneBranch
from stages import apply, capture_call, facts_of, regions_of, run_graph, run_to
from torch import nn

from pabc.passes import Attention, Marked, Regions, verify_outline

BY_NAME = {case.name: case for case in CASES}


def outline(name, captured, **config):
    return run_to(captured(BY_NAME[name])[1], "outline", **config)


@pytest.mark.parametrize(
    ("case", "cut"), [(case, cut) for case in MODELS for cut in ("attention", "branch")], ids=str
)
def test_outlining_keeps_bits(case: Case, cut, captured):
    model, gm = captured(case)
    call = case.call(step=1)
    with torch.no_grad():
        assert torch.equal(run_graph(run_to(gm, "outline", cut=cut), call), model(**call))


def test_a_region_becomes_one_call():
    assert_same_graph(
        run_to(capture_call(OneBranch(), OneBranch.call()), "outline"),
        """
        graph(%x, %t):
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %r = call_module[full_0](%x)
            %c = getitem(%r, 0)
            %g = mul(%gate, %c)
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


def test_regions_are_listed_as_they_run(captured):
    gm = outline("Factorized", captured)
    names = ["spatial_0", "cross_0", "mlp_0", "temporal_0", "mlp_1"]
    assert [region.name for region in regions_of(gm)] == names
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == names
    assert regions_of(gm)[3].path == "temporal.0.0.attn"
    assert facts_of(gm)[Marked].outside == ()


def test_a_model_without_branches_has_no_region():
    model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))
    gm = run_to(capture_call(model, {"input": torch.randn(2, 4, 3)}), "outline")
    assert regions_of(gm) == ()
    assert not any(n.op == "call_module" for n in gm.graph.nodes)


def test_verify_catches_an_attention_left_alive(captured):
    gm = outline("Branch", captured)
    apply(verify_outline, gm, Regions)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["attention"] = Attention(regions_of(gm)[0].attentions[0], "full", "", (), ())
    with pytest.raises(AssertionError, match="alive outside its region"):
        apply(verify_outline, gm, Regions)
