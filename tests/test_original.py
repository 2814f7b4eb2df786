"""`backend="original"`: results, plans and options of a model that is called as it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from skips import (
    SkipByHand,
    assert_alike,
    generate,
    skip_calls,
)
from torch import nn

pytestmark = pytest.mark.runtime


class Small(nn.Module):
    """A model without attention, with a result in some container."""

    def __init__(self, pack=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.pack = pack
        self.num_calls = [0]

    def forward(self, x, t, scale=1.0, flag=False):
        y = torch.tanh(self.first(x)) * t.view(-1, 1, 1) / 1000
        return self.pack(self.second(y) * scale * (2 if flag else 1))


@dataclass
class Found:
    sample: torch.Tensor
    note: str


PACKS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.mean(1)),
    "dict": lambda y: {"sample": y, "sizes": [y.shape[0], "rows"]},
    "output": lambda y: Transformer2DModelOutput(sample=y),
    "repeated": lambda y: [y, y],
    "view": lambda y: (y, y[0]),
    "none": lambda y: (None, y.bool(), y.long()),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_skipped_call_gives_what_the_last_one_gave(pack):
    model = Small(pack).eval()
    fast = skip_calls(model)
    for _ in range(2):
        assert_alike(generate(fast), generate(SkipByHand(model)))
    stats = fast.stats
    assert (stats.computed, stats.reused, stats.stored) == (8, 6, 4) and not stats.fallbacks
    assert stats.nbytes == 0 and stats.generations == 2 and stats.captures == 0


def test_a_dataclass_is_rebuilt():
    model = Small(lambda y: Found(y, "note")).eval()
    fast = skip_calls(model)
    found, expected = generate(fast), generate(SkipByHand(lambda *a: model(*a).sample))
    assert all(type(each) is Found and each.note == "note" for each in found)
    assert_alike([each.sample for each in found], expected)
