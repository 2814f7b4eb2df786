"""Blocks: a flat phase as a chain of graphs, equal ones of which are one."""

import re
import sys
import weakref

import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, Case, OneBranch
from phases import inline, lift, specialize, store_all
from small_latte import make_inputs, make_latte
from stages import capture_call, regions_of, run_to, with_hoisted
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch.fx import Graph, GraphModule

import pabc
from pabc.base.kinds import COARSE
from pabc.passes import (
    compile_blocks,
    split_blocks_pass,
)
from pabc.passes.blocks import block_key
from pabc.passes.ir import GETITEM, is_contraction
from pabc.runtime.chain import BlockCall, BlockChain

FACTORIZED = next(case for case in MODELS if case.name == "Factorized")


def make_flat(case, captured, reused=None):
    """A lifted phase that reuses every third region unless told, and inputs for it."""
    gm = run_to(captured(case)[1], "cache")
    num_regions = len(regions_of(gm))
    reused = range(0, num_regions, 3) if reused is None else reused
    kept = store_all(gm, case.call(step=0))
    stored = [slot for slot in range(num_regions) if slot not in reused]
    flat, weights = lift(inline(specialize(gm, reused=reused, stored=stored)))
    cuts = [cut for slot in reused for cut in kept[slot]]
    return flat, [*weights, *with_hoisted(gm, case.call(step=1)), *cuts]


def same(results, others):
    return len(results) == len(others) and all(map(torch.equal, results, others))


def test_a_branch_begins_a_block_that_takes_views_anew():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    flat, _ = lift(inline(specialize(gm, stored=(0,))))
    assert_same_graph(
        split_blocks_pass(flat)[0],
        """
        graph(%w, %w_out, %x, %t):
            %first = call_module[block_0](%t)
            %time = getitem(%first, 0)
            %second = call_module[block_1](%x, %w, %w_out, %time)
            %y = getitem(%second, 1)
            %p = getitem(%second, 0)
            return (%y, %p)

        block_0(%t):
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            return (%time,)

        block_1(%x, %w, %w_out, %time):
            %h = linear(%x, %w)
            %o = scaled_dot_product_attention(%h, %h, %h)
            %p = linear(%o, %w_out)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %g = mul(%gate, %p)
            %y = add(%x, %g)
            return (%p, %y)
        """,
    )


@pytest.mark.parametrize("case", MODELS, ids=str)
@pytest.mark.parametrize("reused", [(), None], ids=["all computed", "some reused"])
def test_a_chain_of_blocks_keeps_bits(case: Case, reused, captured):
    flat, inputs = make_flat(case, captured, reused)
    split, parts = split_blocks_pass(flat)
    split.graph.lint()
    chain, blocks = BlockChain.of(split, parts)
    with torch.no_grad():
        expected = flat(*inputs)
        assert same(expected, split(*inputs))
        run = chain.link([lambda given, block=block: block.graph(*given) for block in blocks])
        assert same(expected, run([*inputs]))


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_nothing_but_blocks_is_left_and_no_view_crosses(case: Case, captured):
    flat, inputs = make_flat(case, captured)
    split, parts = split_blocks_pass(flat)
    ops = [n for n in split.graph.nodes if n.op not in ("placeholder", "output")]
    assert all(n.op == "call_module" or n.target is GETITEM for n in ops)
    chain, blocks = BlockChain.of(split, parts)
    crossing = {place for call in chain.calls for place in call.inputs}
    values = dict(enumerate(inputs))
    for call in chain.calls:
        given = [values[place] for place in call.inputs]
        with torch.no_grad():
            results = blocks[call.block].graph(*given)
        memory = {t.untyped_storage().data_ptr() for t in given}
        for place, result in enumerate(results, len(values)):
            assert place not in crossing or result.untyped_storage().data_ptr() not in memory
            values[place] = result


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_blocks_begin_with_the_first_product_of_a_branch(case: Case, captured):
    """What comes before it in the branch, its norm, is in one block with the sum before that."""
    flat, _ = make_flat(case, captured, ())
    chain, blocks = BlockChain.of(*split_blocks_pass(flat))
    branches = [region for region in regions_of(flat) if region.kind not in COARSE]
    assert len(chain.calls) == len(branches) + 1
    for call in chain.calls[1:]:
        body = blocks[call.block].graph
        slot = next(n.meta["slot"] for n in body.graph.nodes if "slot" in n.meta)
        own = [n for n in body.graph.nodes if n.meta.get("slot") == slot]
        begun = set()
        for node in own:
            if is_contraction(node) or begun.intersection(node.all_input_nodes):
                begun.add(node)
        views = [n for n in own if n not in begun]
        assert all(n.op == "call_function" for n in views)
        assert not any(n.target.name().startswith("aten::layer_norm") for n in views)


