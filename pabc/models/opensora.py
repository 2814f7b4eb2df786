"""Open-Sora 1.2: the space-time transformer STDiT3 (arXiv 2412.20404).

Shapes as in :mod:`pabc.models.layers`; with patches that span frames, T counts patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pabc.models.config import Configurable, check_positive
from pabc.models.layers import (
    Attend,
    Mlp,
    PackedAttention,
    TimestepEmbedder,
    attend_all,
    attend_frames,
    attend_times,
    merge_heads,
    modulate,
    plain_norm,
    split_heads,
)
from pabc.models.positions import THETA


class OpenSora12(Configurable):
    """STDiT3: spatial and temporal blocks in turn, each with cross attention to the text.

    The arguments are the original's configuration keys; see :meth:`from_config`. Raises ValueError
    for values that no model can have.
    """

    fixed: ClassVar[Mapping[str, Collection[object]]] = {"skip_y_embedder": (False,)}
    ignored: ClassVar[Collection[str]] = (
        "class_dropout_prob",
        "drop_path",
        "enable_flash_attn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        "freeze_y_embedder",
        "input_size",
        "only_train_temporal",
    )

    def __init__(
        self,
        *,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        check_positive("OpenSora12", input_sq_size=input_sq_size, depth=depth, num_heads=num_heads)
        if hidden_size % 4 or hidden_size % (2 * num_heads):
            raise ValueError(
                "OpenSora12.hidden_size: expected a multiple of 4 and of 2 x num_heads "
                f"({2 * num_heads}), found {hidden_size}"
            )
        self.input_sq_size = input_sq_size
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.pos_embed = PlaceEmbedding(hidden_size)
        self.rope = Rope(hidden_size // num_heads)
        self.x_embedder = PatchEmbed3D(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        make = partial(Block, hidden_size, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm)
        self.spatial_blocks = nn.ModuleList(make(attend_frames) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(make(attend_times) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, math.prod(patch_size) * self.out_channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> Tensor:
        """Returns the model's prediction.

        Args:
            x: latents [B, C, frames, rows, columns].
            timestep: [B].
            y: text [B, 1, L, features].
            mask: 1 for valid text tokens, else 0: [n, L], repeated to the batch size.
            x_mask: True for frames that are denoised [B, T]; other frames are modulated as at
                timestep 0. None: all frames are denoised.
            fps: frames per second [n], repeated to the batch size.
            height: of the video in pixels, a tensor whose first element is used.
            width: likewise.

        Returns:
            [B, out_channels, frames, rows, columns], in float32.
        """
        if fps is None or height is None or width is None:
            raise ValueError("fps, height, width: expected a tensor for each, found None")
        dtype = self.final_layer.linear.weight.dtype
        t_BD, t_B6TSD = self._embed_times(timestep.to(dtype), fps)
        clean_BD = None
        if x_mask is not None:
            x_mask = x_mask.bool()
            clean_BD, clean_B6TSD = self._embed_times(torch.zeros_like(timestep.to(dtype)), fps)
            t_B6TSD = torch.where(x_mask[:, None, :, None, None], t_B6TSD, clean_B6TSD)
        text_BLD = self.y_embedder(y.to(dtype)).squeeze(1)
        if mask is not None:
            mask = repeat_rows(mask.flatten(1), len(y))[:, None, None] != 0

        h_BTSD, grid = self.x_embedder(x.to(dtype))
        scale = (height[0].float() * width[0].float()).sqrt() / self.input_sq_size
        h = h_BTSD + self.pos_embed(*grid[1:], scale).to(dtype)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = spatial(h, t_B6TSD, text_BLD, mask)
            h = temporal(h, t_B6TSD, text_BLD, mask, rotate=self.rope)
        patches = self.final_layer(h, t_BD, x_mask, clean_BD)
        return self._unpatchify(patches, grid, x.shape).float()

    def _embed_times(self, t_B: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the embedding [B, D] and the modulations [B, 6, 1, 1, D] of all blocks."""
        t_BD = self.t_embedder(t_B) + repeat_rows(self.fps_embedder(fps), len(t_B))
        return t_BD, self.t_block(t_BD).unflatten(1, (6, 1, 1, -1))

    def _unpatchify(self, patches: Tensor, grid: Sequence[int], shape: torch.Size) -> Tensor:
        x = patches.flatten(1, 2).unflatten(1, tuple(grid))
        x = x.unflatten(4, (*self.x_embedder.proj.kernel_size, self.out_channels))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, : shape[2], : shape[3], : shape[4]]


