"""Lowering of short attention: what is done to queries and keys before it becomes the kernel's."""

import pytest
import torch
from graphs import assert_same_graph
from lowering import lower
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from pabc.kernels.short_attention import OP

pytestmark = pytest.mark.kernels
N, T, H, D = 3, 6, 2, 8


def written_out(x, weight, eps=1e-6):
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype)


def by_product(x, weight, eps=1e-6):
    return x * torch.rsqrt((x * x).mean(-1, True) + eps) * weight


def by_op(x, weight, eps=1e-6):
    return rms_norm(x, [x.shape[-1]], weight, eps)


def without_weight(x, weight):
    return rms_norm(x, [x.shape[-1]], None, 1e-6)


def halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def halves_by_slices(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def neighbors(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def neighbors_by_halves(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def in_float32(x, cos, sin):
    return neighbors(x.float(), cos.float(), sin.float()).to(x.dtype)


def by_negated_sines(x, cos, sin):
    return halves(x, cos, -sin)


def backwards(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos - torch.cat([-b, a], -1) * sin


def in_part(x, cos, sin):
    a, b = x.split([4, x.shape[-1] - 4], -1)
    return torch.cat([halves(a, cos[..., :4], sin[..., :4]), b], -1)


class Attend(nn.Module):
    """Of a packed projection; heads before or after what is done to q and k."""

    def __init__(self, norm=None, turn=None, *, first="norm", by_head=True, k_turn=None):
        super().__init__()
        self.norm, self.turn, self.first, self.by_head = norm, turn, first, by_head
        self.k_turn = k_turn or turn

    def forward(self, qkv, q_weight, k_weight, cos, sin):
        q, k, v = qkv.unbind(2)
        v = v.transpose(1, 2)
        if self.by_head:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        else:
            cos, sin = cos[:, None], sin[:, None]
        q = self.prepare(q, q_weight, self.turn, cos, sin)
        k = self.prepare(k, k_weight, self.k_turn, cos, sin)
        if not self.by_head:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def prepare(self, x, weight, turn, cos, sin):
        if self.norm is not None and self.first == "norm":
            x = self.norm(x, weight)
        if turn is not None:
            x = turn(x, cos, sin)
        return self.norm(x, weight) if self.norm is not None and self.first == "turn" else x


def make(turn, dtype=torch.float32):
    angle = torch.rand(T, D // 2) * 6
    by_neighbors = turn in (neighbors, neighbors_by_halves, in_float32)
    angle = angle.repeat_interleave(2, -1) if by_neighbors else torch.cat([angle, angle], -1)
    qkv = torch.randn(N, T, 3, H, D)
    made = (qkv, *(torch.rand(2, D) + 0.5), angle.cos(), angle.sin())
    return tuple(x.to(dtype) for x in made)


def fused(lowered):
    """(is the norm the kernel's, which pairs it turns), of the one call of the kernel."""
    (call,) = lowered.graph.find_nodes(op="call_function", target=OP)
    return call.args[4] is not None, call.args[10]


def check(model, inputs, tolerance=1e-5):
    torch.manual_seed(0)
    gm, lowered = lower(model, *inputs)
    (found,), (expected,) = lowered(*inputs), gm(*inputs)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert found.stride() == expected.stride()
    return lowered


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("norm", [written_out, by_product, by_op, without_weight])
def test_norms(norm, by_head):
    lowered = check(Attend(norm, by_head=by_head), make(None))
    assert fused(lowered) == (True, "none")
    ops = {str(n.target) for n in lowered.graph.nodes}
    assert not any("mean" in op or "rms_norm" in op for op in ops)


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(
    ("turn", "pairs"),
    [
        (halves, "halves"),
        (halves_by_slices, "halves"),
        (neighbors, "neighbors"),
        (neighbors_by_halves, "neighbors"),
        (in_float32, "neighbors"),
        (by_negated_sines, "halves"),
    ],
)
def test_rotary_embeddings(turn, pairs, by_head):
    lowered = check(Attend(turn=turn, by_head=by_head), make(turn))
    assert fused(lowered) == (False, pairs)
    made = {n.target for n in lowered.graph.nodes}
    assert not {torch.ops.aten.stack.default, torch.ops.aten.cat.default} & made
    assert fused(check(Attend(by_op, turn, by_head=by_head), make(turn))) == (True, pairs)


def test_a_norm_and_an_embedding_are_computed_by_the_kernel():
    expected = """
        graph(%qkv, %q_weight, %k_weight, %cos, %sin):
            %parts = unbind.int(%qkv, 2)
            %q0 = getitem(%parts, 0)
            %q = transpose.int(%q0, 1, 2)
            %k0 = getitem(%parts, 1)
            %k = transpose.int(%k0, 1, 2)
            %v0 = getitem(%parts, 2)
            %v = transpose.int(%v0, 1, 2)
            %c = reshape(%cos, [6, 8])
            %s = reshape(%sin, [6, 8])
            %o = pabc.short_attention(%q, %k, %v, None, %q_weight, %k_weight, %c, %s, None, 1e-06, 'halves')
            %t = transpose.int(%o, 1, 2)
            %permuted = permute(%t, [0, 2, 1, 3])
            %copied = clone(%permuted, memory_format=torch.contiguous_format)
            %result = permute(%copied, [0, 2, 1, 3])
            return (%result,)
    """  # noqa: E501
    assert_same_graph(check(Attend(by_op, halves), make(halves)), expected)


def test_both_in_bfloat16_with_float32_between():
    inputs = make(in_float32, torch.bfloat16)
    assert fused(check(Attend(written_out, in_float32), inputs, 0.02)) == (True, "neighbors")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Attend(turn=backwards), (False, "none")),
        (Attend(turn=in_part), (False, "none")),
        (Attend(turn=halves, k_turn=neighbors), (False, "none")),
        (Attend(by_op, halves, first="turn"), (True, "none")),
        (Attend(lambda x, w: by_op(x, w, 1e-6 if w.sum() is None else 1e-5)), (True, "none")),
    ],
    ids=["backwards", "in part", "q and k differ", "turned before the norm", "another eps"],
)
def test_what_the_kernel_does_not_do_is_left_before_it(model, expected):
    assert fused(check(model, make(model.turn))) == expected


def test_an_embedding_by_head_is_not_one_by_token():
    class ByHead(nn.Module):
        def forward(self, q, k, v, cos, sin):
            q, k = (halves(x, cos, sin) for x in (q, k))
            return scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    q, k, v = torch.randn(3, N, H, T, D)
    cos, sin = torch.rand(2, H, 1, D)
    gm, lowered = lower(ByHead(), q, k, v, cos, sin)
    assert fused(lowered) == (False, "none")
    torch.testing.assert_close(
        lowered(q, k, v, cos, sin), gm(q, k, v, cos, sin), atol=1e-5, rtol=1e-5
    )
