"""Attention of any length: the kernel, PyTorch's backends, and a copy of as many bytes.

    python bench/kernel_attention.py --out bench/results/kernel_attention.json

Shapes (N, H, T, S, D) are those of spatial and joint attention in Latte, Open-Sora 1.2, CogVideoX
and Wan 2.1 in bf16, with guidance where the model runs it as a batch. `sdpa` is the backend
that PyTorch selects; its backends are also timed one by one, where they support the shape. All
return what the next projection reads. The bytes are those of q, k, v and the result.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import sys

import kernel_timing
import torch
from kernel_timing import Sizes, compare_attention
from rows import Row

from pabc.kernels.attention import attention

KERNEL = "attention"
SHAPES = {
    "Latte, spatial": (32, 16, 1024, 1024, 72),
    "Open-Sora 1.2, 51 frames of 480p, spatial": (30, 16, 1590, 1590, 72),
    "CogVideoX 2B, joint": (2, 30, 17776, 17776, 64),
    "CogVideoX 5B, joint": (2, 48, 17776, 17776, 64),
    "Wan 2.1, 81 frames of 480p": (1, 12, 32760, 32760, 128),
    "head dim 80": (8, 16, 4096, 4096, 80),
    "head dim 96": (8, 16, 4096, 4096, 96),
}
SMOKE = {"smoke": (2, 2, 20, 35, 24)}


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    N, H, T, S, D = sizes
    q = torch.randn(N, T, H, D, dtype=torch.bfloat16, device=device).transpose(1, 2)
    k, v = torch.randn(N, S, 2, H, D, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    return compare_attention(name, sizes, attention, q, k, v)


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
