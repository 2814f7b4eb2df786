"""Regions that contain others: what is found, how it stands in graphs, what is left out and why."""

import random

import pytest
import torch
from graphs import assert_same_graph
from models import (
    CASES,
    CHANNELS,
    MODELS,
    PATCH,
    WIDTH,
    Branch,
    Case,
    Cross,
    Factorized,
    Image,
    JointBlock,
    JointImage,
    Mlp,
    OneBranch,
    SharedProjection,
)
from phases import FakeTrajectory, inline, specialize, store_all
from stages import apply, capture_call, facts_of, regions_of, run_graph, run_to, with_hoisted
from torch import nn

import pabc
from pabc.base.kinds import COARSE
from pabc.passes import Regions, verify_nest
from pabc.passes.guard_ops import rejoin
from pabc.passes.ir import aten
from pabc.passes.nesting.units import Look, find_units
from pabc.runtime.bindings import slot_specs

BY_NAME = {case.name: case for case in CASES}
CALL = BY_NAME["Branch"].call()


def nest(model, call=CALL, **options):
    return run_to(capture_call(model, call), "nest", **options)


def left_out(gm):
    return facts_of(gm)[Regions].left_out


def find(gm):
    """Per coarser region: its name and the names of those that it covers."""
    regions = regions_of(gm)
    return {
        region.name: [regions[i].name for i in region.covers]
        for region in regions
        if region.kind in COARSE
    }


# ---- which regions repeat ----


def looks(text):
    """Makes looks from words: a kind, and a letter per stream."""
    made = []
    for word in text.split():
        kind, _, streams = word.partition(":")
        made.append(Look(kind, tuple((ord(s),) for s in streams or "x"), ("linear", kind)))
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full cross mlp full cross mlp", [(0, 3), (3, 6)]),
        ("full full full", [(0, 1), (1, 2), (2, 3)]),
        ("temporal temporal mlp temporal temporal mlp", [(0, 3), (3, 6)]),
        ("joint:xt mlp mlp:t joint:xt mlp mlp:t joint mlp", [(0, 3), (3, 6), (6, 8)]),
        ("joint:xt mlp mlp:t joint mlp", [(0, 3), (3, 5)]),
        ("joint:xt full mlp joint:xt mlp joint:xt mlp", [(0, 3), (3, 5), (5, 7)]),
        ("joint:xt mlp joint:xt mlp joint:a mlp:a joint:a mlp:a", [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ("full:a mlp:a joint mlp joint mlp", [(2, 4), (4, 6)]),
        ("full cross mlp", []),
        ("full cross mlp temporal", []),
        ("", []),
    ],
)
def test_blocks_are_found_by_structure(text, expected):
    assert [(unit.start, unit.stop) for unit in find_units(looks(text))] == expected


# ---- what is found ----


class TwoKindsOfBlocks(JointImage):
    """Blocks with two streams, then blocks with one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((JointBlock(), JointBlock()))
        self.single = nn.ModuleList((SharedProjection("joint"), SharedProjection("joint")))

    def forward(self, x_BCHW, t_B, text_BLD):
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb, text = self.time(t_B), self.text(text_BLD)
        for block in self.blocks:
            x, text = block(x, text, emb)
        x = torch.cat([text, x], dim=1)
        for block in self.single:
            x = block(x, emb)
        x = self.head(x[:, text.shape[1] :]).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class TwoOutputs(JointImage):
    """Two streams, of which both leave the model; and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((JointBlock(), JointBlock()))

    def forward(self, x_BCHW, t_B, text_BLD):
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb, text = self.time(t_B), self.text(text_BLD)
        for block in self.blocks:
            x, text = block(x, text, emb)
        return {"x": self.head(x), "text": text, "same": x_BCHW}


