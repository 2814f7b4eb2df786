"""Layout changes around collectives: the kernel, PyTorch's copy, Inductor's, and a device copy.

    python bench/kernel_permute_copy.py --out bench/results/kernel_permute_copy.json

Sizes are (bytes, bytes of a contiguous run in the source). With these copies one of 2, 4 or 8 ranks
packs its part before the all-to-all that turns shards of frames into shards of positions, or of
heads, and unpacks it afterwards; in Latte, Open-Sora 1.2 and CogVideoX in bf16 with guidance.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import math
import sys

import kernel_timing
import torch
from kernel_timing import Sizes
from rows import Row
from torch import Tensor

from pabc.kernels.permute_copy import permute_copy

KERNEL = "permute_copy"
VIDEOS = {  # B, T, S, C
    "Latte": (2, 16, 1024, 1152),
    "Open-Sora 1.2": (2, 16, 1592, 1152),
    "CogVideoX 5B": (2, 16, 1352, 3072),
}
HEAD_DIM = 64
VIEWS = {
    f"{name}, {ranks} ranks, {what}": (what, ranks, sizes)
    for name, sizes in VIDEOS.items()
    for ranks in (2, 4, 8)
    for what in ("pack", "unpack", "heads")
} | {f"smoke, {what}": (what, 2, (2, 4, 6, 128)) for what in ("pack", "unpack", "heads")}


def _sizes(name: str) -> Sizes:
    what, ranks, (B, T, S, C) = VIEWS[name]
    run = {"pack": S // ranks * C, "unpack": S // ranks * C, "heads": C // ranks}[what]
    return 2 * B * T // ranks * S * C, 2 * run


SMOKE = {name: _sizes(name) for name in VIEWS if name.startswith("smoke")}
SHAPES = {name: _sizes(name) for name in VIEWS if name not in SMOKE}


def make_view(name: str, device: str) -> Tensor:
    """Returns the view that is copied, with dimensions in the order of the result."""
    what, P, (B, T, S, C) = VIEWS[name]
    shape = {
        "pack": (B, T // P, P, S // P, C),
        "unpack": (P, B, T // P, S // P, C),
        "heads": (B, T // P * S, P, C // HEAD_DIM // P, HEAD_DIM),
    }[what]
    order = {"pack": (2, 0, 1, 3, 4), "unpack": (1, 0, 2, 3, 4), "heads": (2, 0, 1, 3, 4)}[what]
    return torch.randn(shape, device=device).to(torch.bfloat16).permute(order)


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    view = make_view(name, device)
    order = list(range(view.dim()))
    calls = {"kernel": lambda: permute_copy(view, order), "eager": lambda: view.contiguous()}
    if device == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(lambda x: x.contiguous())
        calls["inductor"] = lambda: compiled(view)
    assert math.prod(view.shape) * view.element_size() == sizes[0], (name, view.shape)
    return kernel_timing.compare(name, sizes, calls, view.double(), nbytes=2 * sizes[0])


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
