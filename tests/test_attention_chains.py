"""Attention that is written out: other spellings of softmax, linear attention, and what is none."""

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
    split_heads,
)
from reuse import compare_with_hand
from stages import capture_call, run_to
from torch import nn

import pabc
from pabc.passes import tagged

IMAGE = Case("image", nn.Identity, "BCHW", ())
VIDEO = Case("video", nn.Identity, "BCTHW", ())


def scores(q, k):
    return q @ k.transpose(-1, -2)


def exponential(q, k, v):
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def normalized_after(q, k, v):
    s = scores(q, k)
    e = (s - s.max(-1, keepdim=True)[0]).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def log_sum_exp(q, k, v):
    s = scores(q, k)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


def log_softmax(q, k, v):
    return scores(q, k).log_softmax(-1).exp() @ v


def softmax_in_double(q, k, v):
    return torch.softmax(scores(q, k), -1, dtype=torch.float64).to(v.dtype) @ v


def sigmoid(q, k, v):
    return torch.sigmoid(scores(q, k) - 3) @ v


def squared_relu(q, k, v):
    return (torch.relu(scores(q, k)) ** 2 / k.shape[-2]) @ v


def normalized_operands(q, k, v):
    return (10 * scores(F.normalize(q, dim=-1), F.normalize(k, dim=-1))).softmax(-1) @ v


def heads_last(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bijh", q, k).softmax(2)
    return torch.einsum("bijh,bjhd->bihd", weights, v).transpose(1, 2)


def masked(q, k, v):
    s = scores(q, k)
    far = torch.ones_like(s, dtype=torch.bool).triu(2)
    s = s.masked_fill(far, float("-inf")).softmax(-1)
    return s.masked_fill(far, 0.0) @ v


def sink(q, k, v):
    s = scores(q, k)
    return torch.cat([s, torch.ones_like(s[..., :1])], -1).softmax(-1)[..., :-1] @ v


def sink_first(q, k, v):
    s = scores(q, k)
    return torch.cat([torch.ones_like(s[..., :1]), s], -1).softmax(-1)[..., 1:] @ v


def multiplied_and_summed(q, k, v):
    weights = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def vector_dot(q, k, v):
    return torch.linalg.vecdot(q.unsqueeze(-2), k.unsqueeze(-3)).softmax(-1) @ v


def three_operands(q, k, v):
    weights = torch.einsum("bhid,bhjd,h->bhij", q, k, torch.ones(HEADS)).softmax(-1)
    return torch.einsum("bhij,bhjd,bhi->bhid", weights, v, torch.ones(q.shape[:3]))


def ellipsis(q, k, v):
    weights = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


def difference(q, k, v):
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return (scores(q1, k1).softmax(-1) - 0.3 * scores(q2, k2).softmax(-1)) @ v


SPELLINGS = (
    exponential,
    normalized_after,
    log_sum_exp,
    log_softmax,
    softmax_in_double,
    sigmoid,
    squared_relu,
    normalized_operands,
    heads_last,
    masked,
    sink,
    sink_first,
    multiplied_and_summed,
    vector_dot,
    three_operands,
    ellipsis,
    difference,
)


def padded_values(q, k, v):
    """The normalizer as one more value, as Sana does it."""
    q, k, v = (x.transpose(-1, -2) for x in (q.relu(), k.relu(), v))
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    y = torch.matmul(torch.matmul(v, k.transpose(-1, -2)), q).double()
    return (y[:, :, :-1] / (y[:, :, -1:] + 1e-6)).transpose(-1, -2).to(q.dtype)


def feature_map(q, k, v):
    """elu + 1 and a normalizer of its own, by einsum."""
    q, k, v = (x.transpose(1, 2) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    kv = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z).transpose(1, 2)


def two_softmaxes(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


def no_normalizer(q, k, v):
    return q @ (k.transpose(-1, -2) @ v / k.shape[-2])


LINEAR = (padded_values, feature_map, two_softmaxes, no_normalizer)


def tag_blocks(*blocks, sizes=None):
    """(kind, whether it is linear) of every attention of an image model."""
    torch.manual_seed(0)
    gm = run_to(capture_call(Image(*blocks), IMAGE.call(0, sizes)), "tag")
    facts = [node.meta["attention"] for node in tagged(gm)]
    return [(fact.kind, fact.linear) for fact in facts]


@pytest.mark.parametrize("attend", SPELLINGS)
def test_softmax_however_it_is_spelled(attend):
    found = tag_blocks(Branch("full", attend), Cross(attend), sizes=Sizes(height=8, width=6))
    assert found == [("full", False), ("cross", False)]


@pytest.mark.parametrize("attend", LINEAR)
def test_linear_attention(attend):
    found = tag_blocks(Branch("full", attend), Cross(attend), sizes=Sizes(height=8, width=6))
    assert found == [("full", True), ("cross", True)]


@pytest.mark.parametrize("attend", LINEAR[:2])
def test_as_many_tokens_as_features_or_text_are_linear_all_the_same(attend):
    sizes = Sizes(batch=2, height=8, width=4, text=8)
    assert WIDTH // HEADS == sizes.text == sizes.height // 2 * sizes.width // 2
    found = tag_blocks(Branch("full", attend), Cross(attend), sizes=sizes)
    assert found == [("full", True), ("cross", True)]


@pytest.mark.parametrize("attend", [heads_last, multiplied_and_summed, padded_values])
def test_the_kinds_of_a_video_model_are_those_of_fused_attention(attend):
    torch.manual_seed(0)
    found = compare_with_hand(Factorized(attend=attend).eval(), VIDEO)
    assert sorted(found.attention.values()) == ["cross", "spatial", "temporal"]
    assert len(found.linear) == (3 if attend in LINEAR else 0)
    assert not found.outside


@pytest.mark.parametrize("attend", [exponential, sink, ellipsis, feature_map, two_softmaxes])
def test_its_region_is_reused(attend):
    torch.manual_seed(0)
    compare_with_hand(Image(Branch("full", attend), Mlp(), Cross(attend)).eval(), IMAGE)


def test_the_table_says_which_is_linear():
    torch.manual_seed(0)
    model = Image(Branch("full", feature_map), Cross()).eval()
    found = pabc.explain(model, **IMAGE.call())
    assert found.linear == ("blocks.0.attn",)
    rows = str(found).splitlines()
    kinds = [line.split("  ", 2)[2].strip() for line in rows if "blocks." in line]
    assert kinds[0].startswith("full, linear  ") and kinds[1].startswith("cross  ")


def test_agents_between_queries_and_keys_are_two_attentions():
    def agents(q, k, v):
        agent = F.avg_pool1d(q.flatten(0, 1).transpose(1, 2), 2).transpose(1, 2)
        agent = agent.unflatten(0, q.shape[:2])
        return scores(q, agent).softmax(-1) @ (scores(agent, k).softmax(-1) @ v)

    found = tag_blocks(Branch("full", agents), sizes=Sizes(height=8, width=6))
    assert found == [("full", False), ("full", False)]


class Mixture(nn.Module):
    """Tokens to slots, an expert per slot, slots to tokens."""

    def __init__(self):
        super().__init__()
        self.slots = nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x, emb, text=None):
        weights = self.slots(x)
        slots = torch.einsum("bns,bnd->bsd", weights.softmax(1), x)
        slots = torch.einsum("bsd,sde->bse", slots, self.experts.bfloat16().float())
        return x + torch.einsum("bns,bse->bne", weights.softmax(2), slots)


class Pooled(nn.Module):
    """Attention pooling with learned weights, and second-order statistics of the channels."""

    def __init__(self):
        super().__init__()
        self.weigh, self.mix = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH * WIDTH, WIDTH)

    def forward(self, x, emb, text=None):
        pooled = torch.einsum("bnk,bnd->bkd", self.weigh(x).softmax(1), x)
        gram = (x.transpose(1, 2) @ x).flatten(1)
        return x + self.mix(pooled) * x.sigmoid() + self.second(gram)[:, None] * x.mean(-1, True)


