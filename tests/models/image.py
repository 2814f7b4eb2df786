"""Models of images: one sequence of patches, or of windows of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .branches import Branch, Cross, Mlp, Plain
from .by_hand import Point
from .sizes import CHANNELS, PATCH, WIDTH


class TimeEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B[:, None] * torch.exp(torch.linspace(0, 3, 4))
        emb = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return F.silu(self.second(F.silu(self.first(emb))))


class Image(nn.Module):
    """Latents (B, C, H, W), one sequence of patches, a list of blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)
        self.time = TimeEmbedding()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH * PATCH)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb = self.time(t_B)
        for block in self.blocks:
            x = block(x, emb, text_BLD)
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class ClassImage(Image):
    """Conditioned on a class: no text."""

    def __init__(self) -> None:
        super().__init__(Branch(), Mlp(), Branch(), Mlp())
        self.label = nn.Embedding(5, WIDTH)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb = self.time(t_B) + self.label(label_B)
        for block in self.blocks:
            x = block(x, emb)
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class LongSkip(Image):
    """U-Net-like: the second half adds what the first half left."""

    def __init__(self) -> None:
        super().__init__(Branch(), Mlp(), Plain(), Branch(), Mlp())

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb = self.time(t_B)
        skips = [x := self.blocks[0](x, emb), x := self.blocks[1](x, emb)]
        x = self.blocks[2](x, emb)
        x = self.blocks[3](x + skips.pop(), emb)
        x = self.blocks[4](skips.pop() + x, emb)
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class Windowed(nn.Module):
    """Attention within windows of an image, every second one shifted by half a window."""

    def __init__(self, window: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)
        self.time = TimeEmbedding()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attns = nn.ModuleList(Attention() for _ in range(2))
        self.cuts = nn.ModuleList(Point("spatial", "attention") for _ in range(2))
        self.ends = nn.ModuleList(Point("spatial", "branch") for _ in range(2))
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH * PATCH)
        self.window = window

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).permute(0, 2, 3, 1)
        gate = self.time(t_B)[:, None, None]
        for i, (norm, attn) in enumerate(zip(self.norms, self.attns, strict=True)):
            y = self.cuts[i](self._branch(norm(x), attn, shift=i % 2))
            x = x + self.ends[i](y * gate)
        x = self.head(x).unflatten(-1, (PATCH, PATCH, c))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)

    def _branch(self, x: Tensor, attn: nn.Module, *, shift: int) -> Tensor:
        b, h, w, d = x.shape
        k = self.window
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = x.view(b, h // k, k, w // k, k, d).transpose(2, 3).reshape(-1, k * k, d)
        x = attn(x).view(b, h // k, w // k, k, k, d).transpose(2, 3).reshape(b, h, w, d)
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x


class Packed(nn.Module):
    """Latents that arrive as tokens (B, N, C)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.time = TimeEmbedding()
        self.blocks = nn.ModuleList(blocks or (Branch(), Cross(), Mlp()))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x_BNC: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        x, emb = self.embed(x_BNC), self.time(t_B)
        for block in self.blocks:
            x = block(x, emb, text_BLD)
        return self.head(x)


class Refined(Image):
    """A text refiner with attention of its own before cross attention."""

    def __init__(self) -> None:
        super().__init__(Branch(), Cross(), Mlp(), Branch(), Cross(), Mlp())
        self.refiner = nn.ModuleList((Plain("other"), Plain("other")))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        emb = self.time(t_B)
        for block in self.refiner:
            text_BLD = block(text_BLD, emb)
        return super().forward(x_BCHW, t_B, text_BLD)
