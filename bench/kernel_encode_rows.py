"""Encoding of cuts as fp8: the kernel, PyTorch's ops, Inductor's fusion of them, a device copy.

    python bench/kernel_encode_rows.py --out bench/results/kernel_encode_rows.json

Sizes are (rows, channels, bytes read and written per element), of cuts of Latte, Open-Sora 1.2,
CogVideoX and Wan 2.1 in bf16 with guidance. Results are compared bit for bit with those of
PyTorch's ops.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import sys

import kernel_timing
import torch
from kernel_timing import Sizes
from rows import Row

from pabc.kernels.encode_rows import encode_rows, encode_rows_reference
from pabc.passes.encode import encode

KERNEL = "encode_rows"
SHAPES = {
    "Latte, 16 x 512 x 512": (2 * 16 * 1024, 1152, 3),
    "Open-Sora 1.2, 51 frames of 480p": (2 * 15 * 1590, 1152, 3),
    "CogVideoX 2B, 49 frames of 480p": (2 * 17550, 1920, 3),
    "CogVideoX 5B, 49 frames of 480p": (2 * 17550, 3072, 3),
    "Wan 2.1 14B, 81 frames of 480p": (2 * 32760, 5120, 3),
}
SMOKE = {"smoke": (6, 40, 3)}


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    rows, C, nbytes = sizes
    x = torch.randn(2, rows // 2, C, dtype=torch.bfloat16, device=device)
    calls = {"kernel": lambda: encode_rows(x), "eager": lambda: encode(x, "fp8")}
    if device == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(lambda x: encode(x, "fp8"))
        calls["inductor"] = lambda: compiled(x)
    values, scales = encode_rows_reference(x)
    exact = values.double(), scales.double()
    return kernel_timing.compare(name, sizes, calls, exact, nbytes=nbytes * rows * C)


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
