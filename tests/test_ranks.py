"""Sharded generations in real processes: every step equals one rank's; bytes are those predicted.

One torchrun per number of ranks runs all of its cases (`run_ranks.py`), in whichever pytest process
asks first; each test reads one case's part of the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from filelock import FileLock
from sharded.cases import CASES, RankCase

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[1]
RUN_SECONDS = 420
TOLERANCE = 1e-5
NUM_RANKS = sorted({num_ranks for case in CASES for num_ranks in case.ranks})


@dataclass(frozen=True)
class Run:
    """What one torchrun found: case -> what each rank found; and how it ended."""

    found: dict[str, list[dict[str, Any]]]
    ended: str

    def __getitem__(self, case: RankCase) -> list[dict[str, Any]]:
        if case.name not in self.found:
            pytest.fail(f"{case} did not finish; torchrun {self.ended}")
        return self.found[case.name]


@pytest.fixture(scope="session")
def run_on(shared_folder: Path) -> Callable[[int], Run]:
    """The run on so many ranks: made once, also where several processes test."""
    known: dict[int, Run] = {}

    def get(num_ranks: int) -> Run:
        if num_ranks not in known:
            report, ended = (shared_folder / f"ranks_{num_ranks}.{end}" for end in ("json", "txt"))
            with FileLock(shared_folder / f"ranks_{num_ranks}.lock"):
                if not ended.exists():
                    ended.write_text(_run(num_ranks, report))
            found = json.loads(report.read_text()) if report.exists() else {}
            known[num_ranks] = Run(found, ended.read_text())
        return known[num_ranks]

    return get


def _run(num_ranks: int, report: Path) -> str:
    """Runs all cases; how that ended, with the last lines of the output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(ROOT / "tests/run_ranks.py"), str(report)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=RUN_SECONDS)
        ended = f"returned {process.returncode}"
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
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
