"""The pass: which axis is divided, what each region sends; simulated ranks give what one gives.

Real processes are in `test_ranks.py`, rules and moves in `test_shard_rules.py` and `_moves.py`.
"""

import inspect
from collections import Counter
from functools import partial

import pytest
import torch
from graphs import assert_same_graph
from models import MODELS, Branch, Factorized, Image, Mlp, OneBranch, Sizes
from sharded.simulator import GROUP, run_ranks
from stages import apply, capture_call, facts_of, latents_of, run_to, with_facts
from torch import nn
from torch.utils import _pytree as pytree

import pabc
from pabc.base.arguments import bind_arguments
from pabc.communication import Communication
from pabc.passes import (
    Captured,
    Denoised,
    Facts,
    Marked,
    ModelCall,
    Ranks,
    capture,
    shard_batch,
    shard_pass,
    shard_tokens,
    verify_shard,
)
from pabc.passes.ir import aten
from pabc.passes.shard import find_token_axes
from pabc.passes.sharding import moves
from pabc.plan import SlotSpec
from pabc.sharding import shard_for, shares_computed

BY_NAME = {case.name: case for case in MODELS}
STEPS = range(12)
PAB = pabc.Schedule.pyramid(STEPS, spatial=2, temporal=4, cross=6)
TOLERANCE = 1e-6


def shard_all(gm, num_ranks, shard=shard_tokens, **options):
    """Each rank's graph."""
    ranks = [Ranks(num_ranks, rank, GROUP) for rank in range(num_ranks)]
    made = [apply(shard, gm, Denoised, ranks=each, **options)[0] for each in ranks]
    for graph in made:
        graph.graph.lint()
        apply(verify_shard, with_facts(graph, facts_of(gm)), Marked)
    return made


def assert_ranks_equal_one(gm, inputs, graphs):
    (expected,) = run_ranks([gm], [inputs])
    for outputs in run_ranks(graphs, [inputs] * len(graphs)):
        torch.testing.assert_close(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_ranks_give_what_one_gives(case, captured):
    """Along each token axis: 4, 2, 3 positions and more, on numbers that do not divide them."""
    gm = run_to(captured(case)[1], "regions")
    inputs = [*case.call().values()]
    for axis, num_ranks in zip(find_token_axes(gm, latents_of(gm)), (2, 3, 5), strict=False):
        assert_ranks_equal_one(gm, inputs, shard_all(gm, num_ranks, axis=axis.dim))


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_samples_on_more_ranks_than_there_are(case, captured):
    gm = run_to(captured(case)[1], "regions")
    graphs = shard_all(gm, 3, shard_batch)
    assert_ranks_equal_one(gm, [*case.call().values()], graphs)
    sends = {node.meta.get("region") for node in find_nodes(graphs[0].graph)}
    # Its second block shifts windows by an op without a rule, which every rank computes whole.
    assert sends == ({None, 1} if case.name == "Windowed" else {None})


def find_nodes(graph):
    return [node for node in graph.nodes if moves.find_collective(node) is not None]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["Kandinsky6", "StableAudio", "Wan"])
def test_zoo_ranks_give_what_one_gives(name):
    """Two streams, text and video in one sequence, attention that has no rule."""
    pytest.importorskip("diffusers")
    from zoo import ENTRIES

    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    model, call = entry.build()
    args, kwargs = bind_arguments(inspect.signature(model.forward), (), call)
    gm, known = capture(model.requires_grad_(False), args, kwargs)
    gm = run_to(
        with_facts(gm, Facts([known, ModelCall(model=model, args=args, kwargs=kwargs)])), "regions"
    )
    assert_ranks_equal_one(gm, pytree.tree_leaves((args, kwargs)), shard_all(gm, 3))


