"""Models that users sharded, or that run on data of their own, skip the same calls on each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runtime
SCRIPT = Path(__file__).parent / "run_original_ranks.py"


def test_two_ranks_skip_alike():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc-per-node", "2", str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
