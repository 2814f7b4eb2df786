"""Models in which text and latents meet in one softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import attend_fused, make_mlp, merge_heads, split_heads
from .branches import Branch, Mlp, SharedProjection
from .by_hand import Point
from .image import Image
from .sizes import PATCH, WIDTH


class JointBlock(nn.Module):
    """Text and latents in one softmax, a residual stream each, as in SD3."""

    def __init__(self, *, last: bool = False, sliced: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.to_qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.to_out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.cuts = nn.ModuleList(Point("joint", "attention", num_points=2) for _ in range(2))
        self.ends = nn.ModuleList(Point("joint", "branch", num_points=2) for _ in range(2))
        self.mlp, self.text_mlp, self.text_end = Mlp(), make_mlp(), Point("mlp")
        self.last, self.sliced = last, sliced

    def forward(self, x: Tensor, text: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        streams = [text, x]
        parts = [
            [split_heads(y) for y in to_qkv(norm(z)).chunk(3, dim=-1)]
            for z, norm, to_qkv in zip(streams, self.norms, self.to_qkv, strict=True)
        ]
        y = attend_fused(*(torch.cat(pair, dim=-2) for pair in zip(*parts, strict=True)))
        y = merge_heads(y)
        length = text.shape[1]
        ys = (y[:, :length], y[:, length:]) if self.sliced else y.split([length, x.shape[1]], dim=1)
        for i in range(2):
            gate = self.gates[i](emb)[:, None]
            streams[i] = streams[i] + self.ends[i](gate * self.cuts[i](self.to_out[i](ys[i])))
        text, x = streams
        if not self.last:
            text = text + self.text_end(self.text_mlp(text))
        return self.mlp(x, emb), text


class JointImage(Image):
    """Two joint blocks; the text that leaves the last one is not used."""

    def __init__(self, *, sliced: bool = False) -> None:
        super().__init__(JointBlock(sliced=sliced), JointBlock(last=True, sliced=sliced))
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb, text = self.time(t_B), self.text(text_BLD)
        for block in self.blocks:
            x, text = block(x, text, emb)
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class JointText(JointImage):
    """One joint block whose text is used after it too: the region has two cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((JointBlock(),))
        self.pool = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        emb, text = self.time(t_B), self.text(text_BLD)
        x, text = self.blocks[0](x, text, emb)
        x = x * torch.sigmoid(self.pool(text.mean(dim=1, keepdim=True)))
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class OneStream(Image):
    """Text and latents concatenated once, before all blocks, as in Flux's single blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*(blocks or (Branch("joint"), Mlp(), SharedProjection("joint"))))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = torch.cat([text_BLD, self.patch(x_BCHW).flatten(2).transpose(1, 2)], dim=1)
        emb = self.time(t_B)
        for block in self.blocks:
            x = block(x, emb)
        x = self.head(x[:, text_BLD.shape[1] :]).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
