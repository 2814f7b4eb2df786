"""Runs the nodes in ComfyUI, and writes what came out into pabc/comfyui/README.md.

    PABC_COMFYUI=path/to/ComfyUI python tests/write_comfyui_table.py

Each row is a tiny model of ComfyUI's own classes, with random weights, under one of its samplers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from comfy_host import FAMILIES
from hosts import PlainLoop, accelerate, acceleration_of, find_host, schedule_of
from torch import Tensor

README = Path(__file__).parents[1] / "pabc" / "comfyui" / "README.md"
BEGIN, END = "<!-- table {}: tests/write_comfyui_table.py -->\n", "<!-- end of the table -->\n"
SIZE = 24
"""Of the latents, in pixels; half of that for the model without patches."""
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "res_multistep",
    "uni_pc",
)
HEADER = (
    "model",
    "sampler",
    "scale",
    "at 1",
    "at 2, to the plain loop",
    "calls at 2",
    "at 2, to the full run",
    "seconds: without, at 2",
)


COMPILED = ("model", "captured", "with `compile`, at 1", "at 2, to the same without `compile`")
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What one model came to under one sampler; errors are relative to the largest latent."""

    model: str
    sampler: str
    scale: str
    at_one: str
    to_plain: str
    calls: str
    to_full: str
    seconds: str


def measure(host: Any, family: str, sampler: str, cfg: float, steps: int) -> Row:
    """Returns the row of one model under one sampler."""
    given = {"sampler": sampler, "cfg": cfg, "steps": steps, "size": SIZE}
    patcher = host.make(0, family)
    host.sample(patcher, **given)
    full, full_seconds = _timed(host, patcher, given)
    at_one = host.sample(accelerate(patcher, 1.0), **given)
    fast = accelerate(patcher)
    host.sample(fast, **given)
    at_two, seconds = _timed(host, fast, given)
    report = acceleration_of(fast).report
    computed = sum(report.calls.values()) - sum(report.skipped.values())
    loop = PlainLoop(patcher.model.diffusion_model, schedule_of(fast))
    plain = host.sample(patcher, **given)
    assert loop.num_computed == computed, (loop.num_computed, computed)
    return Row(
        family,
        f"`{sampler}`",
        f"{cfg:g}",
        "equal" if torch.equal(at_one, full) else _format(at_one, full),
        "equal" if torch.equal(at_two, plain) else _format(at_two, plain),
        f"{computed} of {sum(report.calls.values())}",
        _format(at_two, full),
        f"{full_seconds:.2f}, {seconds:.2f}",
    )


def measure_runs(host: Any, steps: int) -> Iterator[Cells]:
    """Yields the rows: every sampler with guidance, and the first model without as well."""
    for i, family in enumerate(FAMILIES):
        for sampler in SAMPLERS:
            yield astuple(measure(host, family, sampler, 3.0, steps))
            if i == 0:
                yield astuple(measure(host, family, sampler, 1.0, steps))


def measure_compiled(host: Any, steps: int) -> Iterator[Cells]:
    """Yields a row for each model: whether it is captured, and how far it is from itself."""
    for family in FAMILIES:
        patcher = host.make(0, family)
        given = {"cfg": 3.0, "steps": steps}
        found = []
        for speedup in (1.0, 2.0):
            fast = accelerate(patcher, speedup, compile="eager")
            latents = host.sample(fast, **given)
            denoiser = acceleration_of(fast)._denoiser
            plain = host.sample(accelerate(patcher, speedup), **given)
            found.append("equal" if torch.equal(latents, plain) else _format(latents, plain))
        refused = "; ".join(denoiser._refused)
        yield family, f"no: {refused}" if refused else "yes", *found


def write(name: str, header: Cells, rows: list[Cells], text: str) -> str:
    """Returns a document with the rows in the place of those that it has."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    table = "\n".join(["", lines[0], "|---" * len(header) + "|", *lines[1:], ""])
    begin = BEGIN.format(name)
    between = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    assert between.search(text), name
    return between.sub(lambda _: f"{begin}{table}\n{END}", text)


PARTS = {"runs": (HEADER, measure_runs), "compiled": (COMPILED, measure_compiled)}


def _timed(host: Any, patcher: Any, given: dict[str, Any]) -> tuple[Tensor, float]:
    start = perf_counter()
    found = host.sample(patcher, **given)
    return found, perf_counter() - start


def _format(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max() / expected.abs().max()):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.part:
        header, measure_part = PARTS[part]
        rows = []
        for row in measure_part(find_host(), options.steps):
            rows.append(row)
            print(*row, sep=" | ", file=sys.stderr, flush=True)
        README.write_text(write(part, header, rows, README.read_text()))


if __name__ == "__main__":
    main()
