"""Layers that the model families share.

Shapes: B batch, C channels, T frames, S tokens a frame, N tokens, L text tokens, D width, H heads,
d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FREQUENCIES = 128
MAX_PERIOD = 10000

Attend = Callable[[Tensor], Tensor]
"""An attention over the middle axis: [B, N, D] -> [B, N, D]."""


def sinusoid(t_B: Tensor) -> Tensor:
    """Returns sinusoidal features [B, 256] of numbers: cosines, then sines, at 128 frequencies."""
    steps = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=t_B.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / NUM_FREQUENCIES)
    angles = t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales normalized values."""
    return x * (1 + scale) + shift


def mask_to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive bias: 0 where the mask is 1, -10000 where it is 0."""
    return (1 - mask.to(dtype)) * -10000.0


def split_heads(x_BND: Tensor, num_heads: int) -> Tensor:
    """Reshapes [B, N, D] to [B, H, N, d]."""
    return x_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BHNd: Tensor) -> Tensor:
    """Reshapes [B, H, N, d] to [B, N, D]."""
    return x_BHNd.transpose(1, 2).flatten(2)


def plain_norm(width: int) -> nn.LayerNorm:
    """Returns a layer norm without weights, as it precedes each modulation."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class TimestepEmbedder(nn.Module):
    """The embedding of timesteps, [B] -> [B, D]: sinusoidal features and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Linear(2 * NUM_FREQUENCIES, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Returns the embedding, in the dtype of the weights."""
        return self.mlp(sinusoid(t_B).to(next(self.mlp.parameters()).dtype))


class Mlp(nn.Module):
    """An MLP: linear, GELU with tanh approximation, linear."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., out]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    """A root mean square norm with a weight, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class PackedAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, packed [3, H, d]."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        head_dim = width // num_heads
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rotate: Attend | None = None) -> Tensor:
        """Maps [B, N, D] to the same shape; `rotate` is applied to normalized queries and keys."""
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class PatchEmbed(nn.Module):
    """The embedding of patches of single frames: [B, C, T, height, width] -> [B, T, S, D]."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds the patches; rows and columns that do not fill a patch are dropped."""
        frames = self.proj(x.transpose(1, 2).flatten(0, 1))
        return frames.flatten(2).transpose(1, 2).unflatten(0, (len(x), -1))


def unpatchify(x_BTSD: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Reshapes [B, T, S, patch x patch x C] to [B, C, T, height, width]; S is `grid`'s product."""
    x = x_BTSD.unflatten(3, (patch_size, patch_size, -1)).unflatten(2, grid)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def attend_frames(attend: Attend, x_BTSD: Tensor) -> Tensor:
    """Runs an attention over the tokens of each frame."""
    return attend(x_BTSD.flatten(0, 1)).unflatten(0, x_BTSD.shape[:2])


def attend_times(attend: Attend, x_BTSD: Tensor) -> Tensor:
    """Runs an attention over the frames at each position."""
    x_BSTD = x_BTSD.transpose(1, 2)
    return attend(x_BSTD.flatten(0, 1)).unflatten(0, x_BSTD.shape[:2]).transpose(1, 2)


def attend_all(attend: Attend, x_BTSD: Tensor) -> Tensor:
    """Runs an attention over all tokens of the video."""
    return attend(x_BTSD.flatten(1, 2)).unflatten(1, x_BTSD.shape[1:3])
