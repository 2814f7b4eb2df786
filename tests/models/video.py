"""Models of videos: attention factorized over space and time, or over both at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attend, Attention, attend_fused
from .branches import Branch, Cross, Mlp
from .by_hand import Point
from .image import TimeEmbedding
from .sizes import CHANNELS, PATCH, WIDTH


class Video(nn.Module):
    """What the video models share: (B, C, T, H, W) to (B, T, S, D) and back, by views."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS * PATCH * PATCH, WIDTH)
        self.time = TimeEmbedding()
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH * PATCH)

    def tokens(self, x_BCTHW: Tensor) -> Tensor:
        b, c, t, h, w = x_BCTHW.shape
        x = x_BCTHW.view(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, t, h // PATCH * (w // PATCH), -1)
        return self.embed(x)

    def latents(self, x_BTSD: Tensor, shape: torch.Size) -> Tensor:
        b, c, t, h, w = shape
        x = self.head(x_BTSD).view(b, t, h // PATCH, w // PATCH, c, PATCH, PATCH)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape)


class Factorized(Video):
    """Frames and places take turns as the batch, between the blocks, as in Latte."""

    def __init__(self, layers: int = 1, attend: Attend = attend_fused) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(
            nn.ModuleList((Branch("spatial", attend), Cross(attend), Mlp())) for _ in range(layers)
        )
        self.temporal = nn.ModuleList(
            nn.ModuleList((Branch("temporal", attend), Mlp())) for _ in range(layers)
        )
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        x = self.tokens(x_BCTHW)
        b, t, s, d = x.shape
        emb = self.time(t_B)
        emb_frames = emb.repeat_interleave(t, dim=0)
        emb_places = emb.repeat_interleave(s, dim=0)
        text = self.text(text_BLD)
        text = text[:, None].expand(-1, t, -1, -1).reshape(b * t, -1, d)
        x = x.reshape(b * t, s, d)
        for i, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            for block in spatial:
                x = block(x, emb_frames, text)
            x = x.reshape(b, t, s, d).permute(0, 2, 1, 3).reshape(b * s, t, d)
            if i == 0:
                x = x + torch.linspace(0, 1, t)[:, None]
            for block in temporal:
                x = block(x, emb_places)
            x = x.reshape(b, s, t, d).permute(0, 2, 1, 3).reshape(b * t, s, d)
        return self.latents(x.view(b, t, s, d), x_BCTHW.shape)


class FramesFirst(Factorized):
    """Latents (B, T, C, H, W), as CogVideoX takes them."""

    def forward(self, x_BTCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        return super().forward(x_BTCHW.transpose(1, 2).contiguous(), t_B, text_BLD).transpose(1, 2)


class Rearranged(Video):
    """All tokens in one sequence; each branch rearranges them for itself, as in STDiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attns = nn.ModuleList(Attention() for _ in range(2))
        self.table = nn.Parameter(torch.linspace(-1, 1, 6 * WIDTH).view(6, WIDTH))
        self.block_time = nn.Linear(WIDTH, 6 * WIDTH)
        self.cross, self.mlp = Cross(), Mlp()
        self.cuts = nn.ModuleList(Point(k, "attention") for k in ("spatial", "temporal"))
        self.ends = nn.ModuleList(Point(k, "branch") for k in ("spatial", "temporal"))

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        x = self.tokens(x_BCTHW)
        b, t, s, d = x.shape
        x = x.flatten(1, 2)
        emb = self.time(t_B)
        table = self.table + self.block_time(emb).view(b, 6, d)
        s1, c1, g1, s2, c2, g2 = table.chunk(6, dim=1)
        n = (self.norms[0](x) * (1 + c1) + s1).view(b * t, s, d)
        y = self.cuts[0](self.attns[0](n).view(b, t * s, d))
        x = x + self.ends[0](g1 * y)
        n = (self.norms[1](x) * (1 + c2) + s2).view(b, t, s, d).transpose(1, 2)
        y = self.attns[1](n.reshape(b * s, t, d)).view(b, s, t, d).transpose(1, 2)
        x = x + self.ends[1](g2 * self.cuts[1](y.reshape(b, t * s, d)))
        x = self.mlp(self.cross(x, emb, text_BLD), emb)
        return self.latents(x.view(b, t, s, d), x_BCTHW.shape)


class Full3d(Video):
    """One softmax over all frames and places; patches by a 3-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.blocks = nn.ModuleList((Branch(), Cross(), Mlp()))

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, _, t, _, _ = x_BCTHW.shape
        x, emb = self.conv(x_BCTHW).flatten(2).transpose(1, 2), self.time(t_B)
        for block in self.blocks:
            x = block(x, emb, text_BLD)
        return self.latents(x.view(b, t, -1, WIDTH), x_BCTHW.shape)
