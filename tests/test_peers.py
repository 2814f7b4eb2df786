"""Ranks that do not do the same, or fail: all are told, and which one it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from filelock import FileLock

NUM_RANKS = 4
WORKER = Path(__file__).parent / "failing_ranks.py"
Found = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of each case saw."""
    report = shared_folder / "failing_ranks.json"
    with FileLock(shared_folder / "failing_ranks.lock"):
        if not report.exists():
            report.write_text(json.dumps(_run(tmp_path_factory.mktemp("ranks"))))
    lines: list[dict[str, Any]] = json.loads(report.read_text())
    return {(each["case"], each["rank"]): each for each in lines}


def _run(folder: Path) -> list[dict[str, Any]]:
    """Each line of each rank. No launcher: it would end all when it sees one die."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under a launcher, no rank holds it
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / f"{rank}.jsonl")],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, -9, 0], errors
    texts = [(folder / f"{rank}.jsonl").read_text() for rank in range(NUM_RANKS)]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def errors_of(found: Found, case: str) -> dict[int, str]:
    return {rank: each["error"] for (name, rank), each in found.items() if name == case}


OTHERS = {
    "another_plan": (["plan: rank 0, rank 1, rank 2: ", "; rank 3: "], "model: "),
    "another_version": (["pabc: rank 0, rank 2, rank 3: ", "; rank 1: 0.0"], "torch: "),
    "another_call": (["inputs: rank 0: ", "; rank 1, rank 2, rank 3: "], "weights: "),
    "another_checkpoint": (["weights: rank 0, rank 1, rank 3: ", "; rank 2: "], "values of"),
    "another_noise": (["values of x_bcthw: rank 0, rank 2, rank 3: ", "; rank 1: "], "weights: "),
}
"""What each rank is told, and what is the same on all."""


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_is_an_error_on_all_ranks(case, found):
    told, alike = OTHERS[case]
    assert set(errors_of(found, case).values()) == {"RankError"}
    for rank in range(NUM_RANKS):
        text = found[case, rank]["text"]
        assert all(each in text for each in told) and alike not in text, text


def test_a_call_that_one_rank_refuses_is_an_error_on_all_and_the_next_generation_runs(found):
    errors = errors_of(found, "refused")
    assert errors == {0: "RankError", 1: "RuntimeError", 2: "RankError", 3: "RankError"}
    for rank in (0, 2, 3):
        text = found["refused", rank]["text"]
        assert text.startswith("rank 1 failed: RuntimeError: pabc runs inference")
    assert "requires grad" in found["refused", 1]["text"]


def test_an_error_between_calls_is_told_at_once_and_the_next_generation_runs(found):
    errors = errors_of(found, "error_between_calls")
    assert errors == {0: "RankError", 1: "ValueError", 2: "RankError", 3: "RankError"}
    for rank in (0, 2, 3):
        text = found["error_between_calls", rank]["text"]
        assert text == "rank 1 failed between two calls: ValueError: no such prompt"


def test_an_error_between_calls_of_all_ranks_stops_none(found):
    assert set(errors_of(found, "error_on_all_between_calls").values()) == {""}


def test_an_error_in_mid_step_reaches_the_others_within_the_timeout(found):
    assert set(errors_of(found, "error_in_mid_step").values()) == {"RankError"}
    for rank in range(NUM_RANKS):
        each = found["error_in_mid_step", rank]
        assert each["text"].startswith("rank 1 failed: OutOfMemoryError: no memory left")
    assert "restart the processes" in found["error_in_mid_step", 1]["text"]


def test_a_killed_rank_is_named(found):
    assert errors_of(found, "killed") == {0: "RankError", 1: "RankError", 3: "RankError"}
    for rank in (0, 1, 3):
        text = found["killed", rank]["text"]
        assert text.startswith("rank 2 missed heartbeats for 5 s"), text
