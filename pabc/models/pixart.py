"""Parts of the text-to-video transformers that descend from PixArt (arXiv 2310.00426).

The timestep is embedded as one table of modulations, to which each block adds a table of its own;
cross attention has neither norm nor gate. Shapes as in :mod:`pabc.models.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pabc.models.config import Configurable
from pabc.models.layers import (
    NUM_FREQUENCIES,
    Attend,
    PatchEmbed,
    attend_all,
    attend_times,
    mask_to_bias,
    merge_heads,
    modulate,
    plain_norm,
    sinusoid,
    split_heads,
    unpatchify,
)
from pabc.models.positions import Rotary

NUM_NULL_TOKENS = 120
NUM_MODULATIONS = 6  # shift, scale, gate of the attention, then of the MLP
ACTIVATIONS = ("gelu-approximate", "gelu", "geglu", "geglu-approximate")

MakeNorm = Callable[[], nn.Module]


class AdaLNSingle(nn.Module):
    """The embedding [B, D] of the timestep, and the modulations [B, 6, D] of all blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": _TimestepMlp(width)})
        self.linear = nn.Linear(width, NUM_MODULATIONS * width)

    def forward(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (modulations, embedding)."""
        embedding = self.emb["timestep_embedder"](t_B)
        return self.linear(F.silu(embedding)).unflatten(1, (NUM_MODULATIONS, -1)), embedding


class _TimestepMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * NUM_FREQUENCIES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        features = sinusoid(t_B).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class CaptionProjection(nn.Module):
    """The projection of text features to the model's width.

    Some checkpoints contain the null text of their training as `y_embedding`, which no forward
    reads. The buffer exists if the state dict that was loaded has it.
    """

    y_embedding: Tensor | None

    def __init__(self, in_features: int, width: int, num_null_tokens: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)
        null = torch.zeros(num_null_tokens, in_features) if num_null_tokens else None
        self.register_buffer("y_embedding", null)

    def forward(self, text: Tensor) -> Tensor:
        """Maps [..., features] to [..., D]."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        null = state_dict.get(f"{prefix}y_embedding")
        weight = self.linear_1.weight
        self.y_embedding = None if null is None else weight.new_empty(null.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Attention(nn.Module):
    """Attention with separate projections; keys and values come from `context` if it is given."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        context_width: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        context_width = width if context_width is None else context_width
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_width, inner, bias=bias)
        self.to_v = nn.Linear(context_width, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(
        self,
        x_BND: Tensor,
        context_BLD: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        rotate: Rotary | None = None,
    ) -> Tensor:
        """Maps [B, N, D] to the same shape; `bias` is added to the scores [B, H, N, L]."""
        context = x_BND if context_BLD is None else context_BLD
        q = split_heads(self.to_q(x_BND), self.num_heads)
        k = split_heads(self.to_k(context), self.num_heads)
        v = split_heads(self.to_v(context), self.num_heads)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out[0](merge_heads(y))


class FeedForward(nn.Module):
    """The MLP of a block, with a hidden width of 4 D."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        activate = _Activation(width, 4 * width, activation)
        # The middle one is the original's dropout, without which the last key would differ.
        self.net = nn.Sequential(activate, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to the same shape."""
        return self.net(x)


class _Activation(nn.Module):
    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(
                f"activation_fn: expected one of {', '.join(ACTIVATIONS)}, found {kind!r}"
            )
        self.kind = kind
        self.proj = nn.Linear(width, 2 * hidden if kind == "geglu" else hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if self.kind == "geglu":
            y, gate = y.chunk(2, dim=-1)
            return y * F.gelu(gate)
        if self.kind == "geglu-approximate":
            return y * torch.sigmoid(1.702 * y)
        return F.gelu(y, approximate="tanh" if self.kind == "gelu-approximate" else "none")


class _Block(nn.Module):
    def __init__(self, width: int, norm: MakeNorm, attention: Attention, activation: str) -> None:
        super().__init__()
        self.norm1 = norm()
        self.attn1 = attention
        self.ff = FeedForward(width, activation)
        self.scale_shift_table = nn.Parameter(torch.randn(NUM_MODULATIONS, width) / width**0.5)

    def modulations(self, t_B6D: Tensor) -> tuple[Tensor, ...]:
        """The six modulations of this block, each [B, 1, 1, D]."""
        return (self.scale_shift_table + t_B6D)[:, :, None, None].unbind(1)


class TextBlock(_Block):
    """Self-attention over tokens grouped by `arrange`, cross attention to the text, and an MLP."""

    def __init__(
        self,
        width: int,
        norm: MakeNorm,
        attention: Attention,
        activation: str,
        *,
        cross_attention: Attention,
        arrange: Callable[[Attend, Tensor], Tensor],
    ) -> None:
        super().__init__(width, norm, attention, activation)
        self.arrange = arrange
        self.attn2 = cross_attention
        self.norm2 = norm()

    def forward(
        self, x_BTSD: Tensor, t_B6D: Tensor, text_BLD: Tensor, text_bias: Tensor | None, **how: Any
    ) -> Tensor:
        """Runs the block; `how` is passed to the self-attention."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulations(t_B6D)
        y = modulate(self.norm1(x_BTSD), shift, scale)
        x = x_BTSD + gate * self.arrange(partial(self.attn1, **how), y)
        x = x + attend_all(partial(self.attn2, context_BLD=text_BLD, bias=text_bias), x)
        return x + mlp_gate * self.ff(modulate(self.norm2(x), mlp_shift, mlp_scale))


class TemporalBlock(_Block):
    """Self-attention over the frames at each position, and an MLP."""

    def __init__(self, width: int, norm: MakeNorm, attention: Attention, activation: str) -> None:
        super().__init__(width, norm, attention, activation)
        self.norm3 = norm()

    def forward(self, x_BTSD: Tensor, t_B6D: Tensor, **how: Any) -> Tensor:
        """Runs the block; `how` is passed to the self-attention."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulations(t_B6D)
        y = modulate(self.norm1(x_BTSD), shift, scale)
        x = x_BTSD + gate * attend_times(partial(self.attn1, **how), y)
        return x + mlp_gate * self.ff(modulate(self.norm3(x), mlp_shift, mlp_scale))


def read_text(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the text as [B, L, features] and its mask as a bias [B, 1, 1, L].

    Text and mask may have an axis of size 1 after the first. Raises ValueError for other shapes.
    """
    batch_size, num_tokens = text.shape[0], text.shape[-2]
    if text.ndim not in (3, 4) or text.numel() != batch_size * num_tokens * text.shape[-1]:
        raise ValueError(
            "encoder_hidden_states: expected shape [batch, tokens, features] or "
            f"[batch, 1, tokens, features], found {list(text.shape)}"
        )
    text_BLD = text.reshape(batch_size, num_tokens, -1)
    if mask is None:
        return text_BLD, None
    if mask.numel() != batch_size * num_tokens or mask.ndim not in (2, 3):
        raise ValueError(
            f"encoder_attention_mask: expected shape {[batch_size, num_tokens]} or "
            f"{[batch_size, 1, num_tokens]}, found {list(mask.shape)}"
        )
    return text_BLD, mask_to_bias(mask.reshape(batch_size, 1, 1, num_tokens), text.dtype)


class VideoTransformer(Configurable):
    """The parts around the blocks: embeddings of patches, timestep and text; the output layer."""

    fixed: ClassVar[Mapping[str, Collection[object]]] = {
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "norm_type": ("ada_norm_single",),
        "num_vector_embeds": (None,),
        "only_cross_attention": (False,),
        "use_linear_projection": (False,),
    }
    ignored: ClassVar[Collection[str]] = (
        "attention_mode",
        "dropout",
        "norm_num_groups",
        "num_embeds_ada_norm",
        "upcast_attention",
    )

    def __init__(
        self,
        width: int,
        *,
        in_channels: int,
        out_channels: int | None,
        patch_size: int,
        caption_channels: int,
        num_null_tokens: int,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.width = width
        self.patch_size = patch_size
        self.pos_embed = PatchEmbed(in_channels, width, patch_size)
        self.adaln_single = AdaLNSingle(width)
        self.caption_projection = CaptionProjection(caption_channels, width, num_null_tokens)
        self.norm_out = plain_norm(width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the model computes."""
        return self.proj_out.weight.dtype

    def count_tokens(self, latents: Tensor) -> tuple[int, int]:
        """Returns the rows and columns of patches of latents [B, C, T, height, width]."""
        return latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size

    def project_out(self, x_BTSD: Tensor, t_BD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Projects tokens to latents [B, C, T, height, width]."""
        shift, scale = (self.scale_shift_table + t_BD[:, None])[:, :, None, None].unbind(1)
        patches = self.proj_out(modulate(self.norm_out(x_BTSD), shift, scale))
        return unpatchify(patches, grid, self.patch_size)
