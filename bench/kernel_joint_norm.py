"""Norms of text and latents into one tensor: the kernel, PyTorch's ops, Inductor, a device copy.

    python bench/kernel_joint_norm.py --out bench/results/kernel_joint_norm.json

Sizes are (rows, channels, bytes read and written per element of the rows), of CogVideoX in bf16
with guidance, where 226 rows of each clip are text. With 4 bytes, layer norm with scale and shift
is computed; with 8, that of x + gate * cut, with the sum written too.

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

from pabc.kernels.joint_norm import joint_norm

KERNEL = "joint_norm"
TEXT = 226
SHAPES = {
    "CogVideoX 2B, 49 frames of 480p: norm": (2 * (TEXT + 17550), 1920, 4),
    "CogVideoX 2B, 49 frames of 480p: gate, norm": (2 * (TEXT + 17550), 1920, 8),
    "CogVideoX 5B, 49 frames of 480p: norm": (2 * (TEXT + 17550), 3072, 4),
    "CogVideoX 5B, 49 frames of 480p: gate, norm": (2 * (TEXT + 17550), 3072, 8),
}
SMOKE = {"smoke: norm": (2 * (TEXT + 4), 40, 4), "smoke: gate, norm": (2 * (TEXT + 4), 40, 8)}
EPS = 1e-5
Parts = list[Tensor]


def compute(x: Parts, cuts: Parts, rows: Parts) -> tuple[Tensor, ...]:
    """Computes the same with PyTorch's ops; `rows` are scale, shift and gate of each part."""
    sums, normed = [], []
    for i, y in enumerate(x):
        scale, shift, gate = rows[3 * i : 3 * i + 3]
        if cuts:
            y = y + gate * cuts[i]
            sums.append(y)
        normed.append(layer_norm(y, y.shape[-1:], None, None, EPS) * (1 + scale) + shift)
    return (*sums, torch.cat(normed, 1))


def measure(name: str, sizes: Sizes, device: str) -> Row:
    """Returns the row of one shape."""
    num_rows, C, nbytes = sizes
    lengths = (TEXT, num_rows // 2 - TEXT)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x = [draw(2, length, C) for length in lengths]
    cuts = [draw(2, length, C) for length in lengths] if nbytes > 4 else []
    rows = [draw(2, 1, C) for _ in range(6)]
    num = len(cuts)

    def kernel() -> tuple[Tensor, ...]:
        terms = (cuts, [None] * num, rows[2::3][:num], [1.0] * num, [num // 2] * 2)
        after = ([None] * 2, [None] * 2, rows[::3], rows[1::3], [1.0] * 2, EPS)
        writes = [bool(cuts)] * 2
        return tuple(
            joint_norm(x, *terms, "layer", *after, dim=1, writes_y=writes, dtype=x[0].dtype)
        )

    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "kernel": kernel,
        "eager": lambda: compute(x, cuts, rows),
    }
    if device == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(compute)
        calls["inductor"] = lambda: compiled(x, cuts, rows)
    exact = compute(*([each.double() for each in parts] for parts in (x, cuts, rows)))
    return kernel_timing.compare(name, sizes, calls, exact, nbytes=nbytes * num_rows * C)


if __name__ == "__main__":
    kernel_timing.main(sys.modules[__name__])  # type: ignore[arg-type]
