"""A module of one product, for what a subclass adds to it."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """x @ weight, plus what a subclass adds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.register_buffer("calls", torch.zeros(1))

    def extra(self, x):
        return 0.0

    def forward(self, x):
        return x @ self.weight + self.extra(x)


class Table:
    values = None

    def get(self, size):
        if self.values is None:
            self.values = torch.linspace(0, 1, size) * 2
        return self.values


class OneBranch(nn.Module):
    """One residual branch, x + sin(t) * out(attention(project(x))): the least that has a region."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = (nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x, t):
        h = self.project(x)
        attended = nn.functional.scaled_dot_product_attention(h, h, h)
        return x + t.sin()[:, None, None] * self.out(attended)

    @staticmethod
    def call():
        """Returns latents of 2 samples, 3 tokens and 4 channels, and their times."""
        generator = torch.Generator().manual_seed(1)
        return {"x": torch.randn(2, 3, 4, generator=generator), "t": torch.tensor([0.1, 0.2])}
