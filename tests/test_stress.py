"""The stress test of `bench/`, in short: many trajectories, several threads, exceptions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "stress.py"


@pytest.mark.runtime
def test_trajectories_that_change_threads_stay_equal_and_leave_nothing(tmp_path):
    out = tmp_path / "stress.json"
    options = ["--generations", "40", "--every", "10", "--backend", "eager", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["generations"] == 40 and result["exceptions"] > 0
    assert result["mismatches"] == 0 and not result["unexpected"] and not result["fallbacks"]
    assert result["slot_bytes_left"] == 0
    assert result["tensors_after"] <= result["tensors_before"]
