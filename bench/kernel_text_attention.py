"""Cross attention to short text: the kernel, PyTorch's backends, and a copy of as many bytes.

    python bench/kernel_text_attention.py --out bench/results/kernel_text_attention.json

Shapes (N, H, T, S, D) are those of cross attention in Latte (frames share a text), Open-Sora 1.2,
PixArt and Wan 2.1 in bf16, with guidance where the model runs it as a batch. `sdpa` is the backend
that PyTorch selects, with keys and values repeated for each frame beforehand; its backends are also
timed one by one. The bytes are those of q, k, v and the result.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import sys

import kernel_timing
import torch
from kernel_timing import Sizes, compare_attention
from rows import Row

from pabc.kernels.text_attention import text_attention

KERNEL = "text_attention"
SHAPES = {
    "Latte, 16 frames of 512 x 512": (32, 16, 1024, 120, 72),
    "Open-Sora 1.2, 51 frames of 480p": (2, 16, 23850, 300, 72),
    "PixArt, 1024 x 1024": (2, 16, 4096, 300, 72),
    "512 tokens, head dim 64": (2, 24, 8192, 512, 64),
}
SMOKE = {"smoke": (2, 2, 20, 35, 24)}


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    N, H, T, S, D = sizes
    q = torch.randn(N, T, H, D, dtype=torch.bfloat16, device=device).transpose(1, 2)
    k, v = torch.randn(N, S, 2, H, D, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    return compare_attention(name, sizes, text_attention, q, k, v)


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
