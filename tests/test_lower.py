"""Lowering: attention over short sequences becomes a kernel's call, or a reason why not."""

from functools import partial

import pytest
import torch
from graphs import assert_same_graph
from lowering import Attend, export, lower, make_qkv, matches_of, unmeasured
from models import MODELS
from small_latte import make_inputs, make_latte
from torch import nn

import pabc
from pabc.kernels.gains import find_gain
from pabc.kernels.short_attention import OP
from pabc.passes import KernelMatches, lower_pass
from pabc.passes.ir import value

pytestmark = pytest.mark.kernels
FACTORIZED = next(case for case in MODELS if case.name == "Factorized")


@pytest.mark.parametrize("shape", [(6, 6), (1, 9), (17, 3)], ids=str)
def test_attention_becomes_a_call(shape):
    inputs = make_qkv(T=shape[0], S=shape[1])
    gm, lowered = lower(Attend(scale=0.3), *inputs)
    expected_graph = """
        graph(%q, %k, %v):
            %o = pabc.short_attention(%q, %k, %v, None, None, None, None, None, 0.3, 1e-06, 'none')
            %t = transpose.int(%o, 1, 2)
            return (%t,)
    """
    assert_same_graph(lowered, expected_graph)
    (found,), (expected,) = lowered(*inputs), gm(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.stride() == expected.stride()
    assert [each.reason for each in matches_of(lowered)] == [None]
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            assert value(node).stride() is not None


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6), (2, 1, 6, 6)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_of_fewer_dimensions(shape, kind):
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)
    if kind == "bool":
        mask[..., 0] = True
    inputs = (*make_qkv(), mask)
    gm, lowered = lower(Attend(), *inputs)
    assert lowered.graph.find_nodes(op="call_function", target=OP)
    torch.testing.assert_close(lowered(*inputs), gm(*inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({"D": 160}, {}, "head dim 160: at most 128"),
        ({}, {"is_causal": True}, "causal"),
        ({"dtype": torch.float64}, {}, "torch.float64"),
    ],
)
def test_what_no_kernel_computes_is_left_alone(sizes, options, reason):
    inputs = make_qkv(**sizes)
    gm, lowered = lower(Attend(**options), *inputs)
    kernels = {each.kernel: each.reason for each in matches_of(lowered)}
    assert kernels == dict.fromkeys(("short_attention", "text_attention", "attention"), reason)
    assert torch.equal(lowered(*inputs)[0], gm(*inputs)[0])
    assert not lowered.graph.find_nodes(op="call_function", target=OP)


def test_automatic_lowering_goes_by_the_table():
    inputs = [x.to("meta") for x in make_qkv()]
    asked = []

    def gains(answer, kernel, device, shape):
        asked.append((kernel, device.type, shape))
        return answer

    reasons = {True: None, False: "not faster here", None: "not measured on this device"}
    for answer, reason in reasons.items():
        lowered = lower(Attend(), *inputs, kernels="auto", gains=partial(gains, answer))[1]
        assert matches_of(lowered)[0].reason == reason
    assert asked[0] == ("short_attention", "meta", (2, 3, 6, 6, 8))
    gm = export(Attend(), *inputs)
    assert lower_pass(gm, kernels="off", gains=unmeasured) == (gm, KernelMatches())


def test_nothing_is_faster_where_nothing_was_measured():
    assert find_gain("short_attention", torch.device("cpu"), (1, 1, 8, 8, 64)) is None


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_lowered_models_give_what_they_give(case):
    model = case.model().requires_grad_(False)
    kinds = sorted(set(case.kinds) - {"other"})
    schedule = pabc.Schedule.from_masks(range(3), {kind: [False, True, False] for kind in kinds})
    plain = pabc.compile(model, schedule, backend="eager", kernels="off")
    forced = pabc.compile(model, schedule, backend="eager", kernels="force")
    for step in range(3):
        call = case.call(step=step)
        with torch.no_grad():
            torch.testing.assert_close(forced(**call), plain(**call), atol=2e-5, rtol=1e-4)


def test_a_whole_model_is_lowered_and_says_so():
    model, (latents, text) = make_latte(), make_inputs()
    schedule = pabc.Schedule.pyramid(range(4), spatial=2, temporal=3)
    forced = pabc.compile(model, schedule, backend="eager", kernels="force")
    plain = pabc.compile(model, schedule, backend="eager")
    for step in range(4):
        call = {"timestep": torch.full((2,), step), "encoder_hidden_states": text}
        with torch.no_grad():
            found, expected = (each(latents, **call).sample for each in (forced, plain))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert any("short_attention lowered" in line for line in forced.explain().lowered)
    assert "kernels: " in str(forced.explain()) and plain.explain().lowered == ()


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"kernels: expected one of .*'auto'.*found 'on'"):
        pabc.compile(nn.Linear(1, 1), pabc.Schedule.none(range(2)), kernels="on")


def test_inductor_calls_the_kernel():
    model = FACTORIZED.model().requires_grad_(False)
    forced = pabc.compile(model, pabc.Schedule.none(range(2)), kernels="force")
    with torch.no_grad():
        call = FACTORIZED.call()
        torch.testing.assert_close(forced(**call), model(**call), atol=2e-5, rtol=1e-4)
    assert any("short_attention lowered" in line for line in forced.explain().lowered)
