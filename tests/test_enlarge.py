"""Kinds where a token axis has one position: read from the graph of a larger call."""

import ast
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from models import CASES, Case, Factorized, Sizes
from stages import capture_call, facts_of, run_to
from torch import nn

import pabc
from pabc.models import OpenSoraPlan12
from pabc.passes import Captured, Denoised, ModelCall, enlarge_call

BY_NAME = {case.name: case for case in CASES}
FRAME = Sizes(frames=1)
PATCH = Sizes(height=2, width=2)
ROW = Sizes(height=2)
NOTHING = Sizes(batch=1, frames=1, height=2, width=2)


def explain(case: Case, model: torch.nn.Module, sizes: Sizes, **options) -> list[str]:
    return list(pabc.explain(model.eval(), **case.call(0, sizes), **options).attention.values())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Factorized", NOTHING),
        ("FramesFirst", FRAME),
        ("Rearranged", PATCH),
        ("Rearranged", FRAME),
        ("Full3d", FRAME),
        ("Full3d", PATCH),
        ("Full3d", ROW),
        ("Full3d", NOTHING),
    ],
)
def test_kinds_with_one_frame_or_one_patch(name: str, sizes: Sizes):
    case = BY_NAME[name]
    found = explain(case, case.model(), sizes)
    assert sorted(found) == sorted(case.kinds)


class AsTrained(Factorized):
    """Takes one frame, or as many as it was trained on."""

    taken = (1, 5)

    def forward(self, x_BCTHW, t_B, text_BLD):
        if x_BCTHW.shape[2] not in self.taken:
            raise ValueError("not that many frames")
        return super().forward(x_BCTHW, t_B, text_BLD)


class OneFrame(AsTrained):
    taken = (1,)


def test_a_model_that_takes_one_frame_or_as_many_as_it_was_trained_on():
    case = BY_NAME["Factorized"]
    assert sorted(explain(case, AsTrained(), FRAME)) == sorted(case.kinds)


def test_a_kind_that_no_larger_call_tells_is_an_error():
    case = BY_NAME["Factorized"]
    message = (
        r"attention \w+ \(spatial\.0\.0\.attn\): cannot tell its kind, since x_bcthw\[2\] has one "
        r"position, .* state it with kinds=\{'spatial\.0\.0\.attn': 'spatial'\}"
    )
    with pytest.raises(ValueError, match=message):
        explain(case, OneFrame(), FRAME)
    kinds = {"spatial.*.0.attn": "spatial", "temporal.*": "temporal"}
    assert sorted(explain(case, OneFrame(), FRAME, kinds=kinds)) == sorted(case.kinds)


class Tokens(nn.Module):
    """Takes as many tokens as it was trained on."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.qkv, self.out = count, nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x_BND, t_B):
        if x_BND.shape[1] != self.count:
            raise ValueError("not that many tokens")
        q, k, v = (y[:, None] for y in self.qkv(x_BND * t_B[:, None, None]).chunk(3, -1))
        return self.out(x_BND + F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_a_kind_is_not_asked_for_where_it_is_the_same_in_every_place():
    """Temporal attention of one frame, and attention among tokens of which there is one."""
    case = BY_NAME["Factorized"]
    kinds = {"spatial.*.0.attn": "spatial"}
    assert sorted(explain(case, OneFrame(), FRAME, kinds=kinds)) == sorted(case.kinds)
    for count in (1, 5):
        call = (torch.randn(2, count, 4), torch.full((2,), 3.0))
        found = pabc.explain(Tokens(count).eval(), *call).attention
        assert list(found.values()) == ["full"]


def test_only_kinds_that_the_places_of_an_axis_give_are_suggested():
    case = BY_NAME["Factorized"]
    with pytest.raises(ValueError, match=r"\(one of \('spatial', 'full'\)\)"):
        explain(case, OneFrame(), FRAME)


class OneRow(nn.Module):
    """An image of one row, whose attention is in no module."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x_BCHW, t_B):
        b, c, rows, columns = x_BCHW.shape
        if rows > 1:
            raise ValueError("more than one row")
        x_BND = x_BCHW.flatten(2).mT * t_B[:, None, None]
        q, k, v = (y[:, None] for y in self.qkv(x_BND).chunk(3, -1))
        x_BND = x_BND + F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.out(x_BND).mT.view(b, c, rows, columns)


def test_the_suggested_pattern_and_kind_are_taken():
    call = (torch.randn(2, 4, 1, 6), torch.full((2,), 3.0))
    with pytest.raises(ValueError, match=r"kinds=\{'\w+': 'spatial'\} \(one of") as raised:
        pabc.explain(OneRow().eval(), *call)
    found = re.search(r"kinds=(\{.*?\}) \(one of (\(.*?\))\)", str(raised.value))
    assert found is not None
    pattern, kinds = next(iter(ast.literal_eval(found[1]))), ast.literal_eval(found[2])
    assert kinds == ("spatial", "full")
    for kind in kinds:
        stated = pabc.explain(OneRow().eval(), *call, kinds={pattern: kind}).attention
        assert list(stated.values()) == [kind]


def test_several_positions_need_no_larger_call():
    case = BY_NAME["Full3d"]
    model, call = case.model().eval(), case.call()
    gm = run_to(capture_call(model, call), "axes")
    facts = facts_of(gm)
    signature, denoised = facts[Captured].signature, facts[Denoised]
    assert enlarge_call(gm, facts[ModelCall], signature, denoised, kinds={}) is None


@pytest.mark.parametrize("shape", [(2, 4, 1, 6, 8), (1, 4, 1, 8, 8), (2, 4, 3, 2, 2)])
def test_a_mask_of_the_latents_grows_with_them(shape: tuple[int, ...]):
    model = OpenSoraPlan12(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=48,
        caption_channels=8,
        patch_size=2,
        norm_elementwise_affine=False,
        sample_size=8,
        sample_size_t=5,
    )
    batch, _, *rest = shape
    call = {
        "hidden_states": torch.randn(shape),
        "timestep": torch.full((batch,), 3),
        "encoder_hidden_states": torch.randn(batch, 1, 5, 8),
        "attention_mask": torch.ones(batch, *rest),
        "encoder_attention_mask": torch.ones(batch, 1, 5),
    }
    found = pabc.explain(model.eval(), **call).attention
    assert found == {
        "transformer_blocks.0.attn1": "full",
        "transformer_blocks.0.attn2": "cross",
    }
    assert model._scale_of_table == {}
    assert logging.getLogger("torch._subclasses.fake_tensor").level != logging.CRITICAL
