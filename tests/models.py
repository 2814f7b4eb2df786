"""Small diffusion transformers, each in a style that real ones are written in, and their cases.

Shapes: B batch, C latent channels, T frames, H x W latent pixels, S tokens a frame, N tokens,
L text tokens, D width. `t_B` is the diffusion time in [0, 1].

A :class:`Point` marks where a cache written by hand would keep a value of one kind; it does
nothing. :func:`run_by_hand` is that cache: it is what compiled models are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16
HEADS = 2
CHANNELS = 3
PATCH = 2


class Point(nn.Identity):
    """A value that is kept for `kind` where the cut is one of `cuts`.

    `num_points`: how many points one region has, one per stream.
    """

    def __init__(self, kind: str, *cuts: str, num_points: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.cuts = cuts or ("attention", "branch")
        self.num_points = num_points


Masks = Mapping[tuple[str, int], Sequence[bool]]
"""(kind, layer) -> one bool per step, True where it reuses."""


def run_by_hand(
    model: nn.Module, calls: Iterable[Mapping[str, Any]], masks: Masks, cut: str
) -> list[Any]:
    """Runs the calls in order; where its mask says so, a point gives the value it last had."""
    kept: dict[Point, Tensor] = {}
    layers: dict[Point, int] = {}
    step = 0

    def keep(point: nn.Module, _: Any, output: Tensor) -> Tensor:
        assert isinstance(point, Point)
        earlier = sum(other.kind == point.kind for other in layers)
        layer = layers.setdefault(point, earlier // point.num_points)
        if (point.kind, layer) in masks and masks[point.kind, layer][step]:
            return kept[point]
        kept[point] = output
        return output

    points = [m for m in model.modules() if isinstance(m, Point) and cut in m.cuts]
    handles = [point.register_forward_hook(keep) for point in points]
    results = []
    try:
        with torch.no_grad():
            for call in calls:
                results.append(model(**call))
                step += 1
    finally:
        for handle in handles:
            handle.remove()
    return results


# ---- attention in several spellings: (q, k, v) [..., heads, N, d] -> the same ----


def attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def attend_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1) @ v


def attend_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    weights = torch.softmax(scores.double(), dim=-1).to(v.dtype)
    return torch.matmul(F.dropout(weights, 0.1, training=False), v)


def attend_bias_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    bias = torch.linspace(0, 1, scores.numel()).view(scores.shape)
    return (bias + scores).softmax(-1) @ v


def attend_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    allowed = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[-2])
    return torch.where(allowed, scores, -1e4).softmax(-1) @ v


def attend_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat_q, flat_k, flat_v = (x.flatten(0, -3) for x in (q, k, v))
    empty = torch.zeros(len(flat_q), q.shape[-2], k.shape[-2], dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    scores = torch.baddbmm(empty, flat_q, flat_k.transpose(-1, -2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), flat_v).view(q.shape)


def attend_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: tuple[Attend, ...] = (
    attend_fused,
    attend_matmul,
    attend_in_float,
    attend_bias_first,
    attend_where,
    attend_baddbmm,
    attend_einsum,
)


def split_heads(x_BND: Tensor) -> Tensor:
    return x_BND.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def merge_heads(x_BHNd: Tensor) -> Tensor:
    return x_BHNd.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    def __init__(self, attend: Attend = attend_fused) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def heads(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.attend(
            split_heads(self.to_q(x)),
            split_heads(self.to_k(context)),
            split_heads(self.to_v(context)),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(merge_heads(self.heads(x, context)))


def make_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


# ---- residual branches, in the styles that regions must tell apart ----


class Branch(nn.Module):
    """x + gate * attention(modulated norm), the gate from the time: adaLN-Zero as in DiT."""

    def __init__(self, kind: str = "full", attend: Attend = attend_fused) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(attend)
        self.table = nn.Linear(WIDTH, 3 * WIDTH)
        self.cut = Point(kind, "attention")
        self.end = Point(kind, "branch")
        self.only = Point(kind)

    def modulation(self, emb_BD: Tensor) -> list[Tensor]:
        return list(self.table(emb_BD)[:, None].chunk(3, dim=-1))

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x) * (1 + scale) + shift)
        return x + self.end(gate * self.cut(y))


class Reversed(Branch):
    """The operands of the add in the other order."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x) * (1 + scale) + shift)
        return self.end(self.cut(y) * gate) + x


class InPlace(Branch):
    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x).mul(1 + scale).add_(shift))
        x = x.clone()
        x += self.end(gate * self.cut(y))
        return x


class Addcmul(Branch):
    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(torch.addcmul(shift, self.norm(x), 1 + scale))
        return torch.addcmul(x, gate, self.only(y))