class Projected(Image):
    """A projection joins a skip to the stream between blocks, as in a U-shaped transformer."""

    def __init__(self) -> None:
        super().__init__(Branch(), Mlp(), Branch(), Mlp(), Branch(), Mlp())
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_BCHW, t_B, text_BLD):
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb, skip = self.time(t_B), None
        for i, block in enumerate(self.blocks):
            x = block(x, emb)
            skip = x if i == 1 else skip
            if i == 3:
                x = self.join(torch.cat([x, skip], dim=-1))
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class Narrowing(Image):
    """A projection to half the width between two halves of the blocks."""

    def __init__(self) -> None:
        super().__init__(Mlp(), Mlp())
        self.narrow, self.inner = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH // 2)
        self.more = nn.Linear(WIDTH // 2, WIDTH // 2)
        self.head = nn.Linear(WIDTH // 2, CHANNELS * PATCH * PATCH)

    def forward(self, x_BCHW, t_B, text_BLD):
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.time(t_B))
        x = self.narrow(x)
        x = x + self.more(self.inner(x).relu())
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def test_blocks_the_stack_and_the_model_of_one_stream():
    gm = nest(Image(Branch(), Cross(), Mlp(), Branch(), Cross(), Mlp()))
    fine = ["full_0", "cross_0", "mlp_0", "full_1", "cross_1", "mlp_1"]
    assert [r.name for r in regions_of(gm)] == [*fine, "block_0", "block_1", "stack_0", "model_0"]
    assert find(gm) == {
        "block_0": fine[:3],
        "block_1": fine[3:],
        "stack_0": [*fine, "block_0", "block_1"],
        "model_0": [*fine, "block_0", "block_1", "stack_0"],
    }
    assert left_out(gm) == ()


def test_an_odd_block_at_the_end_is_a_block():
    """The last joint block does not go on with the text."""
    gm = nest(JointImage())
    assert find(gm)["block_0"] == ["joint_0", "mlp_0", "mlp_1"]
    assert find(gm)["block_1"] == ["joint_1", "mlp_2"]
    assert [len(r.cuts) for r in regions_of(gm) if r.kind in COARSE] == [2, 1, 1, 1]


def test_two_kinds_of_blocks():
    gm = nest(TwoKindsOfBlocks())
    found = find(gm)
    assert [len(found[f"block_{i}"]) for i in range(4)] == [3, 3, 2, 2]
    assert len(found["stack_0"]) == 14


def test_blocks_of_two_modules_each(captured):
    case = BY_NAME["Factorized"]
    gm = nest(Factorized(layers=2), case.call())
    assert find(gm)["block_1"] == ["spatial_1", "cross_1", "mlp_2", "temporal_1", "mlp_3"]
    names = [slot.name for slot in slot_specs(regions_of(gm))]
    assert names[-4:] == ["block_0", "block_1", "stack", "model"]


def test_every_stream_and_every_computed_output_is_a_cut():
    gm = nest(TwoOutputs())
    regions = {r.name: r for r in regions_of(gm)}
    assert len(regions["stack_0"].cuts) == len(regions["model_0"].cuts) == 2


def test_a_stream_through_a_projection_starts_where_the_stack_does():
    gm = nest(Projected())
    assert list(find(gm)) == ["block_0", "block_1", "block_2", "stack_0", "model_0"]
    (call,) = (n for n in gm.graph.nodes if n.target == "stack_0")
    assert call.args[1].target is aten.transpose.int, "the patches"


def test_slots_name_the_coarser_ones_that_contain_them():
    gm = nest(Image(Branch(), Mlp(), Branch(), Mlp()))
    outer = {slot.name: slot.outer for slot in slot_specs(regions_of(gm))}
    assert outer["blocks.0.attn"] == ("blocks:block_0", "stack", "model")
    assert outer["blocks:block_1"] == ("stack", "model")
    assert outer["stack"] == ("model",) and outer["model"] == ()


# ---- what is left out ----


def test_without_repetition_there_is_no_block():
    gm = nest(Image(Branch(), Cross(), Mlp()))
    assert list(find(gm)) == ["stack_0", "model_0"]
    assert left_out(gm) == ("block: no sequence of branches is repeated",)


def test_a_stack_of_several_widths_is_left_out():
    gm = nest(Narrowing())
    assert list(find(gm)) == ["block_0", "block_1", "model_0"]
    assert any(line.startswith("stack: ") for line in left_out(gm))


def test_a_model_without_branches_is_a_region_by_itself():
    gm = nest(nn.Linear(3, 3), {"input": torch.randn(2, 4, 3)})
    assert find(gm) == {"model_0": []}
    assert left_out(gm) == ("stack: there are no branches",)


def test_a_hook_that_looks_on_keeps_what_it_sees():
    model, seen = Image(Branch(), Mlp(), Branch(), Mlp()), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(len(seen)))
    found = pabc.explain(model, **CALL)
    assert [each.kind for each in found.coarse if each.kind == "model"] == []
    (reason,) = found.left_out
    assert reason.startswith("model: blocks.1.hook") and reason.endswith("must run at every call")