def test_each_rank_computes_its_samples_and_gathers_the_output():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "regions")
    (first, *_) = shard_all(gm, 2, shard_batch)
    assert_same_graph(
        first,
        """
        graph(%x, %t):
            %samples = reshape(%x, [1, 2, 1, 3, 4])
            %own = slice(%samples, 1, 0, 1)
            %x_own = reshape(%own, [1, 3, 4])
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %gates = reshape(%gate, [1, 2, 1, 1, 1])
            %own_gate = slice(%gates, 1, 0, 1)
            %gate_own = reshape(%own_gate, [1, 1, 1])
            %w = get_attr[project.weight]
            %h = linear(%x_own, %w)
            %o = scaled_dot_product_attention(%h, %h, %h)
            %w_out = get_attr[out.weight]
            %p = linear(%o, %w_out)
            %g = mul(%gate_own, %p)
            %y = add(%x_own, %g)
            %sent = reshape(%y, [1, 1, 1, 3, 4])
            %first = permute(%sent, [1, 0, 2, 3, 4])
            %copy = clone(%first, memory_format=torch.contiguous_format)
            %gathered = _c10d_functional.all_gather_into_tensor(%copy, 2, 'simulated')
            %whole = _c10d_functional.wait_tensor(%gathered)
            %every = slice(%whole, 0, 0, 2)
            %ordered = permute(%every, [1, 0, 2, 3, 4])
            %result = reshape(%ordered, [2, 3, 4])
            return (%result,)
        """,
    )


SENDS = [
    ("Factorized", 2, {"temporal": ["all_to_all"] * 2}),
    ("Factorized", 3, {"spatial": ["all_to_all"]}),
    ("Factorized", 4, {"spatial": ["all_to_all"]}),
    ("Rearranged", 2, {"temporal": ["all_to_all"] * 2}),
    ("Full3d", 2, {"full": ["all_to_all"] * 4}),
    ("Full3d", 4, {"full": ["all_to_all"] * 4}),
    ("OneStream", 2, {"joint": [*["all_to_all"] * 4, "all_gather"]}),
]


@pytest.mark.parametrize(("name", "dim", "expected"), SENDS, ids=lambda value: str(value)[:12])
def test_what_is_sent_lies_in_the_regions_that_mix_the_axis(name, dim, expected, captured):
    """The rest of the graph sends once, at its end: the whole of the output.

    The first region's latents are cut from what every rank has: it has no switch at its entry.
    """
    (gm, *_) = shard_all(run_to(captured(BY_NAME[name])[1], "regions"), 2, axis=dim)
    kinds = [kind for kind, _ in facts_of(gm)[Marked].branches]
    nodes = find_nodes(gm.graph)
    found = {}
    for node in nodes[:-1]:
        found.setdefault(node.meta["region"], []).append(moves.find_collective(node).op)
    assert "region" not in nodes[-1].meta and moves.find_collective(nodes[-1]).op == "all_gather"
    for region, ops in found.items():
        assert Counter(ops) == Counter(expected[kinds[region]]), (region, ops)
    sending = {region for region, kind in enumerate(kinds) if kind in expected}
    assert set(found) == sending


def test_a_region_switches_before_its_attention_and_back_after_it(captured):
    (gm, *_) = shard_all(run_to(captured(BY_NAME["Factorized"])[1], "regions"), 2, axis=2)
    kinds = [kind for kind, _ in facts_of(gm)[Marked].branches]
    inside = [n for n in gm.graph.nodes if n.meta.get("region") == kinds.index("temporal")]
    known = (moves.ALL_TO_ALL, moves.WAIT, aten.layer_norm.default)
    attend = aten.scaled_dot_product_attention.default
    order = [node.target for node in inside if node.target in (*known, attend)]
    switch = [moves.ALL_TO_ALL, moves.WAIT]
    assert order == [*switch, aten.layer_norm.default, attend, *switch]
    (cut,) = (node for node in inside if "cut" in node.meta)
    assert inside.index(cut) > [node.target for node in inside].index(attend)


def test_waits_are_just_before_what_needs_them(captured):
    """Between a wait and the first op that computes with what it brought there are but layouts and
    other waits."""
    for name in ("Factorized", "Full3d", "JointImage"):
        (gm, *_) = shard_all(run_to(captured(BY_NAME[name])[1], "regions"), 2)
        nodes = list(gm.graph.nodes)
        for i, wait in enumerate(nodes):
            if wait.target is moves.WAIT:
                after = nodes[i + 1 : nodes.index(find_first_need(wait))]
                assert {n.target for n in after} <= {moves.WAIT, *moves.UNPACKS}, wait


def find_first_need(node):
    users = [find_first_need(n) if n.target in moves.UNPACKS else n for n in node.users]
    return min(users)


