"""Models and arguments that are fake tensors, of one mode or of several."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import CASES, Sizes
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import pabc
from pabc.passes import share_fake_mode

CASE = next(case for case in CASES if case.name == "Factorized")
ONE_FRAME = Sizes(frames=1)
SCHEDULE = pabc.Schedule.pyramid(
    timesteps=range(900, 0, -100), spatial=2, temporal=3, cross=4, mlp=2
)


def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("sizes", [None, ONE_FRAME], ids=["frames", "one frame"])
@pytest.mark.parametrize("of_call", [nullcontext, fake], ids=["real call", "fake call"])
@pytest.mark.parametrize("of_model", [nullcontext, fake], ids=["real model", "fake model"])
def test_explain_with_fake_tensors_of_two_modes(of_model, of_call, sizes):
    with of_model():
        model = CASE.model().eval()
    with of_call():
        call = CASE.call(0, sizes)
    found = pabc.explain(model, schedule=SCHEDULE, memory_budget="1MiB", **call)
    assert sorted(found.attention.values()) == sorted(CASE.kinds)


def test_explain_with_arguments_of_two_modes():
    model, call = CASE.model().eval(), dict(CASE.call(0))
    real = dict(call)
    for name in call:
        with fake() as mode:
            call[name] = mode.from_tensor(call[name])
    found = pabc.explain(model, **call)
    assert found.attention == pabc.explain(model, **real).attention
    assert len({x.fake_mode for x in call.values()}) == len(call)


def test_explain_and_compile_within_a_fake_mode():
    real = CASE.model().eval()
    expected = pabc.explain(real, schedule=SCHEDULE, **CASE.call(0))
    compiled = pabc.compile(real, SCHEDULE, backend="eager", example_inputs=((), CASE.call(0)))
    with fake():
        for model in (real, CASE.model().eval()):
            found = pabc.explain(model, schedule=SCHEDULE, **CASE.call(0))
            assert found == expected
        assert compiled.explain().attention == expected.attention
        fast = pabc.compile(real, SCHEDULE, backend="eager", example_inputs=((), CASE.call(0)))
        assert fast.explain().attention == expected.attention


def test_arguments_of_one_mode_stay_as_they_are():
    with fake():
        tensors = [torch.ones(2, 3), torch.ones(4)]
    assert share_fake_mode(tensors) is tensors
    with fake():
        other = torch.ones(3, 2).t()
    shared = share_fake_mode(([*tensors, 3], {"other": other}))
    flat = [*shared[0][:2], shared[1]["other"]]
    assert shared[0][2] == 3
    assert all(isinstance(x, FakeTensor) for x in flat)
    assert len({x.fake_mode for x in flat}) == 1
    assert [(x.shape, x.stride()) for x in flat] == [
        (x.shape, x.stride()) for x in (*tensors, other)
    ]