def test_an_output_that_is_an_input_is_no_cut():
    class Same(nn.Module):
        def forward(self, input):
            return input

    gm = nest(Same(), {"input": torch.randn(2, 4, 3)})
    assert find(gm) == {} and "model: it computes no output" in left_out(gm)


def test_verify_catches_a_region_that_is_not_rejoined(captured):
    gm = nest(Image(Branch(), Mlp()))
    apply(verify_nest, gm, Regions)
    joined = next(n for n in gm.graph.nodes if n.target is rejoin)
    joined.replace_all_uses_with(joined.args[0])
    gm.graph.erase_node(joined)
    with pytest.raises(AssertionError, match="stack_0"):
        apply(verify_nest, gm, Regions)


# ---- graphs ----


def test_a_stack_and_a_model_in_the_graph():
    assert_same_graph(
        nest(OneBranch(), OneBranch.call()),
        """
        graph(%x, %t):
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %r = call_module[full_0](%x)
            %v = getitem(%r, 0)
            %g = mul(%gate, %v)
            %y = add(%x, %g)
            %s = call_module[stack_0](%y, %x)
            %d = getitem(%s, 0)
            %j = rejoin(%y, %x, %d)
            %m = call_module[model_0](%j)
            %o = getitem(%m, 0)
            %k = rejoin(%j, None, %o)
            return (%k,)

        stack_0(%y, %x):
            %d = sub(%y, %x)
            return (%d,)

        model_0(%y):
            return (%y,)
        """,
    )


STACK_REUSED = """
    graph(%x, %t, %kept):
        %y = add(%x, %kept)
        return ((%y,), ())
"""
MODEL_REUSED = """
    graph(%x, %t, %kept):
        %y = clone(%kept)
        return ((%y,), ())
"""
MODEL_STORED = """
    graph(%x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %r = call_module[full_0](%x)
        %v = getitem(%r, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        %m = call_module[model_0](%y)
        %o = getitem(%m, 0)
        %k = clone(%o)
        %kept = getitem(%m, 0)
        return ((%k,), (%kept,))
"""


@pytest.mark.parametrize(
    ("reused", "stored", "expected"),
    [((1,), (), STACK_REUSED), ((2,), (), MODEL_REUSED), ((), (2,), MODEL_STORED)],
    ids=["stack reused", "model reused", "model stored"],
)
def test_phases_of_coarser_regions(reused, stored, expected):
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "cache")
    assert_same_graph(specialize(gm, reused=reused, stored=stored), expected)


