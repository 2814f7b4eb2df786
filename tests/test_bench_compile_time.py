"""The benchmark of compile times: processes, rows that are kept, ratios."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pabc

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def compile_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import compile_time

        yield compile_time


def run(*options, check=True):
    command = [sys.executable, str(BENCH / "compile_time.py"), "--smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_blocks_are_compiled_cold_and_warm_and_rows_are_kept(tmp_path):
    """In one test, as each start is a process."""
    out = tmp_path / "compile_time.json"
    options = ("--out", str(out), "--variants", "regional")
    printed = run(*options).stdout
    assert "cold, 1+1 blocks, regional" in printed and "warm, 1+1 blocks, regional" in printed
    content = json.loads(out.read_text())
    cold, warm = content["summary"]
    assert (cold["state"], warm["state"]) == ("cold", "warm")
    assert cold["codes"] == warm["codes"] == 2, "a spatial and a temporal block"
    assert cold["cpu"]["median"] > warm["cpu"]["median"] > 0
    (row,) = content["rows"].values()
    assert row["shapes"]["latents"] == [2, 4, 4, 16, 16]
    assert row["cold"]["seconds"] > 0 and row["warm"]["imports"] > 0

    row["cold"]["seconds"] = 1234.0
    out.write_text(json.dumps(content))
    assert "1234.0" in run(*options, "--resume").stdout
    refused = run("--variants", "torchcompile", check=False)
    assert refused.returncode == 2 and "found torchcompile" in refused.stderr


def test_eager_mode_compiles_nothing(compile_time):
    row = compile_time.measure("eager", 1, 16)
    assert "codes" not in row and row["cpu"] > 0


def test_all_phases_are_counted(compile_time, monkeypatch):
    monkeypatch.setattr(pabc, "compile", functools.partial(pabc.compile, backend="eager"))
    row = compile_time.measure("pabc", 1, 16)
    assert row["phases"] == 5 and row["captures"] == 1 and row["codes"] >= 2
    assert 0 < row["capture"] < row["seconds"] + 0.01


def test_medians_and_ratios_are_of_one_depth_and_state(compile_time):
    def row(variant, cold, warm):
        states = {"cold": {"seconds": cold, "cpu": cold}, "warm": {"seconds": warm, "cpu": warm}}
        return {"variant": variant, "depth": 4, **states}

    rows = {
        "a": row("torch.compile", 10.0, 2.0),
        "b": row("pabc", 4.0, 1.0),
        "c": row("pabc", 6.0, 3.0),
        "d": {"variant": "regional", "depth": 4, "cold": {"error": "no"}, "warm": {"error": "no"}},
    }
    summary = compile_time.summarize(rows)
    found = {(each["state"], each["variant"]): each for each in summary}
    assert found["cold", "pabc"]["seconds"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert found["cold", "pabc"]["seconds_ratio"] == 0.5
    assert found["warm", "pabc"]["cpu_ratio"] == 1.0
    assert "no" in compile_time.format_rows(summary)


def test_processor_time_of_children_counts_while_they_run(compile_time):
    before = compile_time.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 20
        while compile_time.cpu_seconds() < before + 0.2:
            assert time.monotonic() < deadline, "the child's time is not counted"
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
