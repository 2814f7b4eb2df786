"""Latte (arXiv 2401.03048): text-to-video, class-conditional and unconditional.

Shapes as in :mod:`pabc.models.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from pabc.models.config import Configurable, check_positive
from pabc.models.layers import (
    Attend,
    Mlp,
    PackedAttention,
    PatchEmbed,
    TimestepEmbedder,
    attend_frames,
    attend_times,
    mask_to_bias,
    modulate,
    plain_norm,
    unpatchify,
)
from pabc.models.pixart import (
    NUM_NULL_TOKENS,
    Attention,
    TemporalBlock,
    TextBlock,
    VideoTransformer,
    read_text,
)
from pabc.models.positions import sincos, sincos_grid, spread

PIXART_SIZE = 64  # latent pixels per side at which 2-D positions have a scale of 1


class LatteT2V(VideoTransformer):
    """Latte's text-to-video model: spatial blocks with cross attention, and temporal blocks.

    The arguments are the original's configuration keys; see :meth:`from_config`. Raises ValueError
    for values that no model can have.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        sample_size: int,
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
    ) -> None:
        check_positive(
            type(self).__name__,
            sample_size=sample_size,
            patch_size=patch_size,
            num_layers=num_layers,
            video_length=video_length,
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
        self.sample_size = sample_size
        self.video_length = video_length
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
                arrange=attend_frames,
            )
            for _ in range(num_layers)
        )
        self.temporal_transformer_blocks = nn.ModuleList(
            TemporalBlock(width, norm, attend(), activation_fn) for _ in range(num_layers)
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
            encoder_hidden_states: text [B, L, features].
            attention_mask: 1 for tokens that spatial attention attends to, else 0: [B x T, S].
            encoder_attention_mask: 1 for valid text tokens, else 0: [B, L] or [B, 1, L].
            enable_temporal_attentions: False to skip the temporal blocks.

        Returns:
            [B, out_channels, T, height, width].
        """
        grid = self.count_tokens(hidden_states)
        x_BTSD = self.pos_embed(hidden_states.to(self.dtype))
        x = (x_BTSD + self._embed_places(grid, x_BTSD.device)).to(x_BTSD.dtype)
        times = self._embed_times(x.shape[1], x)
        t_B6D, t_BD = self.adaln_single(timestep)
        text, text_bias = read_text(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
        text = self.caption_projection(text)
        bias = None
        if attention_mask is not None:
            bias = mask_to_bias(attention_mask, x.dtype)[:, None, None]
        blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for i, (spatial, temporal) in enumerate(blocks):
            x = spatial(x, t_B6D, text, text_bias, bias=bias)
            if enable_temporal_attentions:
                if i == 0 and times is not None:
                    x = x + times
                x = temporal(x, t_B6D)
        return self.project_out(x, t_BD, grid)

    def _embed_places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        base = self.sample_size // self.patch_size
        scale = max(self.sample_size // PIXART_SIZE, 1)
        rows, columns = (spread(length, base, scale, device) for length in grid)
        return sincos_grid(self.width, rows, columns)

    def _embed_times(self, num_frames: int, like: Tensor) -> Tensor | None:
        if num_frames == 1:
            return None
        if num_frames != self.video_length:
            raise ValueError(
                f"hidden_states: expected 1 frame or {self.video_length}, found {num_frames}"
            )
        frames = torch.arange(num_frames, device=like.device)
        return sincos(self.width, frames)[:, None].to(like.dtype)


class LatteClass(Configurable):
    """Latte without text: unconditional (`extras` 1), or conditional on a class (`extras` 2).

    The arguments are the original's configuration keys; see :meth:`from_config`. Raises ValueError
    for values that no model can have.
    """

    fixed: ClassVar[Mapping[str, Collection[object]]] = {}
    ignored: ClassVar[Collection[str]] = ("attention_mode",)

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        extras: int = 1,
    ) -> None:
        super().__init__()
        check_positive("LatteClass", input_size=input_size, depth=depth, num_frames=num_frames)
        if extras not in (1, 2):
            raise ValueError(f"LatteClass.extras: expected 1 or 2, found {extras!r}")
        if depth % 2:
            raise ValueError(f"LatteClass.depth: expected an even number, found {depth}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                "LatteClass.hidden_size: expected a multiple of 4 and of num_heads "
                f"({num_heads}), found {hidden_size}"
            )
        self.patch_size = patch_size
        self.side = input_size // patch_size
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if extras == 2:
            has_null = class_dropout_prob > 0  # the null class has the index num_classes
            self.y_embedder = _LabelEmbedder(num_classes + has_null, hidden_size)
        places = torch.arange(self.side)
        self.pos_embed = nn.Parameter(
            sincos_grid(hidden_size, places, places)[None], requires_grad=False
        )
        self.temp_embed = nn.Parameter(
            sincos(hidden_size, torch.arange(num_frames))[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            _Block(hidden_size, num_heads, mlp_ratio, attend_times if i % 2 else attend_frames)
            for i in range(depth)
        )
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.extras = extras

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns the model's prediction.

        Args:
            x: latents [B, T, C, height, width], of the configured frames and size.
            t: timestep [B].
            y: class [B]; `num_classes` is the null class. Used only if `extras` is 2.

        Returns:
            [B, T, out_channels, height, width].
        """
        num_frames, size = self.temp_embed.shape[1], self.side * self.patch_size
        if (x.shape[1], *x.shape[3:]) != (num_frames, size, size):
            raise ValueError(
                f"x: expected shape [batch, {num_frames}, channels, {size}, {size}], "
                f"found {list(x.shape)}"
            )
        c_BD = self.t_embedder(t)
        if self.extras == 2:
            if y is None:
                raise ValueError("y: expected classes [batch], as extras is 2, found None")
            c_BD = c_BD + self.y_embedder(y)
        latents = x.transpose(1, 2).to(self.pos_embed.dtype)
        h_BTSD = self.x_embedder(latents) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if i == 1:
                h_BTSD = h_BTSD + self.temp_embed[:, :, None]
            h_BTSD = block(h_BTSD, c_BD)
        patches = self.final_layer(h_BTSD, c_BD)
        return unpatchify(patches, (self.side, self.side), self.patch_size).transpose(1, 2)


class _LabelEmbedder(nn.Module):
    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class _Block(nn.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        arrange: Callable[[Attend, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.arrange = arrange
        self.norm1 = plain_norm(width)
        self.attn = PackedAttention(width, num_heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BTSD: Tensor, c_BD: Tensor) -> Tensor:
        table_B6TSD = self.adaLN_modulation(c_BD).unflatten(1, (6, 1, 1, -1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table_B6TSD.unbind(1)
        y = modulate(self.norm1(x_BTSD), shift, scale)
        x = x_BTSD + gate * self.arrange(self.attn, y)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BTSD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).unflatten(1, (2, 1, 1, -1)).unbind(1)
        return self.linear(modulate(self.norm_final(x_BTSD), shift, scale))
