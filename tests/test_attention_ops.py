"""Attention ops: those that users register, those that are known, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from models import (
    HEADS,
    WIDTH,
    Attention,
    Branch,
    Case,
    Cross,
    Factorized,
    Image,
    Mlp,
    Sizes,
)
from reuse import compare_with_hand
from stages import capture_call, run_to
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import pabc
from pabc.passes import attention_ops, tagged
from pabc.passes.attention_calls import attention_call

IMAGE = Case("image", nn.Identity, "BCHW", ())
VIDEO = Case("video", nn.Identity, "BCTHW", ())


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).clone()


@torch.library.custom_op("pabc_test::heads_first", mutates_args=())
def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@heads_first.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("pabc_test::tokens_first", mutates_args=())
def tokens_first(scale: float, v: Tensor, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D], operands in another order, the result second of three."""
    out = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
    return q.new_zeros(q.shape[:3]), out, q.new_zeros(2)


@tokens_first.register_fake
def _(scale: float, v: Tensor, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape[:3]), torch.empty_like(q), q.new_empty(2)


@torch.library.custom_op("pabc_test::packed", mutates_args=())
def packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """[T, H, D]: as many sequences as `starts` has entries, all of one length."""
    q, k, v = (x.unflatten(0, (len(starts), -1)).transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v).transpose(1, 2).flatten(0, 1).contiguous()


@packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("pabc_test::writes", mutates_args=("out",))
def writes(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    out.copy_(sdpa(q, k, v))


@writes.register_fake
def _(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    pass


def attend_heads_first(q, k, v):
    return torch.ops.pabc_test.heads_first(q, k, v)


def attend_tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return torch.ops.pabc_test.tokens_first(0.5, v, q=q, k=k)[1].transpose(1, 2)


def attend_packed(q, k, v):
    starts = torch.zeros(len(q))
    flat = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)]
    out = torch.ops.pabc_test.packed(*flat, starts)
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def attend_written(q, k, v):
    out = torch.empty_like(q)
    torch.ops.pabc_test.writes(out, q, k, v)
    return out


@pytest.fixture
def registered(monkeypatch):
    """Four ops registered, as long as the test runs."""
    monkeypatch.setattr(attention_ops, "_REGISTRY", dict(attention_ops._REGISTRY))
    pabc.register_attention_op(heads_first, layout="bhsd")
    pabc.register_attention_op(
        "pabc_test::tokens_first", query="q", key="k", value="v", output=1, layout=["bshd"]
    )
    pabc.register_attention_op(torch.ops.pabc_test.packed, layout="thd")
    pabc.register_attention_op(
        torch.ops.pabc_test.writes.default, query=1, key=2, value=3, layout="bmhk", output="out"
    )
    pabc.register_attention_op(
        "pabc_test::writes", query=1, key=2, value=3, layout="bhmk", output="out"
    )
    return attention_ops._REGISTRY


@pytest.mark.parametrize("attend", [attend_heads_first, attend_tokens_first, attend_written])
def test_registered_ops_are_reused_like_fused_attention(attend, registered):
    torch.manual_seed(0)
    found = compare_with_hand(Factorized(attend=attend).eval(), VIDEO)
    assert sorted(found.attention.values()) == ["cross", "spatial", "temporal"]
    assert not found.outside
    torch.manual_seed(0)
    fused = pabc.explain(Factorized().eval(), **VIDEO.call())
    assert found.flops == fused.flops
    assert [r.cuts for r in found.regions] == [r.cuts for r in fused.regions]


def test_of_packed_sequences_only_cross_attention_is_told(registered):
    torch.manual_seed(0)
    model = Image(Branch("full", attend_packed), Cross(attend_packed), Mlp()).eval()
    with pytest.raises(ValueError, match=r"sequences are packed .* state it with kinds=\{'blocks"):
        pabc.explain(model, **IMAGE.call())
    found = compare_with_hand(model, IMAGE, kinds={"blocks.0.*": "full"})
    assert list(found.attention.values()) == ["full", "cross"]


def test_unregistered_ops_are_no_attention():
    gm = run_to(capture_call(Image(Branch("full", attend_heads_first)), IMAGE.call()), "tag")
    assert not tagged(gm)