def test_distinct_blocks_do_not_grow_with_depth():
    """Nor do two phases have two blocks where they do the same."""
    counts = []
    latents, text = make_inputs()
    schedule = pabc.Schedule.pyramid(range(12), spatial=2, temporal=4, cross=6)
    for num_layers in (3, 5):
        model = make_latte(num_layers=num_layers)
        fast = pabc.compile(model, schedule, backend="eager")
        fast.prepare(latents, torch.full((2,), 990), encoder_hidden_states=text)
        program, binding = fast._captured("")
        phases = [
            program.phases.lower(phase) for phase in dict.fromkeys((*binding.phases, binding.whole))
        ]
        keys = [block.key for lowered in phases for block in lowered.blocks]
        calls = [call for lowered in phases for call in lowered.chain.calls]
        counts.append((len(set(keys)), len(keys), len(calls)))
    (distinct, in_phases, calls), (others, *_, more_calls) = counts
    assert distinct == others < in_phases < calls < more_calls


def tell(value, **kwargs):
    """The key of a graph that calls `torch.add` with an argument."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, value), kwargs),))
    return block_key(GraphModule({}, graph))


def test_keys_tell_arguments_apart():
    values = (0, 0.0, -0.0, False, 1, 1.0, True, float("inf"), None, "0")
    keys = [*map(tell, values), tell(0, alpha=2), tell(0, alpha=2.0)]
    assert len(set(keys)) == len(keys)
    assert tell(float("nan")) == tell(float("nan"))


@pytest.mark.parametrize(
    "other",
    [
        torch.empty(3, 2),
        torch.empty(3, 2).t(),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty(2, 3, device="meta"),
    ],
    ids=["shape", "strides", "dtype", "device"],
)
def test_keys_tell_inputs_apart(other):
    keys = []
    for val in (torch.empty(2, 3), torch.empty(2, 3), other):
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = val
        graph.output((graph.call_function(torch.ops.aten.sin.default, (x,)),))
        keys.append(block_key(GraphModule({}, graph)))
    assert keys[0] == keys[1] != keys[2]


def test_keys_tell_which_operand_goes_where():
    keys = []
    for order in ((0, 1), (1, 0), (0, 0)):
        graph = Graph()
        inputs = [graph.placeholder(name) for name in "xy"]
        operands = tuple(inputs[i] for i in order)
        graph.output((graph.call_function(torch.ops.aten.sub.Tensor, operands),))
        keys.append(block_key(GraphModule({}, graph)))
    assert len(set(keys)) == 3


def test_values_are_let_go_of_after_their_last_use():
    alive = []

    def block(given):
        alive.append([sys.getrefcount(x) for x in given])
        result = [given[0] + 1]
        given.clear()
        return result

    chain = BlockChain(
        1, (BlockCall(0, (0,), 1), BlockCall(0, (1,), 1), BlockCall(0, (2,), 1)), (3,)
    )
    values = [torch.zeros(2)]
    assert torch.equal(chain.link([block])(values)[0], torch.full((2,), 3.0))
    assert not values
    assert alive == [[alive[0][0]]] * 3, "a result is held by nobody but the block that takes it"


def test_results_that_nobody_takes_are_let_go_of_at_once():
    class Result:
        pass

    made = []

    def block(given):
        assert not any(result() for result in made)
        results = [given[0], Result()]
        made.append(weakref.ref(results[1]))
        return results

    chain = BlockChain(
        1, (BlockCall(0, (0,), 2), BlockCall(0, (1,), 2), BlockCall(0, (3,), 2)), (5,)
    )
    assert chain.link([block])(["x"]) == ["x"]
    assert len(made) == 3


def test_inputs_that_are_returned_stay():
    chain = BlockChain(2, (BlockCall(0, (0,), 1),), (2, 0, 1))
    run = chain.link([lambda given: [given[0] * 2]])
    x, y = torch.ones(1), torch.zeros(1)
    results = run([x, y])
    assert torch.equal(results[0], torch.full((1,), 2.0)) and results[1] is x and results[2] is y


def test_no_fusion_is_lost(captured, monkeypatch):
    """Block by block, no more kernels run than when the phase is compiled as one graph."""
    sources = []
    monkeypatch.setattr(GraphLowering, "save_output_code", sources.append)
    flat, inputs = make_flat(FACTORIZED, captured, (0, 3))
    chain, blocks = BlockChain.of(*split_blocks_pass(flat))
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        code = compile_blocks([block.graph for block in blocks])
        results = chain.link([block.run for block in code])([*inputs])
        expected = compile_fx(flat, inputs)(*inputs)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=1e-5)
    *counts, whole = [len(re.findall(r"^ +cpp_\w+\(", source, re.M)) for source in sources]
    assert len(counts) == len(blocks)
    assert 5 < sum(counts[call.block] for call in chain.calls) <= whole
