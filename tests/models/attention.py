"""Attention in several spellings, all of which give the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import HEADS, WIDTH


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
