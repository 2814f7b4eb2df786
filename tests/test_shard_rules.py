"""What each op does to shards, by its rule: simulated ranks give the bits of one."""

import pytest
import torch
import torch.nn.functional as F
from sharded.simulator import GROUP, run_ranks
from stages import capture_call, run_to
from torch import nn

from pabc.passes import Axis, Ranks, find_collectives
from pabc.passes.ir import aten
from pabc.passes.relations.table import RELATIONS
from pabc.passes.sharding.rules import BY_POSITION, RULES
from pabc.passes.sharding.sharder import Sharder

B, T, S, D = 2, 5, 3, 4
AXIS = Axis("x", 1)
NUM_RANKS = (2, 4, 5)
"""Of 5 positions, the last of 2 ranks has two and one of padding, the third of 4 one and one, the
last only padding; each of 5 has one."""


class Function(nn.Module):
    """x + 1, which makes x the latents, and f of it, or of it and y; y is not divided."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        x = x + 1  # as given, x is whole on every rank
        return x, self.function(x, y) if takes_two(self.function) else self.function(x)


def takes_two(function):
    return function.__code__.co_argcount == 2


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


WEIGHT, BIAS, TABLE = random(6, D), random(6), random(T, 1, D)
KERNEL, KERNEL_1D, KERNEL_ACROSS = random(2, B, 1, 1), random(4, S, 3), random(3, D, 1, 3)
SCALE, WEIGHT_ACROSS = random(S, D), random(2, T)


def text_before(x, y):
    """Tokens of y, then those of x, in one sequence."""
    return torch.cat([y[:, 0], x[:, :, 0]], dim=1)


def text_around(x, y):
    return torch.cat([y[:, 0], x.flatten(1, 2), y[:, 1]], dim=1)


def turn_pairs(x):
    """(B, T) to (B, T, T)."""
    return (x[:, :, None] - x[:, None]).transpose(1, 2).exp()


def heads(x):
    """(B, S, T, D): S is where heads are."""
    return x.transpose(1, 2)


def attend_rows(x, y):
    return F.scaled_dot_product_attention(x, y, y)


def attend_masked(x, y):
    return F.scaled_dot_product_attention(x, x, x, y[..., :1] > 0)


def attend_whole_keys(x, y):
    return F.scaled_dot_product_attention(heads(x), y[:, :S], y[:, :S])


def attend_causal(x, y):
    return F.scaled_dot_product_attention(heads(x), y[:, :S], y[:, :S], is_causal=True)


def attend_by_query(x, y):
    mask = heads(y)[..., :1] > 0
    return F.scaled_dot_product_attention(heads(x), y[:, :S], y[:, :S], mask.expand(B, S, T, S))


def attend_across(x):
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x))


def attend_across_masked(x, y):
    mask = torch.cat([y[:, :1, :1, :1], y[:, :1, :1] ** 2], dim=-1) > 0
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), mask.expand(B, S, T, T))


def attend_joint(x, y):
    both = torch.cat([y[:, :S, :2], heads(x)], dim=2)
    return F.scaled_dot_product_attention(both, both, both)


def scatter_tokens(x, y):
    both = text_before(x, y)
    return torch.slice_scatter(both, x[:, :, 1], 1, S, S + T)


BY_POSITIONS = {
    "pointwise": lambda x: F.gelu(x).pow(2) + 1,
    "scalar first": lambda x: 1 - x,
    "constant of the axis": lambda x: x * TABLE,
    "constant beside the axis": lambda x: x + BIAS[:D],
    "not divided": lambda x, y: x * y,
    "not divided, before": lambda x, y: y - x,
    "one position": lambda x, y: x * y[:, :1],
    "fewer dimensions": lambda x, y: x.permute(0, 2, 3, 1) + y[0, :, 0, 0],
    "where": lambda x, y: torch.where(y > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.5),
    "to another dtype": lambda x: x.double().mul(2).float(),
    "batch and axis in one": lambda x: x.reshape(B * T, S, D).sin(),
    "axis and places in one": lambda x: x.flatten(1, 2).sin(),
    "all in one": lambda x: x.flatten().sin(),
    "out of one again": lambda x: x.flatten(0, 2).sin().unflatten(0, (B, T, S)).cos(),
    "places first": lambda x: x.transpose(1, 2).reshape(B * S, T, D),
    "expand beside": lambda x: x.unsqueeze(1).expand(B, 7, T, S, D),
    "expand": lambda x: x[:, :, :1].expand(B, T, S, D),
    "permute": lambda x: x.permute(3, 1, 0, 2),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).sin().squeeze(1),
    "squeeze of all": lambda x: x[:, :, :1].squeeze().sin(),
    "squeeze of the axis": lambda x: x.squeeze(1).sin(),
    "squeeze of several": lambda x: x[:, :, :1].squeeze((1, 2)).sin(),
    "clone": lambda x: x.transpose(0, 1).contiguous(),
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
    "layer_norm": lambda x: F.layer_norm(x, (D,)),
    "layer_norm of two": lambda x: F.layer_norm(x, (S, D), SCALE),
    "rms_norm": lambda x: F.rms_norm(x, (D,)),
    "conv2d of samples": lambda x: F.conv2d(x.transpose(0, 1), KERNEL),
    "conv1d of samples": lambda x: F.conv1d(x.flatten(0, 1), KERNEL_1D),
    "group_norm of samples": lambda x: F.group_norm(x.flatten(0, 1), S),
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x.mean(-1),
    "mean, kept": lambda x: x.mean((0, -1), keepdim=True),
    "sum": lambda x: x.sum(2),
    "amax": lambda x: x.amax(-1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "slice": lambda x: x[:, :, 1:],
    "select": lambda x: x[:, :, 1] + x[..., 0, -1:],
    "split": lambda x: x.split(3, dim=-1)[1],
    "split with sizes": lambda x: x.split([1, 2], dim=2)[1],
    "chunk": lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], -1),
    "unbind": lambda x: x.unbind(2)[1],
    "cat": lambda x, y: torch.cat([y, x, x], dim=-1),
    "stack": lambda x, y: torch.stack([x, y], dim=1),
    "stack after": lambda x, y: torch.stack([y, x], dim=-1),
    "cat of tokens": text_before,
    "cat of tokens around": text_around,
    "slice of own tokens": lambda x, y: text_before(x, y)[:, S:],
    "own tokens of a split": lambda x, y: text_before(x, y).split([S, T], dim=1)[1],
    "own tokens between": lambda x, y: text_around(x, y)[:, S : S + T * S],
    "slice_scatter": scatter_tokens,
    "einsum": lambda x: torch.einsum("btsd,ed->btse", x, WEIGHT),
    "einsum of two": lambda x, y: torch.einsum("btsd,btrd->btsr", x, y),
    "matmul of rows": lambda x: heads(x) @ WEIGHT.T,
    "matmul of batches": lambda x, y: x @ y.transpose(-1, -2),
    "bmm": lambda x, y: torch.bmm(x.flatten(0, 1), y.flatten(0, 1).transpose(1, 2)),
    "attention by sequences": attend_rows,
    "attention by sequences, masked": attend_masked,
    "attention to whole keys": attend_whole_keys,
    "attention to whole keys, masked": attend_by_query,
    "text of a cat": lambda x, y: text_before(x, y)[:, :S],
}
BY_HEADS = {
    "attention across": attend_across,
    "attention across, masked": attend_across_masked,
    "attention with text": attend_joint,
    "causal attention to whole keys": attend_causal,
}
WHOLE = {
    "softmax across": lambda x: x.softmax(1),
    "mean across": lambda x: x.mean(1),
    "mean of all": lambda x: x.mean(),
    "layer_norm across": lambda x: F.layer_norm(x, (T, S, D)),
    "slice across": lambda x: x[:, 1:4],
    "select across": lambda x: x[:, -1],
    "split across": lambda x: x.split([2, 3], dim=1)[1],
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "index": lambda x: x[:, torch.tensor([2, 0, 2])],
    "convolution across": lambda x: F.conv2d(x.transpose(1, 3), KERNEL_ACROSS, padding=(0, 1)),
    "linear across": lambda x: F.linear(x.transpose(1, 3), WEIGHT_ACROSS),
    "product across": lambda x: x.permute(0, 2, 3, 1) @ heads(x),
    "tokens over the bounds": lambda x, y: text_before(x, y)[:, 1:6],
    "cat along the axis twice": lambda x: torch.cat([x, x], dim=1),
    "each position with each": lambda x: turn_pairs(x[:, :, 0, 0]),
    "folded in another order": lambda x: x.reshape(B, S, T, D),
}


@pytest.fixture
def x_and_y():
    return random(B, T, S, D), torch.randn(B, T, S, D, generator=torch.Generator().manual_seed(1))


def shard(gm, ranks, output="full"):
    made = Sharder(gm, ["x"], ranks, [AXIS], AXIS, output, early=True).run()
    made.graph.lint()
    return made


@pytest.mark.parametrize("name", [*BY_POSITIONS, *BY_HEADS, *WHOLE])
def test_ranks_give_what_one_gives(name, x_and_y):
    """The whole is equal; where each keeps its positions, rules by position send nothing."""
    function = (BY_POSITIONS | BY_HEADS | WHOLE)[name]
    x, y = x_and_y
    gm = run_to(capture_call(Function(function), {"x": x, "y": y}), "axes")
    ((_, expected),) = run_ranks([gm], [[x, y]])
    for num_ranks in NUM_RANKS:
        graphs = [shard(gm, Ranks(num_ranks, rank, GROUP)) for rank in range(num_ranks)]
        for _, found in run_ranks(graphs, [[x, y]] * num_ranks):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    left = shard(gm, Ranks(2, 0, GROUP), "sharded").graph
    sent = {each.op for each in find_collectives(left)}
    if name in BY_HEADS:
        assert "all_to_all" in sent
    else:
        assert sent == ({"all_gather"} if name in WHOLE else set())


def test_ops_by_position_have_a_relation_and_no_rule():
    attention = {aten.scaled_dot_product_attention.default}  # its relation has no entry
    assert BY_POSITION - RELATIONS.keys() == attention
    assert not BY_POSITION & RULES.keys()