def order(gm):
    return [(n.op, n.target) for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


@pytest.mark.parametrize("case", [*CASES, Case("Two", TwoKindsOfBlocks, "BCHW", ())], ids=str)
def test_phases_without_coarser_reuse_are_as_without_coarser_regions(case: Case, captured):
    gm = run_to(captured(case)[1], "cache")
    plain = run_to(captured(case)[1], "cache", disable=("nest",))
    num = len(regions_of(plain))
    for reused, stored in (((), ()), ((), range(num)), (range(0, num, 2), range(1, num, 2))):
        found = specialize(gm, reused=reused, stored=stored)
        expected = specialize(plain, reused=reused, stored=stored)
        assert_same_graph(found, expected)
        assert order(found) == order(expected)
        assert order(inline(found)) == order(inline(expected))


@pytest.mark.parametrize("case", [*MODELS, Case("Two", TwoKindsOfBlocks, "BCHW", ())], ids=str)
def test_any_reuse_equals_the_guarded_graph(case: Case, captured):
    """And nothing that a reused region covers is called."""
    model, gm = captured(case)
    gm = run_to(gm, "cache")
    regions, call = regions_of(gm), case.call(step=1)
    kept = store_all(gm, case.call(step=0))
    with torch.no_grad():
        assert torch.equal(run_graph(gm, call, FakeTrajectory()), model(**call))
    rng = random.Random(case.name)
    for _ in range(6):
        reused = [slot for slot in range(len(regions)) if rng.random() < 0.3]
        stored = [slot for slot in range(len(regions)) if slot not in reused and rng.random() < 0.5]
        oracle = FakeTrajectory({slot: kept[slot] for slot in reused})
        expected = run_graph(gm, call, oracle)
        phase = specialize(gm, reused=reused, stored=stored)
        cuts = [cut for slot in reused for cut in kept[slot]]
        with torch.no_grad():
            outputs, results = inline(phase)(*with_hoisted(phase, call), *cuts)
        assert torch.equal(outputs[0], expected)
        wanted = [cut for slot in stored for cut in oracle.writes[slot]]
        assert all(map(torch.equal, results, wanted))
        if not stored:
            called = {n.target for n in phase.graph.nodes if n.op == "call_module"}
            assert called.isdisjoint(regions[i].name for s in reused for i in regions[s].covers)


@pytest.mark.parametrize("forecast", ["hold", "linear"])
def test_nested_reuse_equals_the_oracle(forecast):
    """What a step skips with the stack is not kept, though the guarded graph computes it."""
    case, model = BY_NAME["Branch"], Image(Branch(), Mlp(), Branch(), Mlp()).eval()
    ranges = {"stack": 3, "block": 2, "mlp": 2}
    schedule = pabc.Schedule.pyramid(range(8), fraction=(0, 1), **ranges, forecast=forecast)
    fast, oracle = (pabc.compile(model, schedule, backend=b) for b in ("eager", "oracle"))
    with torch.no_grad():
        results = [(fast(**case.call(step)), oracle(**case.call(step))) for step in range(8)]
    assert all(torch.equal(a, b) for a, b in results)
    assert not fast.stats.fallbacks
    a, b = fast.stats, oracle.stats
    assert (a.reused, a.stored, a.peak_nbytes) == (b.reused, b.stored, b.peak_nbytes)


def test_a_model_that_is_reused_returns_tensors_of_its_own(captured):
    gm = run_to(captured(BY_NAME["Branch"])[1], "cache")
    (slot,) = (i for i, region in enumerate(regions_of(gm)) if region.kind == "model")
    kept = store_all(gm, CALL)
    for values in ({}, {slot: kept[slot]}):
        trajectory = FakeTrajectory(values)
        result = run_graph(gm, CALL, trajectory)
        held = values.get(slot) or trajectory.writes[slot]
        assert torch.equal(result, held[0])
        result.zero_()
        assert held[0].any()


def test_explain_lists_coarser_regions_apart():
    found = pabc.explain(Image(Branch(), Mlp(), Branch(), Mlp()), **CALL)
    assert [r.kind for r in found.regions] == ["full", "mlp", "full", "mlp"]
    assert [(r.kind, r.branches) for r in found.coarse] == [
        ("block", ("full", "mlp")),
        ("block", ("full", "mlp")),
        ("stack", ("full", "mlp", "full", "mlp")),
        ("model", ("full", "mlp", "full", "mlp")),
    ]
    block, _, stack, model = found.coarse
    assert 0 < block.share < stack.share < model.share == 1
    assert "coarser regions: model, stack, 2 blocks of 2 branches (full, mlp)" in str(found)
