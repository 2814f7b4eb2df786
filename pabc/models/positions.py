"""Computes position embeddings and rotary tables for the shape at hand, without caches.

Shapes: N positions, D embedding width, P axes (parts of a head), d width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


def spread(length: int, base: int, scale: float, device: torch.device) -> Tensor:
    """Returns `length` positions over the range of `base` positions in training, over `scale`."""
    return torch.arange(length, dtype=torch.float32, device=device) / (length / base) / scale


def sincos(width: int, positions_N: Tensor) -> Tensor:
    """Returns the embedding of each position, [N, width]: sines, then cosines.

    Computes in float64, so that the phase of large positions stays exact.
    """
    half = torch.arange(width // 2, dtype=torch.float64, device=positions_N.device)
    angles = positions_N.double()[:, None] * THETA ** -(half / (width / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_grid(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the embeddings of a grid's points in row-major order, [N, width].

    The first half is for the column, the second for the row.
    """
    shape = (len(rows), len(columns), -1)
    x = sincos(width // 2, columns)[None].expand(shape)
    y = sincos(width // 2, rows)[:, None].expand(shape)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


class Rotary(NamedTuple):
    """Cosines and sines [N, d] for heads of `num_parts` parts, whose two halves are rotated."""

    cos: Tensor
    sin: Tensor
    num_parts: int

    def __call__(self, x_BHNd: Tensor) -> Tensor:
        """Rotates queries or keys."""
        first, second = x_BHNd.unflatten(-1, (self.num_parts, 2, -1)).unbind(-2)
        turned = torch.stack([-second, first], dim=-2).flatten(-3)
        return x_BHNd * self.cos.to(x_BHNd.dtype) + turned * self.sin.to(x_BHNd.dtype)


def rotary(head_dim: int, positions_PN: Tensor) -> Rotary:
    """Returns the table for heads split evenly over P axes, each with its own positions."""
    num_parts = len(positions_PN)
    part = head_dim // num_parts
    even = torch.arange(0, part, 2, dtype=torch.float32, device=positions_PN.device)
    frequencies = 1.0 / THETA ** (even / part)
    angles_NPf = positions_PN.T.float()[:, :, None] * frequencies
    angles_Nd = torch.cat([angles_NPf, angles_NPf], dim=-1).flatten(1)
    return Rotary(angles_Nd.cos(), angles_Nd.sin(), num_parts)


def grid_positions(*axes: Tensor) -> Tensor:
    """Returns the coordinates of a grid's points in row-major order, [P, N]."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
