"""The benchmark of compile times: processes, rows that are kept, ratios."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def compile_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import compile_time
    return compile_time


def run(*options, check=True):
    command = [sys.executable, str(BENCH / "compile_time.py"), "--smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_rows_are_processes_and_are_kept(tmp_path):
    out = tmp_path / "compile_time.json"
    options = ("--out", str(out), "--variants", "eager")
    printed = run(*options).stdout
    assert "cold, 1+1 blocks, eager" in printed and "warm, 1+1 blocks, eager" in printed
    content = json.loads(out.read_text())
    (row,) = content["rows"].values()
    assert row["shapes"]["latents"] == [2, 4, 4, 16, 16]
    assert row["cold"]["seconds"] > 0 and row["warm"]["imports"] > 0

    row["cold"]["seconds"] = 1234.0
    out.write_text(json.dumps(content))
    assert "1234.0" in run(*options, "--resume").stdout
    refused = run("--variants", "torchcompile", check=False)
    assert refused.returncode == 2 and "--variants: got torchcompile" in refused.stderr


@pytest.mark.slow
def test_every_variant_is_compiled_cold_and_warm(tmp_path):
    out = tmp_path / "compile_time.json"
    run("--out", str(out))
    found = {(row["state"], row["variant"]): row for row in json.loads(out.read_text())["summary"]}
    assert len(found) == 8 and not any("error" in row for row in found.values())
    for state in ("cold", "warm"):
        assert found[state, "torch.compile"]["codes"] == 1
        assert found[state, "regional"]["codes"] == 2
        fast = found[state, "pabc"]
        assert fast["phases"] == 5 and fast["codes"] >= 2
        assert 0 < fast["capture"]["median"] < fast["seconds"]["median"]
        assert fast["seconds_ratio"] > 0 and fast["cpu_ratio"] > 0


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
