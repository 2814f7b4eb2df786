"""Small diffusion transformers whose tokens are laid out as in public ones that pabc never saw.

Shapes as in :mod:`models`. Every :class:`~models.Point` is called, once a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from models import (
    CHANNELS,
    HEADS,
    PATCH,
    WIDTH,
    Attention,
    Image,
    Packed,
    Point,
    Video,
    attend_fused,
    make_mlp,
    merge_heads,
    split_heads,
)
from torch import Tensor, nn

Attend = Callable[[Tensor], Tensor]


class SelfAttention(nn.Module):
    """One projection for all three operands, as in timm; a bias on the scores where given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BND: Tensor, bias_WNN: Tensor | None = None) -> Tensor:
        b, n, d = x_BND.shape
        q, k, v = self.qkv(x_BND).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q * (d // HEADS) ** -0.5) @ k.transpose(-2, -1)
        if bias_WNN is not None:
            windows = len(bias_WNN)
            scores = scores.view(b // windows, windows, HEADS, n, n) + bias_WNN[:, None]
            scores = scores.view(b, HEADS, n, n)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class Residual(nn.Module):
    """x + gate * inner(norm(x)) with the gate from the time."""

    def __init__(self, kind: str, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.gate = nn.LayerNorm(WIDTH), inner, nn.Linear(WIDTH, WIDTH)
        self.cut, self.end = Point(kind, "attention"), Point(kind, "branch")

    def forward(self, x_BND: Tensor, emb_BD: Tensor, arrange: Attend | None = None) -> Tensor:
        y = self.norm(x_BND)
        y = self.inner(y) if arrange is None else arrange(y)
        gate = self.gate(emb_BD).unflatten(0, (-1, *(1,) * (y.ndim - 2)))
        return x_BND + self.end(gate * self.cut(y))


def attend(kind: str) -> Residual:
    return Residual(kind, SelfAttention())


def feed_forward() -> Residual:
    return Residual("mlp", make_mlp())


class Blocks(Image):
    """Image tokens through `mix`, which a subclass writes."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*(blocks or (attend("full"), feed_forward())))

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        return self.patch(x_BCHW).flatten(2).transpose(1, 2)

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return x

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        x = self.mix(self.tokens(x_BCHW), self.time(t_B), text_BLD)
        x = self.head(x).view(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(b, c, h, w)


class Guided(Blocks):
    """Classifier-free guidance within the forward, of which half the batch is used: as in DiT."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        half = x_BCHW[: len(x_BCHW) // 2]
        out = super().forward(torch.cat([half, half]), t_B, text_BLD)
        conditional, free = out.chunk(2)
        guided = free + 4 * (conditional - free)
        return torch.cat([guided, guided])


class TokensOfAllKinds(Blocks):
    """Time and text as tokens before the patches, halves joined by long skips: as in U-ViT."""

    def __init__(self) -> None:
        super().__init__(attend("joint"), feed_forward(), attend("joint"), feed_forward())
        self.skip = nn.Linear(2 * WIDTH, WIDTH)

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([emb[:, None], text, x], dim=1)
        skip = x = self.blocks[1](self.blocks[0](x, emb), emb)
        x = self.blocks[2](self.skip(torch.cat([x * 2, skip], dim=-1)), emb)
        return self.blocks[3](x, emb)[:, 1 + text.shape[1] :]


class Registers(Blocks):
    """Learned tokens before the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH))

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
        return super().mix(x, emb, text)[:, 3:]


class Hourglass(Blocks):
    """Half as many rows and columns in the middle: as in HDiT."""

    def __init__(self) -> None:
        super().__init__(attend("full"), attend("full"), feed_forward(), attend("full"))
        self.merge, self.split = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        skip = x = self.blocks[0](x, emb)
        b, n, d = x.shape
        x = x.view(b, n // 4, 2, 1, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(b, n // 4, 4 * d)
        x = self.split(self.blocks[2](self.blocks[1](self.merge(x), emb), emb))
        x = x.view(b, n // 4, 1, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(b, n, d)
        return self.blocks[3](torch.lerp(skip, x, 0.3), emb)


class Shuffled(Blocks):
    """Patches by pixel_unshuffle and pixel_shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4 * CHANNELS, WIDTH, 1)
        self.out = nn.Conv2d(WIDTH, 4 * CHANNELS, 1)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        maps = self.patch(F.pixel_unshuffle(x_BCHW, PATCH))
        x = self.mix(maps.flatten(2).transpose(1, 2), self.time(t_B), text_BLD)
        return F.pixel_shuffle(self.out(x.transpose(1, 2).reshape(maps.shape)), PATCH)


class Unfolded(Shuffled):
    """Patches by unfold and fold."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(WIDTH, 4 * CHANNELS)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        x = self.patch(F.unfold(x_BCHW, PATCH, stride=PATCH).transpose(1, 2))
        x = self.out(self.mix(x, self.time(t_B), text_BLD)).transpose(1, 2)
        return F.fold(x, x_BCHW.shape[-2:], PATCH, stride=PATCH)


class Neighbors(Blocks):
    """Each place attends to the 3 x 3 places around it."""

    def __init__(self) -> None:
        super().__init__(Residual("spatial", Attention()), feed_forward())

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, n, d = x.shape
        attn = self.blocks[0].inner

        def around(z: Tensor) -> Tensor:
            maps = z.transpose(1, 2).reshape(b, d, n // 2, 2)
            windows = F.pad(maps, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
            return split_heads(windows.permute(0, 2, 3, 4, 5, 1).reshape(b * n, 9, d))

        def attend_around(z: Tensor) -> Tensor:
            q = split_heads(attn.to_q(z).view(b * n, 1, d))
            y = attend_fused(q, around(attn.to_k(z)), around(attn.to_v(z)))
            return attn.to_out(merge_heads(y).view(b, n, d))

        return self.blocks[1](self.blocks[0](x, emb, attend_around), emb)


class Routed(nn.Module):
    """Experts that each choose some tokens; their results are added where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 2)
        self.up = nn.Parameter(torch.linspace(-1, 1, 2 * WIDTH * 8).view(2, WIDTH, 8))
        self.down = nn.Parameter(torch.linspace(1, -1, 2 * WIDTH * 8).view(2, 8, WIDTH))

    def forward(self, x_BND: Tensor) -> Tensor:
        x = x_BND.reshape(-1, WIDTH)
        weights, chosen = self.route(x).softmax(-1).t().topk(5, dim=-1)
        y = F.silu(x[chosen] @ self.up) @ self.down * weights[..., None]
        y = torch.zeros_like(x).index_add(0, chosen.flatten(), y.flatten(0, 1))
        return y.view(x_BND.shape)


class OverChannels(nn.Module):
    """Attention whose softmax mixes channels; the products mix all tokens: as in XCiT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BND: Tensor) -> Tensor:
        b, n, d = x_BND.shape
        q, k, v = self.qkv(x_BND).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(b, n, d))


class Nested(Blocks):
    """Cross attention on the attention's output, their sum beside an MLP before one projection."""

    def __init__(self) -> None:
        super().__init__(attend("full"))
        self.attns = nn.ModuleList((Attention(), Attention()))
        self.to_mlp, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.points = nn.ModuleList((Point("full"), Point("cross")))

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        n = self.norm(x)
        y = self.attns[0].to_out(self.points[0](merge_heads(self.attns[0].heads(n))))
        y = y + self.points[1](self.attns[1](y, text))
        y = self.proj(torch.cat([y, F.gelu(self.to_mlp(n))], dim=-1))
        return self.blocks[0](x + self.gate(emb)[:, None] * y, emb)


class PartsGated(Blocks):
    """A gate of its own for each part of the stream: as where the first frame is given."""

    def __init__(self) -> None:
        super().__init__(attend("full"))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.inner = nn.ModuleList((SelfAttention(), make_mlp()))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.cuts = nn.ModuleList(
            Point(kind, "attention", num_points=2) for kind in ("full", "mlp") for _ in range(2)
        )
        self.ends = nn.ModuleList(
            Point(kind, "branch", num_points=2) for kind in ("full", "mlp") for _ in range(2)
        )

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        for i in range(2):
            y = self.inner[i](self.norms[i](x))
            parts, ys = (x[:, :2], x[:, 2:]), y.split([2, y.shape[1] - 2], dim=1)
            x = torch.cat(
                [
                    part + self.ends[2 * i + j](self.cuts[2 * i + j](ys[j]) * gate)
                    for j, (part, gate) in enumerate(
                        zip(parts, self.gates[i](emb)[:, None].chunk(2, dim=-1), strict=True)
                    )
                ],
                dim=1,
            )
        return self.blocks[0](x, emb)


class FramesInBatch(Blocks):
    """Latents (B*T, C, H, W) and attention over frames between: as in AnimateDiff."""

    FRAMES = 3

    def __init__(self) -> None:
        super().__init__(attend("spatial"), attend("temporal"), feed_forward())

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = self.blocks[0](x, emb)
        bt, n, d = x.shape
        x = x.view(-1, self.FRAMES, n, d).transpose(1, 2).reshape(-1, self.FRAMES, d)
        x = self.blocks[1](x, emb[:: self.FRAMES].repeat_interleave(n, dim=0))
        x = x.view(-1, n, self.FRAMES, d).transpose(1, 2).reshape(bt, n, d)
        return self.blocks[2](x, emb)


class SequenceFirst(Packed):
    """Tokens (N, B, C), as PyTorch's own attention takes them."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), make_mlp())
        self.attns = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2))
        self.points = nn.ModuleList(map(Point, ("full", "cross", "mlp")))

    def forward(self, x_NBC: Tensor, t_B: Tensor, text_LBD: Tensor) -> Tensor:
        x = self.embed(x_NBC) + self.time(t_B)
        n = self.blocks[0](x)
        x = x + self.points[0](self.attns[0](n, n, n, need_weights=False)[0])
        x = x + self.points[1](self.attns[1](x, text_LBD, text_LBD, need_weights=False)[0])
        return self.head(x + self.points[2](self.blocks[1](x)))


class NoBatch(Packed):
    """Tokens of all samples in one sequence (N, C), told apart by a mask: as in NaViT."""

    def __init__(self) -> None:
        super().__init__(Attention(), Attention(), make_mlp(), nn.LayerNorm(WIDTH))
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.cut, self.end = Point("full", "attention"), Point("full", "branch")
        self.points = nn.ModuleList(map(Point, ("cross", "mlp")))

    def forward(
        self, x_NC: Tensor, t_B: Tensor, text_LD: Tensor, ids_N: Tensor, ids_L: Tensor
    ) -> Tensor:
        def among(block: nn.Module, x: Tensor, context: Tensor, ids: Tensor) -> Tensor:
            q, k, v = (
                split_heads(layer(z))
                for layer, z in ((block.to_q, x), (block.to_k, context), (block.to_v, context))
            )
            mask = ids_N[:, None] == ids
            return block.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v, mask)))

        own, cross, mlp, norm = self.blocks
        x, gate = self.embed(x_NC), self.gate(self.time(t_B))[ids_N]
        n = norm(x)
        x = x + self.end(gate * self.cut(among(own, n, n, ids_N)))
        x = x + self.points[0](among(cross, x, text_LD, ids_L))
        return self.head(x + self.points[1](mlp(x)))


class Clip(Video):
    """Video tokens (B, T, S, D) through `mix`, which a subclass writes."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        x = self.mix(self.tokens(x_BCTHW), self.time(t_B), text_BLD)
        return self.latents(x, x_BCTHW.shape)


class Shifted(Clip):
    """Windows within each frame, every second time shifted and masked: as in Swin."""

    def __init__(self) -> None:
        super().__init__(attend("spatial"), attend("spatial"), feed_forward())

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks[:2]):
            x = block(x, emb, lambda y, i=i, block=block: self._within(block.inner, y, i))
        return self.blocks[2](x, emb)

    def _within(self, attn: nn.Module, x_BTSD: Tensor, shift: int) -> Tensor:
        maps = x_BTSD.flatten(0, 1).unflatten(1, (-1, 2))
        rows = maps.shape[1]
        maps = torch.roll(maps, (-shift, -shift), (1, 2))
        which = torch.zeros(1, rows, 2, 1)
        which[:, rows - shift :] = 1
        which = self._windows(which)[..., 0]
        mask = (which[:, :, None] - which[:, None]).ne(0) * -100.0
        y = attn(self._windows(maps), mask).view(-1, rows // 2, 1, 2, 2, WIDTH).transpose(2, 3)
        return torch.roll(y.reshape(maps.shape), (shift, shift), (1, 2)).reshape(x_BTSD.shape)

    def _windows(self, maps: Tensor) -> Tensor:
        n, rows, columns, d = maps.shape
        windows = maps.view(n, rows // 2, 2, columns // 2, 2, d).transpose(2, 3)
        return windows.reshape(-1, 4, d)


class FirstAndPrevious(Clip):
    """Keys from the first frame and the one before: as in Tune-A-Video."""

    def __init__(self) -> None:
        super().__init__(Residual("spatial", Attention()), attend("temporal"), feed_forward())

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, t, s, d = x.shape
        attn = self.blocks[0].inner
        before = (torch.arange(t) - 1).clamp(min=0)

        def across(y: Tensor) -> Tensor:
            context = torch.cat([y[:, [0] * t], y[:, before]], dim=2)
            return attn(y.flatten(0, 1), context.flatten(0, 1)).view(y.shape)

        x = self.blocks[0](x, emb, across).transpose(1, 2).reshape(b * s, t, d)
        x = self.blocks[1](x, emb.repeat_interleave(s, dim=0)).view(b, s, t, d)
        return self.blocks[2](x.transpose(1, 2), emb)


class PackedKeys(Clip):
    """Cross attention of all samples in one sequence: as Open-Sora's with xformers."""

    def __init__(self) -> None:
        super().__init__(attend("spatial"), attend("temporal"), feed_forward())
        self.cross, self.point = Attention(), Point("cross")

    def mix(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, t, s, d = x.shape
        space, time, mlp = self.blocks
        x = space(x, emb, lambda y: space.inner(y.flatten(0, 1)).view(y.shape))
        x = time(x, emb, lambda y: _over_frames(time.inner, y))
        queries, keys = torch.arange(b).repeat_interleave(t * s), torch.arange(b * text.shape[1])
        mask = queries[:, None] == keys.div(text.shape[1], rounding_mode="floor")
        q, k, v = (
            split_heads(layer(z).reshape(1, -1, d))
            for layer, z in (
                (self.cross.to_q, x),
                (self.cross.to_k, text),
                (self.cross.to_v, text),
            )
        )
        y = merge_heads(F.scaled_dot_product_attention(q, k, v, mask)).view(x.shape)
        return mlp(x + self.point(self.cross.to_out(y)), emb)


def _over_frames(attn: nn.Module, x_BTSD: Tensor) -> Tensor:
    b, t, s, d = x_BTSD.shape
    y = attn(x_BTSD.transpose(1, 2).reshape(b * s, t, d))
    return y.view(b, s, t, d).transpose(1, 2)


class WithAudio(Clip):
    """A second stream that is denoised too: its own attentions are not the latents'."""

    def __init__(self) -> None:
        super().__init__(attend("full"), feed_forward())
        self.hear, self.tell = Attention(), Attention()
        self.embed_audio, self.point = nn.Linear(CHANNELS, WIDTH), Point("cross")

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, audio_BMC: Tensor) -> Tensor:
        emb, audio = self.time(t_B), self.embed_audio(audio_BMC)
        x = self.tokens(x_BCTHW)
        y = self.blocks[0](x.flatten(1, 2), emb)
        y = y + self.point(self.hear(y, audio))
        audio = audio + self.tell(audio, y)
        y = self.blocks[1](y, emb) * torch.sigmoid(audio.mean(dim=1, keepdim=True))
        return self.latents(y.view(x.shape), x_BCTHW.shape)


# ---- cases ----


@dataclass(frozen=True)
class Layout:
    """A model, the shapes of its inputs after the latents and the time, and what is in it."""

    make: Callable[[], nn.Module]
    latents: tuple[str, tuple[int, ...]]
    kinds: tuple[str, ...]
    num_mlps: int = 1
    condition: str = "text_BLD"

    def __str__(self) -> str:
        return getattr(self.make, "__name__", "routed")

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def call(self, step: int = 0) -> dict[str, Tensor]:
        """The arguments of one step; only latents and time differ from step to step."""
        name, shape = self.latents
        batch = {"x_NC": 2, "x_NBC": shape[1]}.get(name, shape[0])
        generator = torch.Generator().manual_seed(100 + step)
        call = {name: torch.randn(shape, generator=generator)}
        call["t_B"] = torch.full((batch,), 1.0 - 0.13 * step)
        fixed = torch.Generator().manual_seed(7)
        if self.condition == "audio_BMC":
            return call | {"audio_BMC": torch.randn(batch, 7, CHANNELS, generator=fixed)}
        text = torch.randn(batch, 5, WIDTH, generator=fixed)
        if name == "x_NBC":
            return call | {"text_LBD": text.transpose(0, 1).contiguous()}
        if name == "x_NC":
            ids = {"ids_N": torch.arange(shape[0]) // 8, "ids_L": torch.arange(7) // 4}
            return call | {"text_LD": text.flatten(0, 1)[:7], **ids}
        return call | {"text_BLD": text}


def routed() -> nn.Module:
    return Blocks(attend("full"), Residual("mlp", Routed()))


def over_channels() -> nn.Module:
    return Blocks(attend("full"), Residual("other", OverChannels()), feed_forward())


IMAGE = ("x_BCHW", (2, CHANNELS, 8, 4))
VIDEO = ("x_BCTHW", (2, CHANNELS, 3, 8, 4))
LAYOUTS: tuple[Layout, ...] = (
    Layout(Guided, IMAGE, ("full",)),
    Layout(TokensOfAllKinds, IMAGE, ("joint", "joint"), 2),
    Layout(Registers, IMAGE, ("full",)),
    Layout(Hourglass, IMAGE, ("full", "full", "full")),
    Layout(Shuffled, IMAGE, ("full",)),
    Layout(Unfolded, IMAGE, ("full",)),
    Layout(Neighbors, IMAGE, ("spatial",)),
    Layout(routed, IMAGE, ("full",)),
    Layout(over_channels, IMAGE, ("full", "other")),
    Layout(Nested, IMAGE, ("full", "cross", "full"), 1),
    Layout(PartsGated, IMAGE, ("full", "full")),
    Layout(FramesInBatch, ("x_BCHW", (6, CHANNELS, 8, 4)), ("spatial", "temporal")),
    Layout(SequenceFirst, ("x_NBC", (12, 2, CHANNELS)), ("full", "cross")),
    Layout(NoBatch, ("x_NC", (13, CHANNELS)), ("full", "cross")),
    Layout(Shifted, VIDEO, ("spatial", "spatial")),
    Layout(FirstAndPrevious, VIDEO, ("spatial", "temporal")),
    Layout(PackedKeys, VIDEO, ("spatial", "temporal", "cross")),
    Layout(WithAudio, VIDEO, ("full", "cross", "other"), 1, "audio_BMC"),
)
