from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph
from models import (
    CASES,
    HEADS,
    WIDTH,
    Attention,
    Branch,
    Case,
    Cross,
    Factorized,
    Image,
    Mlp,
    OneBranch,
    Sizes,
    attend_baddbmm,
    attend_fused,
    attend_in_float,
    attend_matmul,
)
from stages import apply, capture_call, run_to
from torch import nn

from pabc.passes import Denoised, Enlarged, tag_attention_pass, tagged, verify_tags

BY_NAME = {case.name: case for case in CASES}
IMAGE = Case("image", nn.Identity, "BCHW", ())


def kinds_of(gm):
    return tuple(node.meta["attention"].kind for node in tagged(gm))


def tag(model, call, **config):
    return run_to(capture_call(model, call), "tag", **config)


def tag_core(attend, sizes=None):
    """The kinds found where `attend(q, k, v)` is an image model's self attention."""
    torch.manual_seed(0)
    return kinds_of(tag(Image(Branch("full", attend)), IMAGE.call(0, sizes)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kinds(case: Case, captured):
    assert kinds_of(run_to(captured(case)[1], "tag")) == case.kinds


ALIKE = Sizes(4, 4, 4, 4, 4)
"""Batch, frames, tokens of a frame, and text: four of each."""


def to_fix(*values, reason):
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


ONE_PATCH = "an axis of one patch is taken for the patch's inside, and lost at the projection"
ONE_FRAME = "a frame axis of size one joins the channels when the axes after it are merged"
NOTHING_OUTER = "batch and frames of size one leave no frame axis outside a frame's tokens"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Factorized", ALIKE),
        ("FramesFirst", ALIKE),
        ("Rearranged", ALIKE),
        ("Full3d", Sizes(2, 3, 4, 4, 12)),
        ("JointText", ALIKE),
        ("Packed", Sizes(4, 1, 2, 2, 4)),
        ("Factorized", Sizes(batch=1)),
        ("Factorized", Sizes(text=1)),
        ("Factorized", Sizes(frames=1)),
        ("Factorized", Sizes(height=2)),
        ("Factorized", Sizes(width=2)),
        ("Factorized", Sizes(1, 1, 8, 4, 5)),
        ("Full3d", Sizes(frames=1)),
        ("ClassImage", Sizes(height=2)),
    ],
)
def test_kinds_do_not_depend_on_sizes(name, sizes):
    case = BY_NAME[name]
    assert kinds_of(tag(case.model(), case.call(0, sizes))) == case.kinds


@pytest.mark.parametrize("name", ["Factorized", "JointText", "Refined", "attend_matmul"])
def test_kinds_do_not_depend_on_names(name, captured):
    """Modules, classes and nodes renamed so that every name lies."""
    case = BY_NAME[name]
    gm = captured(case)[1]
    for i, node in enumerate(gm.graph.nodes):
        if node.op == "call_function":
            node.name = f"temporal_cross_attention_{i}"
        path = f"text_encoder.temporal.{i}.cross_attn"
        node.meta["nn_module_stack"] = {path: (path, "TemporalSelfAttention")}
    assert kinds_of(run_to(gm, "tag")) == case.kinds


def attend_turned(q, k, v):
    """softmax over the first of two sequence dimensions."""
    return (k @ q.transpose(-1, -2)).softmax(-2).transpose(-1, -2) @ v


def attend_null(q, k, v):
    null = torch.zeros_like(k[:, :, :1])
    return attend_fused(q, torch.cat([null, k], 2), torch.cat([null, v], 2))