def explain(case=BY_NAME["Factorized"], **options):
    return pabc.explain(case.model(), **options, **case.call())


@pytest.fixture(scope="module")
def deep():
    """Three layers, T and H of 4: dividing one sends as much as the other where all is computed."""
    torch.manual_seed(0)
    call = BY_NAME["Factorized"].call(sizes=Sizes(frames=4, height=8, width=8))
    return run_to(capture_call(Factorized(layers=3), call), "regions")


@pytest.mark.parametrize(
    ("ranges", "dim"),
    [({"spatial": 2, "temporal": 4, "cross": 6}, 2), ({"spatial": 6, "temporal": 2}, 3)],
)
def test_the_axis_that_is_divided_sends_fewest_bytes_under_the_schedule(ranges, dim, deep):
    schedule = pabc.Schedule.pyramid(STEPS, **ranges)

    def count_bytes(dim):
        """In a generation, and which dimension is divided."""
        sharding = shard_for((2,), dim=dim, weigh=partial(shares_computed, schedule))
        kinds = (Captured, Denoised, Marked)
        gm, shards = apply(shard_pass, deep, *kinds, sharding=sharding)
        gm = with_facts(gm, facts_of(deep))
        kinds = [kind for kind, _ in facts_of(gm)[Marked].branches]
        total = 0
        for node in find_nodes(gm.graph):
            reused = schedule.mask(kinds[node.meta["region"]]) if "region" in node.meta else ()
            total += moves.find_collective(node).nbytes * (len(STEPS) - sum(reused))
        return total, shards.axes[0].axis.dim

    every = {count_bytes(each) for each in (2, 3)}
    assert len({total for total, _ in every}) == 2, "both send alike"
    assert count_bytes(None) == min(every) and min(every)[1] == dim


@pytest.mark.parametrize(("num_ranks", "dim"), [(2, 3), (3, 2), (4, 3), (5, 3)])
def test_of_axes_that_send_alike_the_one_that_is_padded_least_is_divided(num_ranks, dim):
    """T, H, W have 3, 4, 2 positions; full attention mixes all of them."""
    (sharded,) = explain(BY_NAME["Full3d"], ranks=num_ranks).communication.sharded
    assert sharded.axis.dim == dim


def test_a_region_switches_to_the_axis_that_is_padded_least():
    """H has 3 positions, W 4: temporal attention of 2 ranks runs on shards of W."""
    call = BY_NAME["Factorized"].call(sizes=Sizes(frames=4, height=6, width=8))
    found = pabc.explain(BY_NAME["Factorized"].model(), ranks=2, shard=2, **call).communication
    (temporal,) = (r for r, k in zip(found.regions, found.kinds, strict=True) if k == "temporal")
    batch, frames, width = 2, 2, 16
    assert [each.nbytes for each in temporal] == [batch * frames * 3 * 2 * width * 4] * 2


def test_an_axis_of_one_position_is_not_divided():
    call = BY_NAME["Factorized"].call(sizes=Sizes(frames=1, height=8, width=8))
    message = r"shard: expected a token dimension of the latents, \[3, 4\], found 2"
    with pytest.raises(ValueError, match=message):
        pabc.explain(BY_NAME["Factorized"].model(), ranks=2, shard=2, **call)


class Shuffle(nn.Module):
    """The first three tokens come last: rows are no longer apart. What has no part in that stays
    divided."""

    def forward(self, x, *rest):
        return torch.cat([x[:, 3:], x[:, :3]], dim=1)


def test_a_model_whose_positions_are_mixed_is_refused():
    torch.manual_seed(0)
    model = Image(Shuffle(), Branch(), Mlp()).eval()
    with pytest.raises(ValueError, match="found none whose positions can be told apart"):
        pabc.explain(model, ranks=2, **BY_NAME["JointImage"].call())


def capture_changed(change):
    """The marked graph of two layers of which `change` has changed something, and its inputs."""
    torch.manual_seed(0)
    model = Factorized(layers=2)
    change(model)
    call = BY_NAME["Factorized"].call()
    return run_to(capture_call(model, call), "regions"), [*call.values()]


