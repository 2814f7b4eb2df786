"""Models that read Python values from tensor data: their calls, and what they are run with."""

from __future__ import annotations

import torch
from models import WIDTH, Branch, Image, Mlp

import pabc

NUM_STEPS = 4
FULL = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), full=2)


class Plain(Image):
    """No text."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        return super().forward(x_BCHW, t_B, text_BLD)


def make_calls(steps=NUM_STEPS, **others):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0.1, steps)
    return [{"x_BCHW": x * (1 + t), "t_B": t.expand(2), **others} for t in times]


def make(model_class, *blocks):
    torch.manual_seed(1)
    return model_class(*(blocks or (Branch(), Mlp(), Branch()))).eval()


def generate(compiled, calls):
    with torch.no_grad():
        return [compiled(**call) for call in calls]


MASKS = {("full", layer): [bool(step % 2) for step in range(NUM_STEPS)] for layer in range(2)}


def text_and_mask(*lengths):
    text = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"text_BLD": text, "mask_BL": torch.arange(5) < torch.tensor(lengths)[:, None]}
