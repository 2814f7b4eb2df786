"""adaLN and cache reads: the kernel, PyTorch's ops, Inductor's fusion of them, and a device copy.

    python bench/kernel_residual_norm.py --out bench/results/kernel_residual_norm.json

Sizes are (rows, channels, bytes read and written per element of the rows), of Latte, Open-Sora 1.2,
CogVideoX and Wan 2.1 in bf16 with guidance. The bytes say what is computed: 4, layer norm with
scale and shift; 8, that of x + gate * cut, with the sum written too; 7, the same with a cut in fp8;
5, only the sum with such a cut.

Without a GPU, `--smoke` checks tiny shapes only: times of Triton's interpreter mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import kernel_timing
import torch
from kernel_timing import Sizes
from rows import Row
from torch import Tensor
from torch.nn.functional import layer_norm

from pabc.kernels.dtypes import FP8
from pabc.kernels.residual_norm import residual_norm

KERNEL = "residual_norm"
WIDTHS = {
    "Latte, 16 x 512 x 512": (2 * 16 * 1024, 1152),
    "Open-Sora 1.2, 51 frames of 480p": (2 * 15 * 1590, 1152),
    "CogVideoX 2B, 49 frames of 480p": (2 * 17550, 1920),
    "CogVideoX 5B, 49 frames of 480p": (2 * 17550, 3072),
    "Wan 2.1 14B, 81 frames of 480p": (2 * 32760, 5120),
}
PARTS = {4: "norm", 8: "gate, norm", 7: "fp8, gate, norm", 5: "fp8, gate"}
SHAPES = {
    f"{name}: {part}": (*sizes, nbytes)
    for name, sizes in WIDTHS.items()
    for nbytes, part in PARTS.items()
}
SHAPES["CogVideoX 5B: keys of 48 heads"] = (2 * 17776 * 48, 64, 4)
SMOKE = {f"smoke: {part}": (6, 40, nbytes) for nbytes, part in PARTS.items()}
EPS = 1e-6


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    rows, C, nbytes = sizes
    new = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(2, rows // 2, C, **new)  # type: ignore[call-overload]
    scale, shift, gate = torch.randn(3, 2, 1, C, **new)  # type: ignore[call-overload]
    has_cut, is_fp8, has_norm = nbytes > 4, nbytes % 2 == 1, nbytes != 5
    cut = torch.randn_like(x).to(FP8 if is_fp8 else x.dtype)
    cut_scale = torch.rand(2, rows // 2, 1, device=device) if is_fp8 else None
    outputs = {"y_dtype": x.dtype if has_cut else None, "n_dtype": x.dtype if has_norm else None}

    def compute(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        y, dtype = x, torch.promote_types(x.dtype, torch.float32)
        if has_cut:
            read = cut if cut_scale is None else (cut.to(dtype) * cut_scale).to(x.dtype)
            y = x + gate * read.to(x.dtype)
        n = layer_norm(y, (C,), None, None, EPS) * (1 + scale) + shift if has_norm else y
        return (y,) * has_cut + (n,) * has_norm

    def kernel() -> tuple[Tensor, ...]:
        terms = ([cut], [cut_scale], [gate], [1.0]) if has_cut else ([], [], [], [])
        norm = ("layer", None, None, scale, shift) if has_norm else ("none",)
        return tuple(residual_norm(x, *terms, *norm, eps=EPS, **outputs))  # type: ignore[arg-type]

    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "kernel": kernel,
        "eager": lambda: compute(x, scale, shift, gate),
    }
    if device == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(compute)
        calls["inductor"] = lambda: compiled(x, scale, shift, gate)
    exact = compute(x.double(), scale.double(), shift.double(), gate.double())
    return kernel_timing.compare(name, sizes, calls, exact, nbytes=nbytes * rows * C)


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