def test_positions_that_are_mixed_on_the_way_are_gathered():
    """The second layer's frames have their places mixed: H is nowhere in what becomes of them."""
    gm, inputs = capture_changed(lambda model: model.spatial[1].insert(0, Shuffle()))
    graphs = shard_all(gm, 2, axis=2)
    assert_ranks_equal_one(gm, inputs, graphs)
    kinds = [kind for kind, _ in facts_of(gm)[Marked].branches]
    sends = [node.meta["region"] for node in find_nodes(graphs[0].graph) if "region" in node.meta]
    assert {kinds[region] for region in sends} == {"temporal"}


class TwoNorms(Branch):
    """Attention to the sum of two norms of one hidden state."""

    def __init__(self, kind):
        super().__init__(kind)
        self.other = nn.LayerNorm(self.norm.normalized_shape)

    def forward(self, x, emb_BD, text=None):
        return x + self.attn(self.norm(x) + self.other(x))


def test_what_a_region_needs_twice_is_sent_once():
    def change(model):
        model.temporal[1][0] = TwoNorms("temporal")

    gm, inputs = capture_changed(change)
    graphs = shard_all(gm, 2, axis=2)
    assert_ranks_equal_one(gm, inputs, graphs)
    sent = Counter(node.meta.get("region") for node in find_nodes(graphs[0].graph))
    assert sorted(sent.values()) == [1, 2, 2]


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_the_user_chooses_the_axis(dim):
    (sharded,) = explain(ranks=3, shard=dim).communication.sharded
    assert (str(sharded.axis), sharded.ranks) == (f"x_bcthw[{dim}]", 3)


def test_slots_hold_shards():
    """T, of 3, on 2 ranks: 2 frames each; 8 places a frame."""
    whole, local = explain(), explain(ranks=2, shard=2)
    for region, part in zip(whole.regions, local.regions, strict=True):
        ((shape,), (found,)) = region.cuts, part.cuts
        at = 0 if region.kind in ("spatial", "cross") or shape[0] == 6 else 1
        expected = list(shape)
        expected[at] = shape[at] // 3 * 2
        assert list(found) == expected, region
    assert local.nbytes == whole.nbytes * 2 // 3
    assert sum(local.flops.values()) < sum(whole.flops.values())


def test_what_a_plan_sends():
    """Bytes by hand: 2 ranks, 2 of 3 frames each, 8 places a frame (4 a rank), width 16, float32,
    batch 2; the output has 3 channels of 8 x 4."""
    found = explain(ranks=2, shard=2, schedule=PAB)
    communication, plan = found.communication, found.plan
    switch = 2 * 2 * 4 * 16 * 4
    output = 2 * 3 * 2 * 8 * 4 * 4
    computed = [step % 4 == 0 for step in STEPS]
    assert communication.bytes_at(plan).tolist() == [output + 2 * switch * c for c in computed]
    assert communication.calls_at(plan).tolist() == [1 + 2 * c for c in computed]
    assert communication.ranks == 2
    total = 12 * output + 3 * 2 * switch
    without = 12 * (output + 2 * switch)
    text = str(found)
    assert "ranks: 2, x_bcthw[2] among 2" in text
    assert f"({without} bytes) without reuse" in text
    assert f"({total} bytes) with, {total / without:.2f} of it" in text
    assert "temporal: all_to_all 2 x" in text and "spatial: nothing" in text


def test_a_mesh_of_two_sizes_divides_samples_first():
    found = explain(ranks=(2, 3), schedule=PAB).communication
    assert [(each.axis.dim, each.ranks) for each in found.sharded] == [(0, 2), (2, 3)]
    assert found.ranks == 6
    alone = explain(ranks=(2, 1), schedule=PAB).communication
    assert not any(alone.regions) and [each.op for each in alone.outside] == ["all_gather"]


def test_one_rank_is_no_mesh(captured):
    gm = run_to(captured(BY_NAME["Full3d"])[1], "regions")
    for shard in (shard_tokens, shard_batch):
        assert apply(shard, gm, Denoised, ranks=Ranks(1, 0, GROUP)) == (gm, None)
    assert explain(ranks=1).communication is None


def test_attention_without_a_rule_is_named():
    found = explain(BY_NAME["Windowed"], ranks=2)
    assert len(found.communication.gathered) == 2
    for name in found.communication.gathered:
        assert f"  {name}: no rule for its ops; every rank computes it" in str(found)


