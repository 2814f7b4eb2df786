"""The kernel for short sequences against PyTorch's attention and against a copy of its bytes.

    python bench/kernel_short_attention.py --out bench/results/kernel_short_attention.json

Shapes are those of temporal attention in Latte, Open-Sora 1.2 and CogVideoX-like models in bf16,
with guidance; q, k and v are views of packed projections, as a model has them, and the result is
laid out for the projection after it; `sdpa` makes that layout by a copy where its own is another.
Nothing is timed whose error against float64 is more than twice that of PyTorch's op in the same
dtype. Ratios are of medians. `copy` moves as many bytes as attention must: q, k, v and the result.

Without a GPU, `--smoke` checks the smallest shapes; times of Triton's interpreter say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from pabc.kernels.short_attention import short_attention

SHAPES = {
    "Latte, 16 x 512 x 512": (2048, 16, 16, 72),
    "Open-Sora 1.2, 51 frames of 480p": (3180, 16, 15, 72),
    "Open-Sora 1.2, 102 frames of 480p": (3180, 16, 30, 72),
    "64 frames": (1024, 16, 64, 64),
    "8 frames, head dim 128": (4096, 12, 8, 128),
}
SMOKE = {"smoke": (3, 2, 5, 24)}
QUANTILES = (0.5, 0.2, 0.8)


def main() -> None:
    """Checks and times every shape; prints a table, writes JSON where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="one tiny shape, to see that it runs")
    add("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("expected a GPU, found none; --smoke checks a tiny shape without one")
    rows = [
        measure(name, shape, device) for name, shape in (SMOKE if options.smoke else SHAPES).items()
    ]
    header = ("shape", "N, H, T, D", "error", "kernel, us", "sdpa, us", "copy, us", "over sdpa")
    print(report.format_table(header, [_cells(row) for row in rows]))
    if options.out is not None:
        report.write_json(options.out, {**report.describe_run(device), "rows": rows})
    sys.exit(any("times" not in row for row in rows))


def measure(name: str, shape: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """The row of one shape."""
    N, H, T, D = shape
    packed = torch.randn(N, T, 3, H, D, dtype=torch.bfloat16, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double())

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, H * D)

    def kernel() -> Tensor:
        return short_attention(q, k, v).transpose(1, 2).reshape(N, T, H * D)

    wanted = expected.transpose(1, 2).reshape(N, T, H * D)
    error, allowed = ((run().double() - wanted).abs().max().item() for run in (kernel, sdpa))
    row = {"shape": name, "sizes": list(shape), "max_error": error, "sdpa_error": allowed}
    if error > 2 * allowed:
        return row
    source = torch.empty(2 * N * T * H * D, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "kernel": kernel,
        "sdpa": sdpa,
        "copy": lambda: target.copy_(source),
    }
    if device == "cpu":
        return {**row, "times": {}}
    times = {each: do_bench(call, quantiles=QUANTILES) for each, call in calls.items()}
    row["times"] = {
        each: {"median": 1e3 * found[0], "least": 1e3 * found[1], "most": 1e3 * found[2]}
        for each, found in times.items()
    }
    nbytes = 4 * N * T * H * D * 2
    row["gigabytes_per_second"] = nbytes / times["kernel"][0] / 1e6
    row["over_sdpa"] = times["sdpa"][0] / times["kernel"][0]
    row["of_copy"] = times["copy"][0] / times["kernel"][0]
    return row


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = row.get("times")
    if not times:
        outcome = "not timed" if times is not None else "error too large"
        return (row["shape"], str(row["sizes"]), f"{row['max_error']:.1e}", *[outcome] * 3, "")
    cells = [f"{times[name]['median']:.1f}" for name in ("kernel", "sdpa", "copy")]
    return (
        row["shape"],
        str(row["sizes"]),
        f"{row['max_error']:.1e}",
        *cells,
        f"{row['over_sdpa']:.2f}x",
    )


if __name__ == "__main__":
    main()
