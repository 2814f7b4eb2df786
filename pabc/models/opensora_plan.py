"""Open-Sora-Plan (arXiv 2412.00131) 1.1 and 1.2.

Shapes as in :mod:`pabc.models.layers`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pabc.models.config import check_positive
from pabc.models.layers import attend_all, attend_frames, mask_to_bias
from pabc.models.pixart import (
    NUM_NULL_TOKENS,
    Attention,
    TemporalBlock,
    TextBlock,
    VideoTransformer,
    read_text,
)
from pabc.models.positions import Rotary, grid_positions, rotary, sincos, sincos_grid, spread

PIXART_SIZE = 64  # latent pixels per side at which 2-D positions have a scale of 1
LATTE_LENGTH = 16  # latent frames at which temporal positions have a scale of 1
TRAINED_SIZE = (30, 40)  # latent rows and columns at which those of version 1.2 have it


class OpenSoraPlan11(VideoTransformer):
    """LatteT2V of Open-Sora-Plan 1.1: spatial blocks with cross attention, and temporal blocks.

    The arguments are the original's configuration keys; see :meth:`from_config`. Raises ValueError
    for values that no model can have.
    """

    fixed: ClassVar[Mapping[str, Collection[object]]] = {
        **VideoTransformer.fixed,
        "patch_size_t": (1,),
        "rope_scaling_type": ("linear",),
    }
    ignored: ClassVar[Collection[str]] = (*VideoTransformer.ignored, "model_max_length")

    def __init__(
        self,
        *,
        in_channels: int,
        sample_size: Sequence[int],
        patch_size: int,
        cross_attention_dim: int,
        caption_channels: int,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        out_channels: int | None = None,
        num_layers: int = 1,
        attention_bias: bool = False,
        activation_fn: str = "geglu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        video_length: int = 16,
        interpolation_scale_1d: float | None = None,
        use_rope: bool = False,
        compress_kv_factor: int = 1,
    ) -> None:
        check_positive(
            "OpenSoraPlan11",
            patch_size=patch_size,
            num_layers=num_layers,
            video_length=video_length,
            compress_kv_factor=compress_kv_factor,
        )
        if use_rope and (compress_kv_factor != 1 or attention_head_dim % 4):
            raise ValueError(
                "OpenSoraPlan11: expected with use_rope compress_kv_factor 1 and a multiple of 4 "
                f"as attention_head_dim, found {compress_kv_factor} and {attention_head_dim}"
            )
        width = num_attention_heads * attention_head_dim
        super().__init__(
            width,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            caption_channels=caption_channels,
            num_null_tokens=NUM_NULL_TOKENS,
        )
        self.trained_grid = (sample_size[0] // patch_size, sample_size[1] // patch_size)
        self.num_layers = num_layers
        self.video_length = video_length
        self.use_rope = use_rope
        self.head_dim = attention_head_dim
        self.compress_kv_factor = compress_kv_factor
        self.scale_2d = max(sample_size[0] // PIXART_SIZE, 1)
        if interpolation_scale_1d is None:
            interpolation_scale_1d = (video_length - video_length % 2) // LATTE_LENGTH
        self.scale_1d = max(interpolation_scale_1d, 1)

        norm = partial(nn.LayerNorm, width, norm_eps, norm_elementwise_affine)
        heads = (width, num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList()
        self.temporal_transformer_blocks = nn.ModuleList()
        for i in range(num_layers):
            spatial: Attention = Attention(*heads, bias=attention_bias)
            temporal: Attention = Attention(*heads, bias=attention_bias)
            if self._is_compressed(i):
                spatial = FrameCompressedAttention(*heads, compress_kv_factor, bias=attention_bias)
                temporal = TimeCompressedAttention(*heads, compress_kv_factor, bias=attention_bias)
            cross = Attention(*heads, context_width=cross_attention_dim, bias=attention_bias)
            self.transformer_blocks.append(
                TextBlock(
                    width,
                    norm,
                    spatial,
                    activation_fn,
                    cross_attention=cross,
                    arrange=attend_frames,
                )
            )
            self.temporal_transformer_blocks.append(
                TemporalBlock(width, norm, temporal, activation_fn)
            )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
    ) -> Tensor:
        """Returns the model's prediction.

        Args:
            hidden_states: latents [B, C, T, height, width].
            timestep: [B].
            encoder_hidden_states: text [B, L, features] or [B, 1, L, features].
            attention_mask: 1 for latent pixels that spatial attention attends to, else 0:
                [B, T, height, width].
            encoder_attention_mask: 1 for valid text tokens, else 0: [B, L] or [B, 1, L].
            enable_temporal_attentions: False to skip the temporal blocks.

        Returns:
            [B, out_channels, T, height, width].
        """
        num_frames, grid = hidden_states.shape[2], self.count_tokens(hidden_states)
        if num_frames != self.video_length:
            raise ValueError(
                f"hidden_states: expected {self.video_length} frames, found {num_frames}"
            )
        x_BTSD = self.pos_embed(hidden_states.to(self.dtype))
        device, dtype = x_BTSD.device, x_BTSD.dtype
        x = (x_BTSD + self._embed_places(grid, device)).to(dtype)
        frames = torch.arange(num_frames, device=device)
        times = sincos(self.width, frames / self.scale_1d)[:, None].to(dtype)
        t_B6D, t_BD = self.adaln_single(timestep)
        text, text_bias = read_text(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
        text = self.caption_projection(text)

        bias, compressed_bias = self._make_biases(attention_mask, dtype)
        plain: dict[str, Any] = {"bias": bias}
        compressed: dict[str, Any] = {"bias": compressed_bias, "grid": grid}
        over_time: dict[str, Any] = {}
        if self.use_rope:
            rows, columns = (torch.arange(length, device=device) for length in grid)
            plain["rotate"] = self._rotary(grid_positions(rows, columns), self.scale_2d)
            over_time["rotate"] = self._rotary(frames[None], self.scale_1d)
        for i, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            how = compressed if self._is_compressed(i) else plain
            x = spatial(x, t_B6D, text, text_bias, **how)
            if enable_temporal_attentions:
                if i == 0:
                    x = x + times
                x = temporal(x, t_B6D, **over_time)
        return self.project_out(x, t_BD, grid)

    def _is_compressed(self, layer: int) -> bool:
        return self.compress_kv_factor != 1 and layer >= self.num_layers // 2

    def _embed_places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        base = self.trained_grid[0]
        side = math.isqrt(grid[0] * grid[1])
        if side**2 == grid[0] * grid[1] and grid == self.trained_grid:
            grid = (side, side)  # the original treats its configured sample size as square
        rows, columns = (spread(length, base, self.scale_2d, device) for length in grid)
        return sincos_grid(self.width, rows, columns)

    def _rotary(self, positions_PN: Tensor, scale: float) -> Rotary:
        # Scaled positions are whole: neighbors share one where the scale exceeds 1.
        return rotary(self.head_dim, (positions_PN.float() / scale).trunc())

    def _make_biases(
        self, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns biases [B x T, 1, 1, S] over a frame's tokens, and over its compressed tokens."""
        if mask is None:
            return None, None
        if mask.ndim != 4:
            raise ValueError(
                "attention_mask: expected shape [batch, frames, height, width], "
                f"found {list(mask.shape)}"
            )
        tokens = (F.max_pool2d(mask.to(dtype), self.patch_size) != 0).to(dtype)
        pooled = F.max_pool2d(tokens, self.compress_kv_factor)
        bias, compressed = (
            mask_to_bias(m.flatten(2).flatten(0, 1), dtype)[:, None, None] for m in (tokens, pooled)
        )
        return bias, compressed


