"""Models that read Python values from tensor data: their calls, and what they are run with."""

from __future__ import annotations

import torch
from models import WIDTH, Branch, Image, Mlp, merge_heads, split_heads
from torch import nn

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


class TextLengths(Image):
    """Cross attention of each sample to its own valid text tokens, packed without padding."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_BCHW, t_B, text_BLD, mask_BL):
        lengths = mask_BL.sum(dim=1).tolist()
        packed = text_BLD.masked_select(mask_BL.unsqueeze(-1)).view(-1, WIDTH)
        k, v = (split_heads(y) for y in self.to_kv(packed).chunk(2, dim=-1))
        x, emb = self.patch(x_BCHW).flatten(2).transpose(1, 2), self.time(t_B)
        for block in self.blocks:
            x = block(x, emb)
        q, start, parts = split_heads(self.to_q(x)), 0, []
        for i, length in enumerate(lengths):
            end = start + length
            parts.append((q[i] @ k[:, start:end].mT).softmax(-1) @ v[:, start:end])
            start = end
        x = x + merge_heads(torch.stack(parts))
        return self.head(x).view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(x_BCHW.shape)


class OnTheHour(Plain):
    """A branch on the timestep, outside of all blocks."""

    def forward(self, x_BCHW, t_B):
        scale = 2.0 if t_B[0].item() > 0.5 else 1.0
        return super().forward(x_BCHW * scale, t_B)


class Scaled(Plain):
    """A number read from the timestep is a factor, and decides a branch."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        x = x_BCHW * (1 - t / 2)
        return super().forward(x if 2 * t > 0.7 else x + t, t_B)