class Channels(nn.Module):
    """Mixed channels by weights that are cast, and by a matrix from the time."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.matrix = nn.Linear(WIDTH, WIDTH * WIDTH)

    def forward(self, x, emb, text=None):
        matrix = self.matrix(emb).unflatten(-1, (WIDTH, WIDTH))
        y = torch.relu(x @ self.first.weight.double().T.float()) @ self.last.weight.double().float()
        return x + (torch.tanh(y @ matrix) * x) @ matrix


def test_products_that_are_no_attention_are_not_tagged():
    assert tag_blocks(Mixture(), Pooled(), Channels(), Mlp()) == []


def test_linear_attention_of_a_public_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
    ).eval()
    found = pabc.explain(
        model,
        hidden_states=torch.randn(2, 4, 6, 8),
        encoder_hidden_states=torch.randn(2, 5, 8),
        timestep=torch.tensor([3, 3]),
    )
    block = "transformer_blocks.0"
    assert found.attention == {f"{block}.attn1": "full", f"{block}.attn2": "cross"}
    assert found.linear == (f"{block}.attn1",)
    assert not found.outside


class TalkingHeads(Attention):
    """A product with a weight between softmax and values: heads exchange their weights."""

    def __init__(self):
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def heads(self, x, context=None):
        q, k, v = (split_heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        weights = (q @ k.mT).softmax(-1)
        return self.talk(weights.movedim(1, -1)).movedim(-1, 1) @ v


class LearnedPool(Branch):
    """Tokens are summed with learned weights: no queries, no keys."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x, emb_BD, text=None):
        pooled = (self.score(x).softmax(dim=1) * x).sum(dim=1, keepdim=True)
        return super().forward(x + pooled, emb_BD)


def test_a_softmax_over_tokens_that_is_in_no_attention_is_reported():
    talking = Branch()
    talking.attn = TalkingHeads()
    for block, path in ((talking, "blocks.0.attn"), (LearnedPool(), "blocks.0")):
        model = Image(block, Branch())
        call = IMAGE.call()
        found = pabc.explain(model.eval(), **call)
        assert "blocks.1.attn" in found.attention
        (line,) = found.outside
        assert f"({path}): a softmax over tokens that is part of no attention" in line
