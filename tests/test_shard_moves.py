"""Tensors cut, gathered and switched between simulated ranks; padding is NaN where it may be."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sharded.simulator import GROUP, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

from pabc.passes.ir import aten, value
from pabc.passes.sharding import moves
from pabc.passes.sharding.places import AxisPlace, Ranks

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SIZE = st.integers(1, 3)
LENGTH = st.integers(1, 7)
NUM_RANKS = st.integers(1, 5)


def positions(place, rank, share):
    """Indices in the dimension of a place that a rank has: -1 for padding."""
    own = range(rank * share, (rank + 1) * share)
    first, last = place.low, place.low + place.before * place.size * place.after
    middle = [
        first + (b * place.size + i) * place.after + a if i < place.size else -1
        for b in range(place.before)
        for i in own
        for a in range(place.after)
    ]
    return [*range(first), *middle, *range(last, last + place.high)]


def shard_of(x, place, rank, num_ranks, padding=0.0):
    """A rank's positions of a place, picked one by one."""
    index = torch.tensor(positions(place, rank, -(-place.size // num_ranks)))
    picked = x.index_select(place.dim, index.clamp(min=0))
    shape = [1] * x.ndim
    shape[place.dim] = -1
    return torch.where((index < 0).view(shape), torch.tensor(padding, dtype=x.dtype), picked)


def write(move, x, places, ranks):
    """The graph in which a rank's move of such a tensor is written."""
    graph = Graph()

    def call(op, *args, **kwargs):
        node = graph.call_function(op, args, kwargs)
        args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*args, **kwargs)
        return node

    source = graph.placeholder("x")
    with FakeTensorMode() as mode:
        source.meta["val"] = mode.from_tensor(x)
        made = move(call, source, *places, ranks)
    graph.output(made)
    graph.lint()
    return GraphModule({}, graph), value(made).shape


def run_move(move, inputs, places):
    """Applies a move on each rank: `inputs` are what the ranks have."""
    num_ranks = len(inputs)
    written = [
        write(move, x, places, Ranks(num_ranks, rank, GROUP)) for rank, x in enumerate(inputs)
    ]
    results = run_ranks([gm for gm, _ in written], [[x] for x in inputs])
    assert [result.shape for result in results] == [shape for _, shape in written]
    return results


@st.composite
def places(draw, *, others=False):
    """A tensor and a place in it; with tokens of others, where asked."""
    lead, rest = (draw(st.lists(SIZE, max_size=2)) for _ in range(2))
    before, size, after = draw(SIZE), draw(LENGTH), draw(SIZE)
    low, high = (draw(st.integers(0, 2)) if others else 0 for _ in range(2))
    sizes = (*lead, low + before * size * after + high, *rest)
    return AxisPlace(sizes, len(lead), before, size, after, low, high)


@st.composite
def pairs(draw):
    """Two places in one tensor, in one dimension or in two."""
    lead, middle, rest = (draw(st.lists(SIZE, max_size=1)) for _ in range(3))
    a, b = ((draw(SIZE), draw(LENGTH), draw(SIZE)) for _ in range(2))
    count_a, count_b = (before * size * after for before, size, after in (a, b))
    if draw(st.booleans()):
        sizes = (*lead, count_a * count_b, *rest)
        first = AxisPlace(sizes, len(lead), a[0], a[1], a[2] * count_b)
        second = AxisPlace(sizes, len(lead), count_a * b[0], b[1], b[2])
    else:
        sizes = (*lead, count_a, *middle, count_b, *rest)
        first = AxisPlace(sizes, len(lead), *a)
        second = AxisPlace(sizes, len(lead) + 1 + len(middle), *b)
    return (first, second) if draw(st.booleans()) else (second, first)


def counted(sizes):
    """A tensor of which no two elements are alike."""
    return torch.arange(1.0, 1 + torch.Size(sizes).numel()).view(sizes)


def shards(x, place, num_ranks, padding=0.0):
    return [shard_of(x, place, rank, num_ranks, padding) for rank in range(num_ranks)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for rank, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), (rank, a, b)


@FEW
@given(places(others=True), NUM_RANKS)
def test_cut_gives_each_rank_its_positions(place, num_ranks):
    x = counted(place.sizes)
    found = run_move(moves.cut, [x] * num_ranks, [place])
    assert_same(found, shards(x, place, num_ranks))


@FEW
@given(places(others=True), NUM_RANKS)
def test_gather_gives_every_rank_the_whole_and_drops_padding(place, num_ranks):
    x = counted(place.sizes)
    found = run_move(moves.gather, shards(x, place, num_ranks, float("nan")), [place])
    assert_same(found, [x] * num_ranks)


@FEW
@given(pairs(), NUM_RANKS)
@example((AxisPlace((6,), 0, 2, 3, 1), AxisPlace((6,), 0, 2, 1, 3)), 2)
def test_switch_goes_from_shards_of_one_axis_to_shards_of_another(pair, num_ranks):
    old, new = pair
    x = counted(old.sizes)
    found = run_move(moves.switch, shards(x, old, num_ranks, float("nan")), [old, new])
    assert_same(found, shards(x, new, num_ranks))


@st.composite
def sequences(draw):
    """(B, H, tokens, D), with the places of an axis of the tokens and of the heads."""
    batch, heads, width = draw(SIZE), draw(LENGTH), draw(SIZE)
    before, size, after = draw(SIZE), draw(LENGTH), draw(SIZE)
    low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    sizes = (batch, heads, low + before * size * after + high, width)
    return AxisPlace(sizes, 2, before, size, after, low, high), AxisPlace(sizes, 1, 1, heads, 1)


@FEW
@given(sequences(), NUM_RANKS)
def test_split_heads_gives_all_tokens_of_the_own_heads(sequence, num_ranks):
    place, heads = sequence
    x = counted(place.sizes)
    given_ = shards(x, place, num_ranks, float("nan"))
    assert_same(run_move(moves.split_heads, given_, [place, heads]), shards(x, heads, num_ranks))


@FEW
@given(sequences(), NUM_RANKS)
def test_join_heads_gives_own_tokens_of_all_heads(sequence, num_ranks):
    place, heads = sequence
    x = counted(place.sizes)
    given_ = shards(x, heads, num_ranks, float("nan"))
    assert_same(run_move(moves.join_heads, given_, [place, heads]), shards(x, place, num_ranks))


def test_a_mask_is_padded_with_true():
    """A query that is not there attends to all keys: none would give NaN."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    place = AxisPlace((2, 5), 1, 1, 5, 1)
    found = run_move(moves.cut, [mask] * 2, [place])
    assert_same(found, shards(mask, place, 2, True))
    assert found[1][:, -1].all()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_bytes_are_those_that_leave_the_rank(num_ranks):
    """Of an all-to-all, all shares but one's own; of an all-gather, the shard, to each other."""
    old, new = AxisPlace((4, 6, 2), 0, 1, 4, 1), AxisPlace((4, 6, 2), 1, 1, 6, 1)
    share, part = -(-4 // num_ranks), -(-6 // num_ranks)
    for move, places, op, numel in (
        (moves.switch, [old, new], "all_to_all", share * part * 2),
        (moves.gather, [old], "all_gather", share * 6 * 2),
    ):
        gm, _ = write(move, torch.zeros(share, 6, 2), places, Ranks(num_ranks, 0, GROUP))
        nbytes = 4 * (num_ranks - 1) * numel
        assert moves.find_collectives(gm.graph) == (moves.Collective(op, num_ranks, nbytes),)


def test_waits_are_deferred_to_what_needs_them():
    """What does not need a collective's result lies between its start and its wait."""
    graph = Graph()
    x = graph.placeholder("x")
    sent = graph.call_function(moves.ALL_GATHER, (x, 2, GROUP))
    wait = graph.call_function(moves.WAIT, (sent,))
    view = graph.call_function(aten.view.default, (wait, [-1]))
    meanwhile = graph.call_function(aten.sin.default, (x,))
    needs = graph.call_function(aten.cos.default, (view,))
    graph.output((meanwhile, needs))
    moves.overlap(graph)
    graph.lint()
    order = [node for node in graph.nodes if node.op == "call_function"]
    assert order == [sent, meanwhile, wait, view, needs]


def test_collectives_start_when_their_tensor_is_there():
    """What packs it goes along; what is needed only later comes after the start."""
    graph = Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.sin.default, (x,))
    meanwhile = graph.call_function(aten.cos.default, (x,))
    packed = graph.call_function(aten.permute.default, (made, [1, 0]))
    dense = graph.call_function(aten.clone.default, (packed,))
    sent = graph.call_function(moves.ALL_TO_ALL, (dense, [1, 1], [1, 1], GROUP))
    wait = graph.call_function(moves.WAIT, (sent,))
    graph.output((meanwhile, wait))
    moves.overlap(graph)
    graph.lint()
    order = [node for node in graph.nodes if node.op == "call_function"]
    assert order == [made, packed, dense, sent, meanwhile, wait]