class FrameCompressedAttention(Attention):
    """Attention in a frame, with keys and values from patches of `factor` x `factor` tokens."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, factor: int, *, bias: bool
    ) -> None:
        super().__init__(width, num_heads, head_dim, bias=bias)
        self.sr = nn.Conv2d(width, width, kernel_size=factor, stride=factor, groups=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BND: Tensor, *, grid: tuple[int, int], bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """Maps [B, N, D] to the same shape; `grid`: the rows and columns of a frame's tokens."""
        image = x_BND.transpose(1, 2).unflatten(2, grid)
        context = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        return super().forward(x_BND, context, bias=bias)


class TimeCompressedAttention(Attention):
    """Attention over frames, with keys and values from groups of `factor` frames.

    If T is odd, the first frame is a group of its own.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, factor: int, *, bias: bool
    ) -> None:
        super().__init__(width, num_heads, head_dim, bias=bias)
        self.sr = nn.Conv1d(width, width, kernel_size=factor, stride=factor, groups=width)
        self.norm = nn.LayerNorm(width)
        self.factor = factor

    def forward(self, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        """Maps [B, T, D] to the same shape."""
        frames = x_BTD.transpose(1, 2)
        if x_BTD.shape[1] % 2:
            first = frames[:, :, :1].expand(-1, -1, self.factor - 1)
            frames = torch.cat([first, frames], dim=2)
        return super().forward(x_BTD, self.norm(self.sr(frames).transpose(1, 2)))


class OpenSoraPlan12(VideoTransformer):
    """OpenSoraT2V of Open-Sora-Plan 1.2: attention over all tokens of the video.

    The arguments are the original's configuration keys, and one more; see :meth:`from_config`.
    Raises ValueError for values that no model can have.

    Args:
        shared_rotary_tables: the original caches rotary tables by their length only, so that axes
            of equal length share the table, and thus the scale, of the first of them, even across
            calls. True does the same, for weights that were trained with unequal scales; released
            weights have scales of 1, for which it makes no difference. False: each axis has its own
            scale, and no call depends on earlier ones.
    """

    fixed: ClassVar[Mapping[str, Collection[object]]] = {
        **VideoTransformer.fixed,
        "downsampler": (None, ""),
        "patch_size_t": (1,),
        "use_additional_conditions": (False, None),
    }
    ignored: ClassVar[Collection[str]] = (*VideoTransformer.ignored, "use_stable_fp32")

    def __init__(
        self,
        *,
        in_channels: int,
        sample_size: Sequence[int] | int,
        sample_size_t: int,
        patch_size: int,
        cross_attention_dim: int,
        caption_channels: int,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        out_channels: int | None = None,
        num_layers: int = 1,
        attention_bias: bool = False,
        activation_fn: str = "geglu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        interpolation_scale_h: float | None = None,
        interpolation_scale_w: float | None = None,
        interpolation_scale_t: float | None = None,
        use_rope: bool = False,
        shared_rotary_tables: bool = True,
    ) -> None:
        check_positive(
            "OpenSoraPlan12",
            sample_size_t=sample_size_t,
            patch_size=patch_size,
            num_layers=num_layers,
        )
        if use_rope and attention_head_dim % 6:
            raise ValueError(
                "OpenSoraPlan12.attention_head_dim: expected a multiple of 6 with use_rope, "
                f"found {attention_head_dim}"
            )
        width = num_attention_heads * attention_head_dim
        super().__init__(
            width,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            caption_channels=caption_channels,
            num_null_tokens=0,
        )
        rows, columns = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        self.trained_size = (sample_size_t, rows // patch_size, columns // patch_size)
        defaults = (
            (sample_size_t - 1) // LATTE_LENGTH + 1
            if sample_size_t % 2
            else sample_size_t / LATTE_LENGTH,
            rows / TRAINED_SIZE[0],
            columns / TRAINED_SIZE[1],
        )
        given = (interpolation_scale_t, interpolation_scale_h, interpolation_scale_w)
        self.scales = tuple(d if g is None else g for g, d in zip(given, defaults, strict=True))
        self.use_rope = use_rope
        self.head_dim = attention_head_dim
        self.shared_rotary_tables = shared_rotary_tables
        self._scale_of_table: dict[tuple[int, torch.device, torch.dtype], float] = {}

        norm = partial(nn.LayerNorm, width, norm_eps, norm_elementwise_affine)
        attend = partial(
            Attention, width, num_attention_heads, attention_head_dim, bias=attention_bias
        )
        self.transformer_blocks = nn.ModuleList(
            TextBlock(
                width,
                norm,
                attend(),
                activation_fn,
                cross_attention=attend(context_width=cross_attention_dim),
                arrange=attend_all,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the model's prediction.

        Args:
            hidden_states: latents [B, C, T, height, width].
            timestep: [B].
            encoder_hidden_states: text [B, 1, L, features] or [B, L, features].
            attention_mask: 1 for valid latent pixels, else 0: [B, T, height, width].
            encoder_attention_mask: 1 for valid text tokens, else 0: [B, 1, L] or [B, L].

        Returns:
            [B, out_channels, T, height, width].
        """
        grid = self.count_tokens(hidden_states)
        x = self.pos_embed(hidden_states.to(self.dtype))
        size = (x.shape[1], *grid)
        rotate = None
        if self.use_rope:
            rotate = self._rotary(size, x)
        else:
            x = self._embed_positions(x, size)
        t_B6D, t_BD = self.adaln_single(timestep)
        text, text_bias = read_text(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
        text = self.caption_projection(text)
        bias = self._make_bias(attention_mask, x.dtype)
        for block in self.transformer_blocks:
            x = block(x, t_B6D, text, text_bias, bias=bias, rotate=rotate)
        return self.project_out(x, t_BD, grid)

    def _embed_positions(self, x_BTSD: Tensor, size: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = (
            spread(length, base, scale, x_BTSD.device)
            for length, base, scale in zip(size, self.trained_size, self.scales, strict=True)
        )
        x = (x_BTSD + sincos_grid(self.width, rows, columns)).to(x_BTSD.dtype)
        return (x + sincos(self.width, frames)[:, None]).to(x.dtype)

    def _rotary(self, size: tuple[int, int, int], like: Tensor) -> Rotary:
        axes = [
            torch.arange(length, device=like.device) / self._scale(axis, length, like)
            for axis, length in enumerate(size)
        ]
        return rotary(self.head_dim, grid_positions(*axes))

    def _scale(self, axis: int, length: int, like: Tensor) -> float:
        if not self.shared_rotary_tables:
            return self.scales[axis]
        key = (length, like.device, like.dtype)
        return self._scale_of_table.setdefault(key, self.scales[axis])

    def _make_bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Returns a bias [B, 1, 1, N] over the tokens of the video."""
        if mask is None:
            return None
        if mask.ndim != 4:
            raise ValueError(
                "attention_mask: expected shape [batch, frames, height, width], "
                f"found {list(mask.shape)}"
            )
        tokens = (F.max_pool2d(mask.to(dtype), self.patch_size) != 0).flatten(1)
        return mask_to_bias(tokens[:, None, None], dtype)