class Plain(Branch):
    """No gate."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.attn(self.norm(x)))


class Cross(Branch):
    """Cross attention: no gate, no norm, as in Latte and PixArt."""

    def __init__(self, attend: Attend = attend_fused) -> None:
        super().__init__("cross", attend)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.attn(x, text))


class Sandwich(Branch):
    """A norm after the attention too, and a bounded gate, as in Lumina and Mochi."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.norm_after = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        y = self.norm_after(self.attn(self.norm(x) * (1 + scale)))
        return x + self.end(self.cut(y) * torch.tanh(gate))


class ModulatedAfter(Sandwich):
    """Shift and scale after the attention: both stay fresh."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, _ = self.modulation(emb_BD)
        y = self.norm_after(self.attn(self.norm(x)))
        return x + self.end(self.cut(y) * (1 + scale) + shift)


class GateFromHidden(Branch):
    """A gate from the hidden state, and one from both (type_as: a dependence in name only)."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.to_gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn(n * (1 + scale))
        gate = gate.type_as(x) * torch.sigmoid(self.to_gate(n))
        return x + self.end(gate * self.cut(y))


class LayerScale(Branch):
    """A learned scale is no gate: it does not change over the steps."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.gamma * self.attn(self.norm(x)))


class FloatResidual(Branch):
    """The branch in bfloat16, gate and residual in float32."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn.to_out(self._low(self.norm(x) * (1 + scale) + shift).float())
        return (x.float() + self.end(gate.float() * self.cut(y.bfloat16()).float())).to(x.dtype)

    def _low(self, n: Tensor) -> Tensor:
        return merge_heads(self.attn.heads(n)).bfloat16()


class HalfStream(Branch):
    """The stream in bfloat16, cast up around each add and down after it."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        x = x.bfloat16()
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn((self.norm(x.float()) * (1 + scale) + shift).type_as(self.norm.weight))
        x = (x.float() + self.end(gate * self.cut(y))).bfloat16()
        return x.float()


class Summed(Branch):
    """Attention and MLP in parallel, their sum gated: each is cached before the sum."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.mlp, self.mlp_end = make_mlp(), Point("mlp")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        return x + gate * (self.only(self.attn(n)) + self.mlp_end(self.mlp(n)))


class SummedPlain(Summed):
    """Attention and MLP in parallel, no gate: two branches, each added for itself."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        n = self.norm(x)
        return x + self.only(self.attn(n)) + self.mlp_end(self.mlp(n))


class SummedBeforeProjection(Summed):
    """Attention and MLP summed, then one projection for both."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        heads = self.only(merge_heads(self.attn.heads(n)))
        return x + gate * self.attn.to_out(heads + self.mlp_end(self.mlp(n)))


class SharedProjection(Branch):
    """Attention and MLP concatenated before one projection, as in Flux's single blocks."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.to_mlp, self.mlp_end = nn.Linear(WIDTH, 2 * WIDTH), Point("mlp")
        self.proj = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        heads = self.only(merge_heads(self.attn.heads(n)))
        return x + gate * self.proj(
            torch.cat([heads, self.mlp_end(F.gelu(self.to_mlp(n)))], dim=-1)
        )


class TwoKeys(Branch):
    """Two attentions of one kind on one query, summed before the add: text and image keys."""

    def __init__(self) -> None:
        super().__init__("cross")
        self.other = Attention()

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, _, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn(n, text) + self.other(n, text * 2)
        return x + self.end(gate * self.cut(y))


class TwoKinds(Branch):
    """Self and cross attention summed before one add: each is cached at its own output."""

    def __init__(self) -> None:
        super().__init__("full")
        self.other = Attention()
        self.cross = Point("cross")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, _, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(n))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(n, text))))
        return x + gate * (y + z)


class FeedsQuery(Branch):
    """The attention's output is the next attention's query before it is added."""

    def __init__(self) -> None:
        super().__init__("full")
        self.other = Attention()
        self.cross = Point("cross")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(self.norm(x)))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(y, text))))
        return x + y + z


class Chained(FeedsQuery):
    """As above, and only the second attention's output is added."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(self.norm(x)))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(y, text))))
        return x + z