class Block(nn.Module):
    """Self-attention over tokens grouped by `arrange`, cross attention to the text, and an MLP."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        arrange: Callable[[Attend, Tensor], Tensor],
        *,
        mlp_ratio: float,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.arrange = arrange
        self.norm1 = plain_norm(width)
        self.attn = PackedAttention(width, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x_BTSD: Tensor, t_B6TSD: Tensor, text_BLD: Tensor, mask: Tensor | None, **how: Any
    ) -> Tensor:
        """Runs the block; `how` is passed to the self-attention."""
        table = self.scale_shift_table[:, None, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (table + t_B6TSD).unbind(1)
        y = modulate(self.norm1(x_BTSD), shift, scale)
        x = x_BTSD + gate * self.arrange(partial(self.attn, **how), y)
        x = x + attend_all(partial(self.cross_attn, text_BLD=text_BLD, mask=mask), x)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class CrossAttention(nn.Module):
    """Attention to the text; one projection for keys and values, packed [2, H, d]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, text_BLD: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, N, D] to the same shape; `mask` [B, 1, 1, L] is True for valid text tokens."""
        q = split_heads(self.q_linear(x_BND), self.num_heads)
        kv = self.kv_linear(text_BLD).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class FinalLayer(nn.Module):
    """The projection of tokens to patches."""

    def __init__(self, width: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, patch_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(
        self, x_BTSD: Tensor, t_BD: Tensor, x_mask: Tensor | None, clean_BD: Tensor | None
    ) -> Tensor:
        """Maps [B, T, S, D] to [B, T, S, patch]; frames not in `x_mask` use `clean_BD`."""
        x = self._modulate(x_BTSD, t_BD)
        if x_mask is not None and clean_BD is not None:
            # Modulated a second time, as when the published weights were trained.
            x = torch.where(x_mask[:, :, None, None], x, self._modulate(x, clean_BD))
        return self.linear(x)

    def _modulate(self, x_BTSD: Tensor, t_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t_BD[:, None])[:, :, None, None].unbind(1)
        return modulate(self.norm_final(x_BTSD), shift, scale)


class PatchEmbed3D(nn.Module):
    """The projection of patches of frames, rows and columns, zero-padded at the end of each."""

    def __init__(self, in_channels: int, width: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        if len(patch_size) != 3:
            raise ValueError(
                f"patch_size: expected frames, rows and columns of a patch, found {patch_size!r}"
            )
        size = (patch_size[0], patch_size[1], patch_size[2])
        self.proj = nn.Conv3d(in_channels, width, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Maps [B, C, frames, rows, columns] to [B, T, S, D]; returns the patches per axis, too."""
        missing = [-n % p for n, p in zip(x.shape[2:], self.proj.kernel_size, strict=True)]
        patches = self.proj(F.pad(x, [n for pad in reversed(missing) for n in (0, pad)]))
        num_frames, rows, columns = patches.shape[2:]
        return patches.flatten(3).permute(0, 2, 3, 1), (num_frames, rows, columns)


class PlaceEmbedding(nn.Module):
    """The 2-D position embedding, which is computed and has no parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.axis_width = width // 2

    def forward(self, rows: int, columns: int, scale: Tensor) -> Tensor:
        """Returns the embedding [S, D]: one half for the column, one for the row.

        `scale` is the video's size over that of training.
        """
        base = round(math.sqrt(rows * columns))
        x, y = (self._embed(n, base, scale) for n in (columns, rows))
        shape = (rows, columns, self.axis_width)
        return torch.cat([x[None].expand(shape), y[:, None].expand(shape)], dim=-1).flatten(0, 1)

    def _embed(self, length: int, base: int, scale: Tensor) -> Tensor:
        even = torch.arange(0, self.axis_width, 2, dtype=torch.float32, device=scale.device)
        frequencies = 1.0 / THETA ** (even / self.axis_width)
        positions = torch.arange(length, device=scale.device).float() / scale * (base / length)
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Rope(nn.Module):
    """Rotary position embedding over the tokens; pairs of adjacent channels are rotated."""

    freqs: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        even = torch.arange(0, head_dim, 2, dtype=torch.float32)
        self.register_buffer("freqs", 1.0 / THETA ** (even / head_dim))

    def forward(self, x_BHNd: Tensor) -> Tensor:
        """Rotates queries or keys."""
        positions = torch.arange(x_BHNd.shape[2], device=x_BHNd.device)
        angles = (positions[:, None] * self.freqs.float()).repeat_interleave(2, dim=-1)
        first, second = x_BHNd.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return x_BHNd * angles.cos().to(x_BHNd.dtype) + turned * angles.sin().to(x_BHNd.dtype)


class CaptionEmbedder(nn.Module):
    """The projection of text features to the model's width; `y_embedding` is the null text."""

    y_embedding: Tensor

    def __init__(self, in_features: int, width: int, num_tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(in_features, width, width)
        null = torch.randn(num_tokens, in_features) / in_features**0.5
        self.register_buffer("y_embedding", null)

    def forward(self, text: Tensor) -> Tensor:
        """Maps [..., features] to [..., D]."""
        return self.y_proj(text)


def repeat_rows(x: Tensor, num_rows: int) -> Tensor:
    """Repeats the rows of a matrix until there are `num_rows`."""
    if num_rows % len(x):
        raise ValueError(f"mask, fps: expected a divisor of {num_rows} rows, found {len(x)}")
    return x.repeat(num_rows // len(x), 1)