def test_an_overload_comes_before_the_op(registered):
    gm = run_to(capture_call(Image(Branch("full", attend_written)), IMAGE.call()), "tag")
    (node,) = tagged(gm)
    assert str(attention_call(node).layout) == "bhmk"
    registered.pop("pabc_test::writes")


def test_fewer_key_heads():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    torch.manual_seed(0)
    model = Image(Branch("full", attend), Mlp()).eval()
    found = compare_with_hand(model, IMAGE)
    torch.manual_seed(0)
    assert found.flops == pabc.explain(Image(Branch(), Mlp()).eval(), **IMAGE.call()).flops


def test_flex_attention_with_a_score_function_that_reads_the_model():
    class Flex(Attention):
        def __init__(self):
            super().__init__(self.flex)
            self.bias = nn.Parameter(torch.linspace(-1, 1, 32))

        def flex(self, q, k, v):
            bias = self.bias
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[i] - bias[j])

    torch.manual_seed(0)
    model = Image(Branch(), Mlp(), Branch()).eval()
    for i in (0, 2):
        model.blocks[i].attn = Flex()
    found = compare_with_hand(model, IMAGE)
    assert list(found.attention.values()) == ["full", "full"]
    assert not found.outside


@pytest.mark.parametrize(
    ("error", "message", "op", "options"),
    [
        (TypeError, "op: expected an operator .* found function", sdpa, {}),
        (ValueError, "op: expected a name like .* found 'attend'", "attend", {}),
        (ValueError, "layout: expected one letter .* found 'bhd'", heads_first, {"layout": "bhd"}),
        (ValueError, "layout: .* found 'bsshd'", heads_first, {"layout": "bsshd"}),
        (ValueError, "layout: .* found 'bstd'", heads_first, {"layout": "bstd"}),
        (ValueError, "layout: .* found None", heads_first, {"layout": [None]}),
        (ValueError, "at least one layout", heads_first, {"layout": []}),
        (ValueError, r"query: .* tensor .*\['q', 'k', 'v'\].* 'x'", heads_first, {"query": "x"}),
        (ValueError, "value: expected a tensor .* found 3", heads_first, {"value": 3}),
        (ValueError, "query: expected a tensor .* found 'scale'", tokens_first, {"query": "scale"}),
        (ValueError, "output: expected 0 to 0, found 1", heads_first, {"output": 1}),
        (ValueError, r"output: .* written to, \['out'\], found 'q'", writes, {"output": "q"}),
    ],
)  # fmt: skip
def test_a_registration_that_cannot_be_is_refused(error, message, op, options):
    with pytest.raises(error, match=message):
        pabc.register_attention_op(op, **{"layout": "bhsd", **options})


def test_a_call_that_is_not_as_registered_is_refused(registered):
    model = Image(Branch("full", attend_heads_first))
    pabc.register_attention_op(heads_first, layout="shd")
    with pytest.raises(ValueError, match=r"operands of layout shd, found shapes \[\(2, 2, 8, 8\)"):
        pabc.explain(model.eval(), **IMAGE.call())


def test_ops_of_kernel_libraries_are_known_by_name(monkeypatch):
    """Whatever the number of results, dtype or further arguments: by position."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define(
            "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, bool causal, "
            "Tensor? alibi_slopes) -> (Tensor, Tensor, Tensor, Tensor)"
        )

        def forward(q, k, v, dropout_p, causal, alibi_slopes):
            out = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
            return out, q.new_zeros(2), q.new_zeros(2), q.new_zeros(2)

        library.impl("_flash_attn_forward", forward, "CompositeExplicitAutograd")

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            result = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, False, None)
            return result[0].transpose(1, 2)

        torch.manual_seed(0)
        found = compare_with_hand(Image(Branch("full", attend), Cross(attend)).eval(), IMAGE)
        assert list(found.attention.values()) == ["full", "cross"]


def test_multi_head_attention_of_torch_without_its_fast_path():
    """torch.export never takes the fast path, whose results differ in the last bits."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x, emb, text=None):
            return x + self.attn(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model = Image(Block(), Mlp()).eval()
    fast = pabc.compile(model, pabc.Schedule.none(range(1)), backend="eager")
    call = IMAGE.call(0, Sizes(height=4))
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert torch.equal(fast(**call), model(**call))
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
