"""The benchmark for GPUs, on a CPU: its parts, and what stays when one fails or time is over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import gpu
    return gpu


def run(out, *options, status=0):
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--smoke"]
    command += ["--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, json.loads((out / "gpu.json").read_text())


def test_parts_run_in_turn_and_are_kept(tmp_path):
    options = ("--backend", "eager", "--only", "timestep guard; kernels")
    printed, content = run(tmp_path, *options)
    rows = content["rows"]
    assert rows["timestep guard: another step's timestep"]["passed"]
    assert rows["timestep guard"]["outcome"] == rows["kernels"]["outcome"] == "done"
    assert content["versions"]["torch"] and content["gpu"] is None and "0 failed" in printed
    rows["kernels"]["seconds"] = 1234.0
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    assert run(tmp_path, *options, "--resume")[1]["rows"]["kernels"]["seconds"] == 1234.0


def test_nothing_is_begun_when_time_is_over(gpu, tmp_path):
    rows = gpu.Rows(tmp_path / "gpu.json", {}, {}, resume=False)
    gpu.run_parts(["kernels", "artifact"], None, rows, 0.0, tmp_path / "log")
    assert {row["outcome"] for row in rows.rows.values()} == {"not begun: no time left"}


def _fail(target):
    yield "first", {"passed": True}
    raise ValueError("no\nmore")


class Pipe:
    def __init__(self):
        self.sent = []

    def recv(self):
        return "begin"

    def send(self, message):
        self.sent.append(message)


def test_a_part_that_fails_keeps_its_rows(gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.PARTS, "kernels", _fail)
    monkeypatch.setattr(gpu.os, "dup2", lambda *_: None)
    pipe = Pipe()
    gpu.serve(pipe, "kernels", None, tmp_path / "log")
    failed = ("failed", {"error": "ValueError: no"})
    assert pipe.sent == [("first", {"passed": True}), failed, None]
    assert [gpu.has_failed(row) for _, row in pipe.sent[:2]] == [False, True]


def test_errors_are_relative_and_a_nan_is_one(gpu):
    import torch

    ones = torch.ones(4)
    find_error = gpu.gpu_checks.find_error
    assert find_error([ones * 1.5, ones], [ones, ones]) == pytest.approx(0.5)
    assert find_error([ones, ones * float("nan")], [ones, ones]) > 1e6


@pytest.mark.slow
def test_parts_run_on_a_cpu(gpu, tmp_path):
    left_out = ("timestep guard", "kernels", "end to end: latte", "CUDA graphs")  # in other tests
    names = [name for name in gpu.PARTS if name not in left_out]
    names = [name for name in names if name not in ("correctness: latte", "correctness: cogvideox")]
    printed, content = run(tmp_path, "--backend", "eager", "--only", ";".join(names))
    rows = content["rows"]
    assert all(rows[name]["outcome"] == "done" for name in names)
    assert sum("passed" in row for row in rows.values()) > 20
    loops = rows["end to end: opensora: time eager, pabc eager"]
    assert len(loops["variants"]["pabc eager"]["phases"]) == 4
    assert "end to end: opensora: pabc eager" in printed


@pytest.mark.slow
def test_compiled_parts_run_on_a_cpu(tmp_path):
    _, content = run(tmp_path, "--only", "end to end: latte; CUDA graphs")
    loops = content["rows"]["end to end: latte: time eager, pabc, torch.compile"]
    assert set(loops["speedup"]) == {"eager", "pabc", "torch.compile"}
