"""Describes the machine and the versions of a benchmark run; formats tables and writes JSON.

A benchmark is a script of this folder: `import report` finds this file beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "diffusers", "numpy")


def describe_run(device: str = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the device, versions, commit, date, and system load at the start of a run.

    `packages` are further distributions whose versions matter; None where one is not installed.
    """
    import torch

    import pabc

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": read_commit(),
        "device": name_device(device),
        "cpu": name_cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "pabc": pabc.__version__,
            **{name: find_version(name) for name in (*PACKAGES, *packages)},
        },
    }


def read_commit() -> str | None:
    """Returns the checkout's commit, with `+` if files were changed; None without a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def find_version(package: str) -> str | None:
    """Returns the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def name_device(device: str) -> str:
    """Returns the device with the name of its model."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def name_cpu() -> str:
    """Returns the processor's name and the vector instructions that PyTorch uses on it."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def summarize(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Returns median, minimum and maximum of repeated measurements."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def format_spread(found: Mapping[str, float], digits: int = 3) -> str:
    """Formats a result of `summarize`, as in `0.431 (0.402 to 0.445)`."""
    median, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table with aligned columns, the first to the left; None is shown as `-`."""
    lines = [list(header)] + [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    )


def format_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns the same table in Markdown."""
    lines = [list(header), ["---"] * len(header)]
    lines += [["" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a result atomically: an interrupted write leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)
