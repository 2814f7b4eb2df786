"""Kernels compiled for GPUs that are not at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels
BENCH = Path(__file__).parents[1] / "bench"


def test_every_configuration_fits_every_target(tmp_path):
    out = tmp_path / "targets.json"
    command = [sys.executable, str(BENCH / "kernel_targets.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 50
    for row in rows:
        used = [row[t] for t in ("sm_80", "sm_90", "sm_100", "gfx942") if t in row]
        assert used and all(each["registers"] > 0 and not each["problems"] for each in used), row


SHARED = ("kernel_targets", "kernel_timing")
BENCHMARKS = [path for path in sorted(BENCH.glob("kernel_*.py")) if path.stem not in SHARED]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_check_without_a_gpu(path):
    command = [sys.executable, str(path), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not timed: no GPU" in done.stdout


def test_every_kernel_has_a_benchmark_and_a_test():
    kernels = {
        path.stem for path in BENCH.parent.glob("kernels/*.py") if "OP = " in path.read_text()
    }
    assert {path.stem.removeprefix("kernel_") for path in BENCHMARKS} == kernels
    assert all((Path(__file__).parent / f"test_{kernel}.py").exists() for kernel in kernels)
    text = (BENCH / "gpu_kernels.py").read_text()
    assert all(f"import kernel_{kernel}\n" in text for kernel in kernels)