def attend_one_key_head(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def attend_masked(q, k, v):
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def attend_filled(q, k, v):
    forbidden = torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool()
    return (q @ k.transpose(-1, -2)).masked_fill(forbidden, -1e9).softmax(-1) @ v


def attend_three_dimensional(q, k, v):
    return attend_fused(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)


def attend_complex_rope(q, k, v):
    n, d = q.shape[-2:]
    angles = torch.outer(torch.arange(n).float(), torch.linspace(1, 0.1, d // 2))
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)

    return attend_fused(rotate(q), rotate(k), v)


def attend_written_rope(q, k, v):
    def rotate(x):
        result = torch.empty_like(x)
        result[..., 0::2], result[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return result

    return attend_fused(rotate(q), rotate(k), v)


def attend_some_keys(q, k, v):
    index = torch.arange(0, k.shape[-2], 3)
    return attend_fused(q, k[:, :, index], v[:, :, index])


def attend_reordered(q, k, v):
    index = torch.arange(k.shape[-2] - 1, -1, -1)
    return attend_fused(q[:, :, index], k[:, :, index], v[:, :, index])[:, :, index]


def attend_pooled_keys(q, k, v):
    def pool(x):
        return (
            F.avg_pool1d(x.flatten(0, 1).transpose(1, 2), 2)
            .transpose(1, 2)
            .view(*x.shape[:2], -1, 8)
        )

    return attend_fused(q, pool(k), pool(v))


@pytest.mark.parametrize(
    "attend",
    [
        attend_turned,
        attend_in_float,
        attend_matmul,
        attend_baddbmm,
        attend_null,
        attend_one_key_head,
        attend_masked,
        attend_filled,
        attend_three_dimensional,
        attend_complex_rope,
        attend_written_rope,
        attend_some_keys,
        attend_reordered,
        attend_pooled_keys,
    ],
)
def test_self_attention_is_full_however_its_operands_came_about(attend):
    assert tag_core(attend, Sizes(height=8, width=6)) == ("full",)


def test_per_head_and_per_sample_loops_are_full():
    def per_head(q, k, v):
        return torch.stack([attend_fused(q[:, i], k[:, i], v[:, i]) for i in range(HEADS)], 1)

    def per_sample(q, k, v):
        parts = [attend_fused(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))]
        return torch.cat(parts)

    assert tag_core(per_head) == ("full",) * HEADS
    assert tag_core(per_sample) == ("full",) * 2


def test_multi_head_attention_of_torch():
    class Block(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.options = options

        def forward(self, x, emb, text=None):
            return x + self.attn(x, x, x, **self.options)[0]

    model = Image(Block(need_weights=True), Block(need_weights=False))
    assert kinds_of(tag(model, IMAGE.call())) == ("full", "full")


def test_softmax_that_is_no_attention_is_not_tagged():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.route = nn.Linear(WIDTH, 2)
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x, emb, text=None):
            weights = self.route(x).softmax(-1)
            return x + sum(e(x) * weights[..., i, None] for i, e in enumerate(self.experts))

    model = Image(Router(), Mlp())
    assert kinds_of(tag(model, IMAGE.call())) == ()


def test_attention_is_named_by_its_module_and_calls_are_counted():
    gm = tag(Image(Branch(), Cross(), Mlp()), IMAGE.call())
    assert [n.meta["attention"].name for n in tagged(gm)] == ["blocks.0.attn", "blocks.1.attn"]

    class Twice(Attention):
        def heads(self, x, context=None):
            return super().heads(x, context) + super().heads(x, context * 2)

    block = Cross()
    block.attn = Twice()
    gm = tag(Image(block), IMAGE.call())
    assert [n.meta["attention"].name for n in tagged(gm)] == ["blocks.0.attn", "blocks.0.attn#1"]


def test_the_kind_that_the_user_states_wins():
    model = Image(Branch(), Cross(), Mlp())
    gm = tag(model, IMAGE.call(), kinds={"*.0.attn": "spatial"})
    assert kinds_of(gm) == ("spatial", "cross")


@pytest.mark.parametrize("kind", ["self", "block", "model"])
def test_what_is_no_kind_of_attention_is_refused(kind):
    gm = run_to(capture_call(Image(Branch()), IMAGE.call()), "enlarge")
    with pytest.raises(
        ValueError, match=rf"kinds\['\*'\]: expected one of .*'spatial'.*found '{kind}'"
    ):
        apply(tag_attention_pass, gm, Denoised, Enlarged, kinds={"*": kind})


def test_a_pattern_that_matches_nothing_is_refused():
    gm = run_to(capture_call(Image(Branch()), IMAGE.call()), "enlarge")
    with pytest.raises(
        ValueError, match=r"that match attentions \['blocks.0.attn'\], found \['b'\]"
    ):
        apply(tag_attention_pass, gm, Denoised, Enlarged, kinds={"b": "full"})


def test_a_kind_that_cannot_be_told_is_an_error_that_names_the_node():
    class MixedRows(nn.Module):
        """Attention within rows whose tokens were mixed by a weight, and some then dropped."""

        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(2, 5)
            self.attn = Attention()

        def forward(self, x, emb, text=None):
            b, n, d = x.shape
            rows = self.mix(x.reshape(b * n // 2, 2, d).transpose(1, 2)).transpose(1, 2)[:, 1:3]
            return x + self.attn(rows).reshape(b, n, d)

    message = (
        r"attention \w+ \(blocks\.0\.attn\): cannot tell its kind, since \w+ .* mixes positions; "
        r"state it with kinds=\{'blocks\.0\.attn': 'spatial'\}"
    )
    with pytest.raises(ValueError, match=message):
        tag(Image(MixedRows()), IMAGE.call())
    stated = tag(Image(MixedRows()), IMAGE.call(), kinds={"*.attn": "spatial"})
    assert kinds_of(stated) == ("spatial",)


def test_a_key_that_lost_its_axes_is_cross_where_it_does_not_depend_on_the_latents():
    def attend_pooled(q, k, v):
        kept = torch.linspace(0, 1, 12 * WIDTH // HEADS).view(1, 1, 12, -1)[:, :, 2:9]
        return attend_fused(
            q, kept.expand(*q.shape[:2], -1, -1), 2 * kept.expand(*q.shape[:2], -1, -1)
        )

    assert tag_core(attend_pooled) == ("cross",)


def test_attention_over_channels_is_other_however_it_is_written():
    def attend_written(q, k, v):
        q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(-1, -2)

    def attend_einsum(q, k, v):
        scores = torch.einsum("bhnd,bhne->bhde", F.normalize(q, dim=-2), F.normalize(k, dim=-2))
        return torch.einsum("bhde,bhne->bhnd", scores.softmax(-1), v)

    def attend_channels(q, k, v):
        return attend_fused(*(x.transpose(-1, -2) for x in (q, k, v))).transpose(-1, -2)

    for attend in (attend_written, attend_einsum, attend_channels):
        assert tag_core(attend) == ("other",)


def test_attention_after_loops_over_frames_or_samples_has_its_kind():
    class Looped(Factorized):
        def forward(self, x_BCTHW, t_B, text_BLD):
            frames = [x_BCTHW[:, :, i] * 2 for i in range(x_BCTHW.shape[2])]
            x = torch.stack(frames, 2)
            x = torch.cat([x[i : i + 1] + 1 for i in range(len(x))])
            return super().forward(x, t_B, text_BLD)

    case = BY_NAME["Factorized"]
    assert kinds_of(tag(Looped(), case.call())) == case.kinds


def test_kinds_within_each_of_two_streams_are_told_by_its_own_axes():
    class AudioVideo(nn.Module):
        def __init__(self):
            super().__init__()
            self.ears, self.eyes = nn.Linear(3, WIDTH), nn.Linear(4, WIDTH)
            self.attns = nn.ModuleList(Attention() for _ in range(7))
            self.mlp, self.out = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 4)

        def forward(self, video, audio, text):
            video, audio = self.eyes(video), self.ears(audio)
            video, audio = video + self.attns[0](video), audio + self.attns[1](audio)
            video, audio = video + self.attns[2](video, audio), audio + self.attns[3](audio, video)
            video, audio = video + self.attns[4](video, text), audio + self.attns[5](audio, text)
            both = torch.cat([video, audio], 1)
            video, audio = (both + self.attns[6](both)).split([12, 7], 1)
            return self.out(video), self.mlp(audio)

    call = {
        "video": torch.randn(2, 12, 4),
        "audio": torch.randn(2, 7, 3),
        "text": torch.randn(2, 5, WIDTH),
    }
    kinds = {
        n.meta["attention"].name: n.meta["attention"].kind for n in tagged(tag(AudioVideo(), call))
    }
    expected = ("full", "full", "cross", "cross", "cross", "cross", "joint")
    assert kinds == {f"attns.{i}": kind for i, kind in enumerate(expected)}


def test_queries_that_follow_from_the_latents_along_no_axis_are_an_error():
    class Mixer(nn.Module):
        """Tokens mixed by weights, twice: what is left are as many features."""

        def __init__(self):
            super().__init__()
            self.attn, self.down, self.up = Attention(), nn.Linear(8, 3), nn.Linear(3, 8)

        def forward(self, x, emb, text=None):
            mixed = self.down(x.transpose(1, 2)).transpose(1, 2)
            return x + self.up(self.attn(mixed).transpose(1, 2)).transpose(1, 2)

    message = (
        r"cannot tell its kind, since its queries follow .* no axis of an input; state it with"
    )
    with pytest.raises(ValueError, match=message):
        tag(Image(Mixer()), IMAGE.call())
    stated = tag(Image(Mixer()), IMAGE.call(), kinds={"*.attn": "other"})
    assert kinds_of(stated) == ("other",)


def test_learned_and_pooled_queries_are_other():
    class Pooler(nn.Module):
        def __init__(self):
            super().__init__()
            self.registers = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH))
            self.attns = nn.ModuleList((Attention(), Attention(), Attention()))

        def forward(self, x, emb, text=None):
            registers = self.registers.expand(len(x), -1, -1)
            registers = registers + self.attns[0](registers, x)
            registers = registers + self.attns[1](registers)
            pooled = self.attns[2](x.mean(1, keepdim=True), x)
            return x + pooled + registers.mean(1, keepdim=True)

    assert kinds_of(tag(Image(Pooler()), IMAGE.call())) == ("other",) * 3


def test_a_query_whose_places_are_all_lost_is_an_error():
    def attend_reordered(q, k, v):
        index = torch.arange(q.numel() - 1, -1, -1).view(q.shape)
        return attend_fused(*(x.take(index) for x in (q, k, v))).take(index)

    with pytest.raises(ValueError, match="cannot tell its kind"):
        tag_core(attend_reordered, Sizes(height=8, width=6))


class Packed(nn.Module):
    """Attention within each sample, all of which lie one after another in one sequence."""

    def __init__(self, cut, *, with_text=False):
        super().__init__()
        self.attn, self.cut, self.with_text = Attention(), cut, with_text

    def forward(self, x, emb, text=None):
        num_text = text.shape[1] if self.with_text else 0
        both = torch.cat([text, x], 1) if self.with_text else x
        packed = both.flatten(0, 1)[None]
        samples = [self.attn(part) for part in self.cut(packed, len(x))]
        packed = packed + torch.cat(samples, 1)
        return packed.view(both.shape)[:, num_text:]


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        lambda packed, num: packed.split(packed.shape[1] // num, 1),
        lambda packed, num: [
            packed[:, i * n : (i + 1) * n] for n in [packed.shape[1] // num] for i in range(num)
        ],
        lambda packed, num: [
            packed[:, torch.arange(i * n, (i + 1) * n)]
            for n in [packed.shape[1] // num]
            for i in range(num)
        ],
    ],
)
def test_attention_within_each_of_packed_samples_has_the_kind_of_one(cut, with_text):
    kinds = kinds_of(tag(Image(Packed(cut, with_text=with_text)), IMAGE.call()))
    assert kinds == ("joint" if with_text else "full",) * 2


class Padded(nn.Module):
    """Two attentions over the latents' tokens and others that `pad` gives."""

    def __init__(self, pad):
        super().__init__()
        self.attns, self.pad = nn.ModuleList((Attention(), Attention())), pad
        self.token = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x, emb, text=None):
        whole = self.pad(self, x, text)
        for attn in self.attns:
            whole = whole + attn(whole)
        return whole[:, : x.shape[1]]


def write_text(padded, x, text):
    """What was zeros is text now."""
    whole = x.new_zeros(len(x), x.shape[1] + text.shape[1], WIDTH)
    whole[:, : x.shape[1]], whole[:, x.shape[1] :] = x, text
    return whole


def write_text_one_by_one(padded, x, text):
    written = torch.zeros_like(text)
    for i in range(text.shape[1]):
        written[:, i] = text[:, i]
    return torch.cat([x, written], 1)


@pytest.mark.parametrize(
    ("pad", "kind"),
    [
        (lambda m, x, text: torch.cat([x, x.new_zeros(len(x), 3, WIDTH)], 1), "full"),
        (lambda m, x, text: torch.cat([x, torch.ones(len(x), 3, WIDTH)], 1), "full"),
        (lambda m, x, text: torch.cat([x, torch.zeros_like(text)], 1), "full"),
        (lambda m, x, text: torch.cat([x, m.token.expand(len(x), 3, -1)], 1), "full"),
        (lambda m, x, text: torch.cat([x, m.token.repeat(len(x), 3, 1) * 2], 1), "full"),
        (lambda m, x, text: F.pad(x, (0, 0, 0, 3)), "full"),
        (lambda m, x, text: F.pad(torch.cat([x, text], 1), (0, 0, 0, 3)), "joint"),
        (lambda m, x, text: torch.cat([x, torch.ones_like(text) * text], 1), "joint"),
        (write_text, "joint"),
        (write_text_one_by_one, "joint"),
    ],
)
def test_constants_that_pad_a_sequence_are_no_other_tokens(pad, kind):
    assert kinds_of(tag(Image(Padded(pad)), IMAGE.call())) == (kind, kind)


def test_features_along_an_axis_that_heads_cut_across_lose_no_tokens():
    class Rotated(nn.Module):
        """48 features, of 8 frequencies for each of 3 places, in 3 heads of 16."""

        def __init__(self):
            super().__init__()
            self.widen, self.narrow = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x, emb, text=None):
            angles = torch.arange(8.0)[:, None] * text[:, :3].mean(-1)[:, None]
            wide = self.widen(x) * angles.flatten(1).repeat_interleave(2, 1)[:, None].cos()
            heads = wide.unflatten(-1, (3, 16)).transpose(1, 2)
            return x + self.narrow(attend_fused(heads, heads, heads).transpose(1, 2).flatten(2))

    assert kinds_of(tag(Image(Rotated()), IMAGE.call())) == ("full",)


def test_verify_catches_an_attention_without_a_tag():
    gm = tag(Image(Branch()), IMAGE.call())
    verify_tags(gm)
    del tagged(gm)[0].meta["attention"]
    with pytest.raises(AssertionError):
        verify_tags(gm)


def test_sizes_of_the_cases_are_all_different():
    """So that no axis can be told by its size; coincidences have a test of their own."""
    for case in CASES:
        s = replace(case.sizes)
        assert len({s.batch, s.frames, s.height // 2 * s.width // 2, s.text}) == 4


def test_an_attention_is_tagged_at_its_output():
    def kind(node):
        return node.meta["attention"].kind if "attention" in node.meta else ""

    assert_same_graph(
        tag(OneBranch(), OneBranch.call()),
        """
        graph(%x, %t):
            %time = sin(%t)
            %rows = unsqueeze(%time, 1)
            %gate = unsqueeze(%rows, 2)
            %w = get_attr[project.weight]
            %h = linear(%x, %w)
            %o = scaled_dot_product_attention(%h, %h, %h)  # full
            %w_out = get_attr[out.weight]
            %p = linear(%o, %w_out)
            %g = mul(%gate, %p)
            %y = add(%x, %g)
            return (%y,)
        """,
        note=kind,
    )
