"""Lowering of the fp8 encoding of cuts."""

import pytest
import torch
from graphs import assert_same_graph
from lowering import lower, matches_of
from models import MODELS
from torch import nn

import pabc
from pabc.kernels.encode_rows import OP
from pabc.passes.encode import encode

pytestmark = pytest.mark.kernels


class Encode(nn.Module):
    def __init__(self, by=lambda x: encode(x, "fp8")):
        super().__init__()
        self.by = by

    def forward(self, x):
        kept = self.by(2 * x)
        return *kept, kept[-1] + 1


def calls(lowered):
    return lowered.graph.find_nodes(op="call_function", target=OP)


@pytest.mark.parametrize("layout", ["", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoding_becomes_a_call(dtype, layout):
    x = torch.randn(2, 5, 24).to(dtype)
    x = x.mT.contiguous().mT if layout else x
    gm, lowered = lower(Encode(), x)
    expected_graph = """
        graph(%x):
            %y = mul(%x, 2)
            %r = pabc.encode_rows(%y)
            %values = getitem(%r, 0)
            %scales = getitem(%r, 1)
            %z = add(%scales, 1)
            return (%values, %scales, %z)
    """
    assert_same_graph(lowered, expected_graph)
    for found, expected in zip(lowered(x), gm(x), strict=True):
        assert found.stride() == expected.stride() and found.dtype == expected.dtype
        assert torch.equal(found.float(), expected.float())


def by_another_range(x):
    scale = (x.abs().amax(-1, keepdim=True) * (1 / 240.0)).clamp_min(1e-9)
    return (x / scale).clamp(-240, 240).to(torch.float8_e4m3fn), scale


def by_columns(x):
    scale = (x.abs().amax(-2, keepdim=True) * (1 / 448.0)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("by", [by_another_range, by_columns])
def test_other_encodings_are_left_alone(by):
    _, lowered = lower(Encode(by), torch.randn(2, 5, 24))
    assert not calls(lowered) and not matches_of(lowered)


def test_reasons():
    x = torch.randn(2, 20000)
    _, lowered = lower(Encode(), x)
    assert [each.reason for each in matches_of(lowered)] == ["20000 channels: at most 16384"]


@pytest.mark.parametrize("name", ["Factorized", "JointImage"])
def test_models_that_keep_fp8(name):
    case = next(case for case in MODELS if case.name == name)
    model = case.model().requires_grad_(False)
    kinds = sorted(set(case.kinds) - {"other"})
    schedule = pabc.Schedule.from_masks(range(3), {kind: [False, True, True] for kind in kinds})
    options = {"backend": "eager", "cache_dtype": "fp8"}
    plain = pabc.compile(model, schedule, kernels="off", **options)
    forced = pabc.compile(model, schedule, kernels="force", **options)
    with torch.no_grad():
        for step in range(3):
            call = case.call(step=step)
            torch.testing.assert_close(forced(**call), plain(**call), atol=5e-2, rtol=5e-2)
    assert any("encode_rows lowered" in line for line in forced.explain().lowered)
