"""Attention of short sequences: the kernel, PyTorch's attention, and a copy of as many bytes.

    python bench/kernel_short_attention.py --out bench/results/kernel_short_attention.json

Shapes (N, H, T, S, D) are those of temporal attention in Latte, Open-Sora 1.2 and CogVideoX-like
models in bf16, with guidance. As in a model, q, k and v are views of packed projections, and the
result is laid out for the projection after it. `sdpa`, the backend that PyTorch selects, and its
backends one by one copy their result to that layout if it differs. The bytes are those of q, k, v
and the result.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import sys

import kernel_timing
import torch
from kernel_timing import Sizes, compare_attention
from rows import Row

from pabc.kernels.short_attention import short_attention

KERNEL = "short_attention"
SHAPES = {
    "Latte, 16 x 512 x 512": (2048, 16, 16, 16, 72),
    "Open-Sora 1.2, 51 frames of 480p": (3180, 16, 15, 15, 72),
    "Open-Sora 1.2, 102 frames of 480p": (3180, 16, 30, 30, 72),
    "64 frames": (1024, 16, 64, 64, 64),
    "8 frames, head dim 128": (4096, 12, 8, 8, 128),
}
SMOKE = {"smoke": (3, 2, 5, 5, 24)}


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    N, H, T, _, D = sizes
    packed = torch.randn(N, T, 3, H, D, dtype=torch.bfloat16, device=device)
    return compare_attention(name, sizes, short_attention, *packed.permute(2, 0, 3, 1, 4))


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
