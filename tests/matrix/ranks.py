"""Generations on two ranks, in processes of their own (`run_ranks.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer

from .row import Cell
from .trial import Trial

SCRIPT = Path(__file__).with_name("run_ranks.py")
SECONDS = 400
"""The longest that a row may take."""
MARK = "cell\t"
"""What the lines begin with that tell a cell, after a row's name and another tab."""


def equals_one_rank(trial: Trial) -> Cell:
    """Returns the cell of one row."""
    ((_, cell),) = find_cells([trial.row.name])
    return cell


def find_cells(names: Sequence[str]) -> Iterator[tuple[str, Cell]]:
    """Yields rows with their cells. Those after one that fails run in other processes: after an
    error, ranks may wait for one another."""
    left = list(names)
    while left:
        before = len(left)
        for name, cell in _run(tuple(left)):
            if name in left:  # both ranks may tell of an error
                left.remove(name)
                yield name, cell
        if len(left) == before:
            yield left.pop(0), f"no: a rank ended, or all took longer than {SECONDS} s"


def _run(names: Sequence[str]) -> Iterator[tuple[str, Cell]]:
    """Yields cells of rows in order, until a row fails or takes too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), *names]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    timer = Timer(SECONDS, process.terminate)  # torchrun then ends its ranks
    timer.start()
    for line in process.stdout:
        if line.startswith(MARK):
            timer.cancel()
            timer = Timer(SECONDS, process.terminate)
            timer.start()
            _, name, cell = line.rstrip("\n").split("\t")
            yield name, cell
    timer.cancel()
    process.wait()
