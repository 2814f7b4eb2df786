"""Numbers read from tensors: a capture a side of a branch, not one a value."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import Mlp, run_by_hand
from reading import FULL, NUM_STEPS, OnTheHour, Plain, Scaled, generate, make, make_calls

import pabc


class ByTheNumber(Plain):
    """The number itself is asked for, in a way that only a number can be."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(x_BCHW * torch.full((1,), round(t, 1)), t_B)


class InTensors(Plain):
    """A number read becomes a tensor again, one that PyTorch makes from Python's numbers."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        scale = torch.full((1,), t) if isinstance(t, float) else 1.0
        return super().forward(x_BCHW * scale + torch.tensor([2 * t, 1.0]).sum(), t_B)


class BehindItsBack(Plain):
    """C code takes the number's value."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(x_BCHW * math.cos(2 * t) + float(f"{t:.3f}"), t_B)


class InOtherFunctions(Plain):
    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(F.leaky_relu(x_BCHW, t).clamp(min=-t), t_B)


@pytest.mark.parametrize(
    ("model_class", "captures"),
    [
        (OnTheHour, 2),
        (Scaled, 2),
        (InTensors, 1),
        (ByTheNumber, NUM_STEPS),
        (BehindItsBack, NUM_STEPS),
        (InOtherFunctions, NUM_STEPS),
    ],
)
@pytest.mark.filterwarnings("ignore:pabc recaptured the model")
def test_numbers_read_from_the_timestep(model_class, captures, monkeypatch):
    """One capture a side of a branch, not one a value."""
    count = []
    original = pabc.passes.capture
    monkeypatch.setattr(
        pabc.passes, "capture", lambda *a, **k: count.append(1) or original(*a, **k)
    )
    model, calls = make(model_class, Mlp()), make_calls()
    schedule = pabc.Schedule.none(range(NUM_STEPS, 0, -1))
    compiled = pabc.compile(model, schedule, backend="eager")
    for result, call in zip(generate(compiled, calls), calls, strict=True):
        with torch.no_grad():
            assert torch.equal(result, model(**call))
    assert len(count) == captures


def test_a_number_of_the_graph_in_a_compiled_phase():
    model, calls = make(Scaled), make_calls()
    compiled = pabc.compile(model, FULL)
    for a, b in zip(
        generate(compiled, calls), run_by_hand(model, calls, {}, "attention"), strict=True
    ):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0)
    assert [line.split(" in ")[0] for line in compiled.explain().assumed] == [
        "item compares as (False,)"
    ]
