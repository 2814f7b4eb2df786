"""Sharded generations in real processes: every step equals one rank's; bytes are those predicted.

All cases are run once (`run_ranks.py`), by whichever pytest process asks first; each test reads one
case's part of the report.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from filelock import FileLock
from sharded.cases import CASES, NUM_RANKS, RankCase

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[1]
RUN_SECONDS = 1500
"""Seconds after which the run is taken to hang: all cases took 760 beside other work."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Run:
    """Holds what so many ranks found, by case, and how the run ended."""

    found: dict[str, list[dict[str, Any]]]
    ended: str

    def __getitem__(self, case: RankCase) -> list[dict[str, Any]]:
        if case.name not in self.found:
            pytest.fail(f"{case} did not finish; the run {self.ended}")
        return self.found[case.name]


@pytest.fixture(scope="session")
def run_on(shared_folder: Path) -> Callable[[int], Run]:
    """The run on so many ranks: made once, also where several processes test."""
    folder = shared_folder / "ranks"
    with FileLock(shared_folder / "ranks.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "ended.txt").write_text(_run(folder))

    @cache
    def get(num_ranks: int) -> Run:
        report = folder / f"ranks_{num_ranks}.json"
        found = json.loads(report.read_text()) if report.exists() else {}
        return Run(found, (folder / "ended.txt").read_text())

    return get


def _run(folder: Path) -> str:
    """Runs all cases; how that ended, with the last lines of the output."""
    command = [sys.executable, str(ROOT / "tests/run_ranks.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=RUN_SECONDS)
        ended = f"returned {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        ended = f"did not end within {RUN_SECONDS} s"
    return f"{ended}:\n{output[-8000:]}"


def params(chosen: Callable[[RankCase], bool] = lambda case: True) -> list[Any]:
    """(case, number of ranks), those of one run beside each other."""
    return [
        pytest.param(case, num_ranks, id=f"{case}-{num_ranks}")
        for num_ranks in NUM_RANKS
        for case in CASES
        if num_ranks in case.ranks and chosen(case)
    ]


@pytest.mark.parametrize(("case", "num_ranks"), params())
def test_every_step_equals_one_rank(case, num_ranks, run_on, add_row):
    ranks = run_on(num_ranks)[case]
    assert len(ranks) == num_ranks
    for rank, found in enumerate(ranks):
        assert len(found["errors"]) == sum(s.num_steps for s in case.schedules) * case.branches
        assert max(found["errors"]) <= TOLERANCE, (rank, found["errors"])
        assert found["plans"] == ranks[0]["plans"], rank
    reuses = any(schedule.reuses for schedule in case.schedules)
    assert bool(ranks[0]["reused"]) == reuses, "as many steps differ from the model's own output"
    add_row(
        "ranks",
        case=case.name,
        ranks=num_ranks,
        divided=", ".join(map(str, ranks[0]["dims"])),
        error=f"{max(max(found['errors']) for found in ranks):.1e}",
        seconds=f"{ranks[0]['seconds']:.1f}",
    )


@pytest.mark.parametrize(("case", "num_ranks"), params())
def test_what_is_sent_is_what_was_predicted(case, num_ranks, run_on):
    """Collectives and bytes of each step, as each rank counted them when it sent them."""
    ranks = run_on(num_ranks)[case]
    for rank, found in enumerate(ranks):
        assert found["sent"] == found["predicted"], rank
    assert any(num_bytes for _, num_bytes in ranks[0]["sent"])
    imagined = ranks[0]["imagined"]
    assert imagined in ("", ranks[0]["communication"]), "pabc.explain without ranks says otherwise"


@pytest.mark.parametrize(("case", "num_ranks"), params(lambda case: "shard" in case.options))
def test_the_dimension_asked_for_is_divided(case, num_ranks, run_on):
    assert run_on(num_ranks)[case][0]["dims"] == [case.options["shard"]]


@pytest.mark.parametrize(("case", "num_ranks"), params(lambda case: case.batch_ranks is not None))
def test_a_mesh_of_two_dimensions_divides_samples_and_tokens(case, num_ranks, run_on):
    dims = run_on(num_ranks)[case][0]["dims"]
    assert dims[0] == 0 and len(dims) == (2 if num_ranks > case.batch_ranks else 1)
