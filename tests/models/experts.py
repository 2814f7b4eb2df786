"""A branch whose module no trace can enter."""

from __future__ import annotations

import torch
from torch import nn

from .attention import make_mlp
from .by_hand import Point
from .sizes import WIDTH


class Routed(nn.Module):
    """Each token goes through one of the experts; how many go where is read on the host."""

    def __init__(self):
        super().__init__()
        self.router, self.norm = nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(make_mlp() for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        counts = chosen.bincount(minlength=2).cpu().numpy()
        out = torch.zeros_like(flat)
        for i, count in enumerate(counts):
            if count:
                (rows,) = (chosen == i).nonzero(as_tuple=True)
                out[rows] = self.experts[i](flat[rows])
        return out.view(x.shape)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe, self.end = nn.LayerNorm(WIDTH), Routed(), Point("mlp")
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, emb_BD, text=None):
        return x + self.gate(emb_BD)[:, None] * self.end(self.moe(self.norm(x)))