def test_outputs_are_left_in_shards(captured):
    case = BY_NAME["Factorized"]
    gm = run_to(captured(case)[1], "regions")
    graphs = shard_all(gm, 2, axis=2, output="sharded")
    assert not any("region" not in node.meta for node in find_nodes(graphs[0].graph))
    inputs = [*case.call().values()]
    ((whole,),) = run_ranks([gm], [inputs])
    parts = [part for (part,) in run_ranks(graphs, [inputs] * 2)]
    assert {part.shape for part in parts} == {(2, 3, 2, 8, 4)}
    torch.testing.assert_close(torch.cat(parts, 2)[:, :, :3], whole, rtol=0, atol=TOLERANCE)


def compile_on(mesh, **options):
    return pabc.compile(BY_NAME["Factorized"].model(), PAB, mesh=mesh, backend="eager", **options)


@pytest.fixture
def make_mesh():
    """Meshes of processes that are not there: PyTorch's own stand-in, which sends nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield lambda *sizes, **names: init_device_mesh("cpu", sizes, **names)
    torch.distributed.destroy_process_group()


def test_a_mesh_of_three_dimensions_is_refused(make_mesh):
    names = ("a", "b", "c")
    message = r"mesh: expected one dimension \(tokens\) or two \(samples, tokens\), found 3"
    with pytest.raises(ValueError, match=message + r", \('a', 'b', 'c'\)"):
        compile_on(make_mesh(2, 2, 2, mesh_dim_names=names))


def test_any_sizes_are_refused_with_a_mesh(make_mesh):
    with pytest.raises(ValueError, match="dynamic: expected False with a mesh, found True"):
        compile_on(make_mesh(8), dynamic=True)


@pytest.mark.parametrize("ranks", [0, -1, 2.0, "2", (2, 0), (2, 2, 2), ()])
def test_ranks_that_are_none_are_refused(ranks):
    message = "ranks: expected a number of 1 or more, or two of them, found "
    with pytest.raises(ValueError, match=message):
        explain(ranks=ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": 2}, "shard: expected None without a mesh, found 2"),
        ({"output": "sharded"}, "output: expected 'full' without a mesh, found 'sharded'"),
        ({"output": "local"}, r"output: expected one of \('full', 'sharded'\), found 'local'"),
    ],
)
def test_options_of_a_mesh_are_refused_without_one(options, message):
    with pytest.raises(ValueError, match=message):
        compile_on(None, **options)


@pytest.mark.parametrize("dim", [0, 1, 5, -1])
def test_a_dimension_without_tokens_is_refused(dim):
    message = rf"shard: expected a token dimension of the latents, \[2, 3, 4\], found {dim}"
    with pytest.raises(ValueError, match=message):
        explain(ranks=2, shard=dim)


def test_a_model_without_attention_is_refused():
    torch.manual_seed(0)
    model = Image(Mlp()).eval()
    with pytest.raises(ValueError, match="mesh: expected a model with attention along axes of its"):
        pabc.explain(model, ranks=2, **BY_NAME["JointImage"].call())


def test_a_skipped_call_sends_nothing():
    """A plan without a slot for a coarse region, or with one, tells the same of what runs."""
    sizes = {"spatial": 5, "mlp": 3, "output": 2}
    sent = {name: moves.Collective("all_gather", 2, size) for name, size in sizes.items()}
    communication = Communication(
        sharded=(),
        kinds=("spatial", "mlp", "stack", "model"),
        regions=((sent["spatial"],), (sent["mlp"],), (), ()),
        outside=(sent["output"],),
        covers=((3,),),
    )
    outer = ("stack", "model")
    slots = [SlotSpec(kind, kind, 0, outer=outer) for kind in ("spatial", "mlp")]
    slots += [SlotSpec("stack", "stack", 0, outer=("model",)), SlotSpec("model", "model", 0)]
    for kind, expected in {"spatial": 5, "stack": 2, "model": 0}.items():
        plan = pabc.Schedule.skip((3, 2, 1), (0, 2), kind=kind).plan(slots)
        assert communication.bytes_at(plan).tolist() == [10, expected, 10]
    assert communication.calls_at(plan).tolist() == [3, 0, 3]
