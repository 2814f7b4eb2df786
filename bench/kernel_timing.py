"""Shared parts of the kernels' benchmarks: the error first, then times against the alternatives.

The benchmark of a kernel has `KERNEL` (its name), `SHAPES` and `SMOKE` (name -> the sizes by which
gains are looked up, see `pabc.kernels.gains`) and `measure(name, sizes, device) -> row`, which
returns the row of :func:`compare`. A kernel is not timed if its error against float64 is more than
twice that of PyTorch's ops in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import report
from rows import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from pabc.kernels.gains import TABLE

QUANTILES = (0.5, 0.2, 0.8)
MILLISECONDS = (10, 60)
"""The milliseconds of calls to warm up, and of calls that are timed."""
Sizes = tuple[int, ...]
EVERYTHING = slice(None)
QUERIES_CHECKED = 64
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


class Benchmark(Protocol):
    """The module of a benchmark."""

    __doc__: str | None
    KERNEL: str
    SHAPES: Mapping[str, Sizes]
    SMOKE: Mapping[str, Sizes]

    def measure(self, name: str, sizes: Sizes, device: str) -> Row:
        """Returns the row of one shape."""


def compare(
    name: str,
    sizes: Sizes,
    calls: Mapping[str, Callable[[], Tensor | tuple[Tensor, ...]]],
    exact: Tensor | tuple[Tensor, ...],
    *,
    nbytes: int,
    flops: int = 0,
    part: slice = EVERYTHING,
) -> Row:
    """Checks `calls["kernel"]`, then times it and the alternatives, the other calls.

    Args:
        calls: the first alternative is PyTorch's ops as they are, whose error sets the bound.
        exact: the result, or results, in float64.
        nbytes: the bytes that must be read and written; a device copy of as many is timed too.
        flops: the floating-point operations of matrix products.
        part: the part of dimension 1 of the results that `exact` has.

    Returns:
        The row: errors, and times in microseconds where there is a GPU.
    """
    kernel, *others = calls
    assert kernel == "kernel" and others, calls
    error, allowed = (_find_error(calls[each](), exact, part) for each in (kernel, others[0]))
    row: Row = {"shape": name, "sizes": list(sizes), "max_error": error, "allowed": 2 * allowed}
    row["passed"] = error <= 2 * allowed + torch.finfo(torch.float32).eps
    if not row["passed"] or not torch.cuda.is_available():
        return row
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timed = {**calls, "copy": lambda: target.copy_(source)}
    times = {
        each: do_bench(call, *MILLISECONDS, quantiles=QUANTILES) for each, call in timed.items()
    }
    row["times"] = {
        each: dict(zip(("median", "least", "most"), (1e3 * t for t in found), strict=True))
        for each, found in times.items()
    }
    median = times[kernel][0]
    row["gigabytes_per_second"] = nbytes / median / 1e6
    row["teraflops_per_second"] = flops / median / 1e9
    row["over"] = {each: times[each][0] / median for each in others}
    row["over_best"] = min(row["over"].values())
    row["of_copy"] = times["copy"][0] / median
    return row


def compare_attention(
    name: str, sizes: Sizes, kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Row:
    """Compares a kernel of (q, k, v), all (N, H, T or S, D), with each of PyTorch's backends.

    Only the first queries are checked: the float64 scores of all would not fit in memory.
    """
    N, H, T, S, D = sizes
    part = slice(0, QUERIES_CHECKED)

    def lay_out(found: Tensor) -> Tensor:
        return found.transpose(1, 2).reshape(N, T, H * D)

    def attend(*backends: SDPBackend) -> Tensor:
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return lay_out(scaled_dot_product_attention(q, k, v))

    calls = {"kernel": lambda: lay_out(kernel(q, k, v)), "sdpa": attend}
    if torch.cuda.is_available():
        for each in BACKENDS:
            with suppress(RuntimeError):  # raised by a backend that does not support the shape
                attend(each)
                calls[each.name.lower()] = partial(attend, each)
    first = [x.double() for x in (q[:, :, part], k, v)]
    exact = scaled_dot_product_attention(*first).transpose(1, 2).reshape(N, -1, H * D)
    nbytes = 2 * N * H * D * (T + S) * q.element_size()
    flops = 4 * N * H * T * S * D
    return compare(name, sizes, calls, exact, nbytes=nbytes, flops=flops, part=part)


def _find_error(
    found: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...], part: slice
) -> float:
    pairs = zip(_as_tuple(found), _as_tuple(exact), strict=True)
    return max((x[:, part].double() - y).abs().max().item() for x, y in pairs)


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def main(benchmark: Benchmark) -> None:
    """Checks and times every shape, prints a table, and writes JSON and gains if asked to."""
    parser = argparse.ArgumentParser(
        description=benchmark.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    add("--out", type=Path, help="JSON of all rows")
    add("--record", action="store_true", help=f"write what was gained to {TABLE.name}")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("expected a GPU, found none; --smoke checks tiny shapes without one")
    shapes = benchmark.SMOKE if options.smoke else benchmark.SHAPES
    rows = []
    for name, sizes in shapes.items():
        rows.append(benchmark.measure(name, sizes, device))
        print(format_row(rows[-1]), flush=True)
    if options.out is not None:
        report.write_json(options.out, {**report.describe_run(device), "rows": rows})
    if options.record:
        record_gains(benchmark.KERNEL, rows)
    sys.exit(not all(row["passed"] for row in rows))


def format_row(row: Row) -> str:
    """Returns a row as a line: error, microseconds, ratio to the best alternative."""
    line = f"{row['shape']:40} {row['sizes']!s:28} error {row['max_error']:.1e}"
    if not row["passed"]:
        return f"{line}  at most {row['allowed']:.1e}: not timed"
    if "times" not in row:
        return f"{line}  not timed: no GPU"
    times = "  ".join(f"{each} {t['median']:.1f} us" for each, t in row["times"].items())
    return f"{line}  {times}  {row['gigabytes_per_second']:.0f} GB/s  {row['over_best']:.2f}x"


def record_gains(kernel: str, rows: list[Row]) -> None:
    """Writes the ratios of this device to the table that `kernels="auto"` consults."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    found = [[row["sizes"], round(row["over_best"], 3)] for row in rows if "over_best" in row]
    table.setdefault(torch.cuda.get_device_name(), {})[kernel] = found
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
