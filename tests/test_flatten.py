"""Flattening: a phase without calls of regions, then with its weights as inputs."""

import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, Case, OneBranch
from phases import inline, lift, specialize, store_all
from stages import capture_call, regions_of, run_to, with_hoisted

from pabc.passes import ResultIndex, lift_weights_pass
from pabc.passes.ir import attribute

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText")]


def make_phase(case, captured):
    """A phase that reuses the first region and stores the others; its inputs."""
    gm = run_to(captured(case)[1], "cache")
    kept = store_all(gm, case.call(step=0))
    stored = range(1, len(regions_of(gm)))
    phase = specialize(gm, reused=(0,), stored=stored)
    return phase, [*with_hoisted(gm, case.call(step=1)), *kept[0]]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


INLINED = """
    graph(%x, %t):
        %w = get_attr[project.weight]
        %w_out = get_attr[out.weight]
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %h = linear(%x, %w)
        %o = scaled_dot_product_attention(%h, %h, %h)
        %p = linear(%o, %w_out)
        %g = mul(%gate, %p)
        %y = add(%x, %g)
        return ((%y,), (%p,))
"""
LIFTED = """
    graph(%w, %w_out, %x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %h = linear(%x, %w)
        %o = scaled_dot_product_attention(%h, %h, %h)
        %p = linear(%o, %w_out)
        %g = mul(%gate, %p)
        %y = add(%x, %g)
        return (%y, %p)
"""


def test_regions_are_inlined_and_weights_become_inputs():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    flat = inline(specialize(gm, stored=(0,)))
    assert_same_graph(flat, INLINED)
    assert_same_graph(lift(flat)[0], LIFTED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inlining_keeps_bits_and_leaves_no_call(case: Case, captured):
    phase, inputs = make_phase(case, captured)
    flat = inline(phase)
    flat.graph.lint()
    assert any(n.op == "call_module" for n in phase.graph.nodes)
    assert not any(n.op == "call_module" for n in flat.graph.nodes)
    with torch.no_grad():
        (expected, cuts), (outputs, kept) = phase(*inputs), flat(*inputs)
    assert same(expected, outputs) and same(cuts, kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lifting_keeps_bits_and_leaves_no_weight(case: Case, captured):
    phase, inputs = make_phase(case, captured)
    flat = inline(phase)
    lifted, facts = lift_weights_pass(flat)
    lifted.graph.lint()
    assert not any(n.op == "get_attr" for n in lifted.graph.nodes)
    names = facts.weights
    assert len(set(names)) == len(names)
    weights = [attribute(flat, name) for name in names]
    with torch.no_grad():
        (expected, cuts), results = phase(*inputs), lifted(*weights, *inputs)
    assert same([*expected, *cuts], results)
    assert facts.outputs == (ResultIndex(0),)


def test_lifted_weights_decide_the_result(captured):
    """Weights are inputs: other values, other results, no other graph."""
    phase, inputs = make_phase(CASES[0], captured)
    flat = inline(phase)
    lifted, weights = lift(flat)
    with torch.no_grad():
        first = lifted(*weights, *inputs)
        second = lifted(*(w * 1.5 for w in weights), *inputs)
    assert not torch.equal(first[0], second[0])


def test_a_phase_without_regions_is_copied(captured):
    gm = run_to(captured(CASES[0])[1], "cache")
    every = range(len(regions_of(gm)))
    phase = specialize(gm, reused=every, stored=())
    flat = inline(phase)
    assert_same_graph(flat, phase)


def test_a_weight_that_is_read_twice_is_one_input():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.mul, (x, graph.get_attr("weight")))
    total = graph.call_function(torch.add, (product, graph.get_attr("weight")))
    graph.output(((total,), ()))
    weight = torch.nn.Parameter(torch.full((2,), 3.0))
    lifted, facts = lift_weights_pass(torch.fx.GraphModule({"weight": weight}, graph))
    assert facts.weights == ("weight",)
    assert torch.equal(lifted(torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))


def test_outputs_that_are_no_tensors_keep_their_place():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(((None, x, 3), ()))
    lifted, facts = lift_weights_pass(torch.fx.GraphModule({}, graph))
    assert facts.outputs == (None, ResultIndex(0), 3)
    assert lifted(torch.ones(1)) == (torch.ones(1),)
