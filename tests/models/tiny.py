"""The smallest image model: packed tokens, two blocks."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x, shift):
        q, k, v = self.qkv(self.norm(x) + shift).unflatten(-1, (3, 2, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + shift * self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Tiny(nn.Module):
    """An image model over packed tokens: (batch, tokens, channels)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.name = "tiny"
        self.proj = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, *, scale: float = 1.0, as_dict: bool = False):
        h = self.dropout(self.proj(x))
        for block in self.blocks:
            h = block(h, t[:, None, None] * scale)
        out = self.head(h)
        return {"sample": out} if as_dict else out