class GateInside(Branch):
    """A gate before the last projection: part of the attention, and frozen with it."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        heads = merge_heads(self.attn.heads(self.norm(x) * (1 + scale)))
        return x + self.only(self.attn.to_out(gate * heads))


class Mlp(nn.Module):
    """x + gate * mlp(modulated norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = make_mlp()
        self.table = nn.Linear(WIDTH, 3 * WIDTH)
        self.cut = Point("mlp", "attention")
        self.end = Point("mlp", "branch")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.table(emb_BD)[:, None].chunk(3, dim=-1)
        return x + self.end(gate * self.cut(self.mlp(self.norm(x) * (1 + scale) + shift)))


# ---- whole models ----


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


# ---- cases ----


@dataclass(frozen=True)
class Sizes:
    """Latent sizes before patches: `height` and `width` are multiples of 2 * PATCH where windows
    are taken."""

    batch: int = 2
    frames: int = 3
    height: int = 8
    width: int = 4
    text: int = 5


@dataclass(frozen=True)
class Case:
    """A model, its latents' layout, and the kinds of its attentions in execution order."""

    name: str
    make: Callable[[], nn.Module]
    layout: str
    kinds: tuple[str, ...]
    condition: str = "text"
    sizes: Sizes = field(default_factory=Sizes)

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().eval()

    def call(self, step: int = 0, sizes: Sizes | None = None) -> dict[str, Tensor]:
        """The arguments of one step: latents and time differ from step to step, text does not."""
        s = sizes or self.sizes
        shapes = {
            "BCHW": (s.batch, CHANNELS, s.height, s.width),
            "BNC": (s.batch, s.height * s.width, CHANNELS),
            "BCTHW": (s.batch, CHANNELS, s.frames, s.height, s.width),
            "BTCHW": (s.batch, s.frames, CHANNELS, s.height, s.width),
        }
        generator = torch.Generator().manual_seed(100 + step)
        call = {
            f"x_{self.layout}": torch.randn(shapes[self.layout], generator=generator),
            "t_B": torch.full((s.batch,), 1.0 - 0.13 * step),
        }
        fixed = torch.Generator().manual_seed(7)
        if self.condition == "text":
            call["text_BLD"] = torch.randn(s.batch, s.text, WIDTH, generator=fixed)
        elif self.condition == "label":
            call["label_B"] = torch.arange(s.batch)
        return call


def _styles(*styles: type[nn.Module]) -> list[Case]:
    return [
        Case(style.__name__, lambda style=style: Image(style(), Mlp(), style()), "BCHW", kinds * 2)
        for style in styles
        for kinds in [
            ("full", "cross")
            if issubclass(style, (TwoKinds, FeedsQuery))
            else ("cross",) * (2 if issubclass(style, TwoKeys) else 1)
            if issubclass(style, (Cross, TwoKeys))
            else ("full",)
        ]
    ]


STYLES: tuple[Case, ...] = tuple(
    _styles(
        Branch,
        Reversed,
        InPlace,
        Addcmul,
        Plain,
        Cross,
        Sandwich,
        ModulatedAfter,
        GateFromHidden,
        GateInside,
        LayerScale,
        FloatResidual,
        HalfStream,
        Summed,
        SummedPlain,
        SummedBeforeProjection,
        SharedProjection,
        TwoKeys,
        TwoKinds,
        FeedsQuery,
        Chained,
    )
)
"""One residual branch each, twice in an image model with an MLP between."""

FACTORIZED = ("spatial", "cross", "temporal")
MODELS: tuple[Case, ...] = (
    Case("Factorized", Factorized, "BCTHW", FACTORIZED),
    Case("FramesFirst", FramesFirst, "BTCHW", FACTORIZED),
    Case("Rearranged", Rearranged, "BCTHW", ("spatial", "temporal", "cross")),
    Case("Full3d", Full3d, "BCTHW", ("full", "cross")),
    Case("JointImage", JointImage, "BCHW", ("joint", "joint")),
    Case("JointSliced", lambda: JointImage(sliced=True), "BCHW", ("joint", "joint")),
    Case("JointText", JointText, "BCHW", ("joint",)),
    Case("OneStream", OneStream, "BCHW", ("joint", "joint")),
    Case("Refined", Refined, "BCHW", ("other", "other", "full", "cross", "full", "cross")),
    Case("Windowed", Windowed, "BCHW", ("spatial", "spatial"), "none"),
    Case("ClassImage", ClassImage, "BCHW", ("full", "full"), "label"),
    Case("Packed", Packed, "BNC", ("full", "cross")),
    Case("LongSkip", LongSkip, "BCHW", ("full", "full", "full")),
)
SPELLED: tuple[Case, ...] = tuple(
    Case(
        attend.__name__,
        lambda a=attend: Image(Branch("full", a), Cross(a)),
        "BCHW",
        ("full", "cross"),
    )
    for attend in SPELLINGS[1:]
)
CASES: tuple[Case, ...] = (*MODELS, *SPELLED, *STYLES)
