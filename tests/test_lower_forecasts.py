"""Lowering of forecasts: their kept values become terms of the sum that ends the branch."""

import pytest
import torch
from graphs import assert_same_graph
from lowered_norms import (
    CUT,
    OTHER,
    ROWS,
    B,
    C,
    T,
    X,
    calls,
    check_same,
    draw,
    graph_text,
    left,
    lower,
    modulate,
    plain,
)
from lowering import unmeasured
from models import OneBranch
from phases import inline, specialize, store_all
from stages import apply, capture_call, facts_of, run_to, with_facts

from pabc.passes import Captured, Regions, encode_cuts_pass, lower_pass
from pabc.passes.encode import decode, encode
from pabc.passes.forecast import forecast
from pabc.passes.ir import aten

pytestmark = pytest.mark.kernels
KEPT = CUT, OTHER, draw(B, T, C, seed=3)
WEIGHTS = torch.tensor([2.5, -1.75, 0.25])
MODULATED = "norm='layer', scale=%scale, shift=%shift, offset=1.0, eps=1e-06"


def make_branch(depth, is_gated, form="keep"):
    """The stream plus what is forecast from kept values, and the norm after it."""

    def branch(x, *rest):
        *kept, weights, m = rest
        size = len(kept) // depth
        parts = [kept[i : i + size] for i in range(0, len(kept), size)]
        cut = forecast([decode(each, form, x.dtype) for each in parts], weights)
        y = x + (m.gate * cut if is_gated else cut)
        return y, modulate(y, m)

    return branch


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_a_forecast_is_as_many_terms_as_it_has_values(depth, is_gated):
    lowered, run = lower(make_branch(depth, is_gated), X, *KEPT[:depth], WEIGHTS)
    cuts, at = [f"%c{i}" for i in range(depth)], range(depth)
    gates = [f"%{'g' if is_gated else 'w'}{i}" for i in at]
    lists = ", ".join(f"[{', '.join(each)}]" for each in (cuts, ["None"] * depth, gates))
    expected = graph_text(
        ", ".join(("%x", *cuts, "%w")),
        *(f"%w{i} = select.int(%w, 0, {i})" for i in at),
        *(f"%g{i} = mul(%gate, %w{i})" for i in at if is_gated),
        f"%r = pabc.residual_norm(%x, {lists}, [{', '.join(['1.0'] * depth)}], {MODULATED}, "
        "y_dtype=torch.float32, n_dtype=torch.float32)",
        "%y = getitem(%r, 0)",
        "%n = getitem(%r, 1)",
        "return (%y, %n)",
    )
    assert_same_graph(lowered, expected)
    check_same(run())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("form", ["keep", "fp8"])
def test_kept_values_are_read_as_they_are_kept(depth, is_gated, form):
    """Of a model in bfloat16."""
    kept = [part for each in KEPT[:depth] for part in encode(each.bfloat16(), form)]
    branch = make_branch(depth, is_gated, form)
    rows = [each.bfloat16() for each in ROWS]
    lowered, run = lower(branch, X.bfloat16(), *kept, WEIGHTS, rows=rows)
    (call,) = calls(lowered)
    assert left(lowered) == {"aten.select.int"} | (
        {"aten._to_copy.default", "aten.mul.Tensor"} if is_gated else set()
    )
    assert {each.meta["val"].dtype for each in call.args[1]} == {kept[0].dtype}
    assert {each.meta["val"].dtype for each in call.args[3]} == {torch.float32}
    check_same(run(), rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_a_forecast_of_more_values_is_left_as_it_is(is_gated):
    weights = torch.tensor([4.0, -6.0, 4.0, -1.0])
    lowered, run = lower(make_branch(4, is_gated), X, *KEPT, X * 2, weights)
    (call,) = calls(lowered)
    (term,) = {call.args[0], *call.args[1]} - set(lowered.graph.find_nodes(op="placeholder"))
    assert term.target is aten.add.Tensor, "the whole forecast"
    assert [n.target for n in lowered.graph.nodes].count(aten.mul.Tensor) == 4
    check_same(run())


def test_a_forecast_that_does_not_fit_beside_other_terms():
    def function(x, a, b, c, weights, m):
        return plain((x + m.gate * forecast([a, b], weights)) + m.scale * forecast([b, c], weights))

    lowered, run = lower(function, X, *KEPT, WEIGHTS)
    (call,) = calls(lowered)
    assert [each.op for each in call.args[1]] == ["call_function", "placeholder", "placeholder"]
    check_same(run())


def test_a_forecast_that_others_read_is_left_as_it_is():
    def function(x, a, b, weights, m):
        cut = forecast([a, b], weights)
        return plain(x + m.gate * cut), cut

    lowered, run = lower(function, X, *KEPT[:2], WEIGHTS)
    (call,) = calls(lowered)
    assert [each.target for each in call.args[1]] == [aten.add.Tensor]
    check_same(run())


@pytest.mark.parametrize("depth", [2, 3])
def test_a_forecast_alone_is_no_residual_add(depth):
    lowered, run = lower(lambda *given: forecast(given[:-2], given[-2]), *KEPT[:depth], WEIGHTS)
    assert not calls(lowered)
    check_same(run())


@pytest.mark.parametrize("cache_dtype", ["keep", "fp8"])
def test_a_phase(cache_dtype):
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    graph, regions = apply(encode_cuts_pass, gm, Captured, Regions, cache_dtype=cache_dtype)
    gm = with_facts(graph, facts_of(gm).adding(regions))
    phase = inline(specialize(gm, reused=(0,), depths=(2,)))
    lowered, _ = lower_pass(phase, kernels="force", gains=unmeasured)
    (call,) = calls(lowered)
    assert [each.op for each in call.args[1]] == ["placeholder"] * 2
    call = OneBranch.call()
    kept = [store_all(gm, {"x": scale * call["x"], "t": call["t"]})[0] for scale in (2, 1)]
    given = *call.values(), WEIGHTS[:2], *(part for each in kept for part in each)
    torch.testing.assert_close(lowered(*given), phase(*given), rtol=1e-5, atol=1e-5)
