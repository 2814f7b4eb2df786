"""The benchmark for GPUs, on a CPU: its parts, and what stays when one fails or time is over."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import gpu

        yield gpu


@pytest.fixture
def target(gpu, tmp_path):
    return gpu.Target(
        device="cpu", is_smoke=True, backend="eager", steps=8, rounds=1, folder=tmp_path
    )


def run(out, *options, status=0):
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--smoke"]
    command += ["--out", str(out), "--backend", "eager", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def read(out, part):
    return json.loads((out / f"{part}.json").read_text())


def test_what_is_done_is_kept_and_what_failed_is_not(gpu, tmp_path, monkeypatch, capsys):
    def run(out, *options):
        argv = ["gpu.py", "--device", "cpu", "--smoke", "--backend", "eager", "--part", "checks"]
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(out), *options])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert not ended.value.code, capsys.readouterr().out
        return read(out, "checks")

    content = run(tmp_path, "--only", "timestep guard")
    rows = content["rows"]
    guard = "timestep guard: another step's timestep"
    assert rows[guard]["passed"] and rows["timestep guard"]["outcome"] == "done"
    assert content["versions"]["torch"] and content["gpu"] is None
    assert "0 failed" in capsys.readouterr().out
    rows["artifact"] = {"outcome": "done", "seconds": 1234.0}
    rows[guard]["passed"] = False
    rows["timestep guard"]["seconds"] = 4321.0
    (tmp_path / "checks.json").write_text(json.dumps(content))
    options = ("--only", "timestep guard; artifact", "--earlier", str(tmp_path))
    rows = run(tmp_path / "later", *options)["rows"]
    assert rows["artifact"]["seconds"] == 1234.0 and rows["timestep guard"]["seconds"] < 4321.0


def die(target):
    yield "seconds", {"left": target.seconds, "passed": True}
    time.sleep(0.2)
    os._exit(3)


def hang(target):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield "child", {"pid": child.pid}
    time.sleep(600)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_task_that_dies_or_hangs_keeps_its_rows(gpu, target, tmp_path):
    processes, ended = sys.modules["gpu_processes"], []
    rows = gpu.Rows(tmp_path / "rows.json", {}, {}, resume=False)
    run_tasks = partial(processes.run_tasks, target=target, rows=rows, log=tmp_path / "log")
    tasks = [processes.Task("die", die, 300.0), processes.Task("late", hang, 300.0)]
    deadline = time.monotonic() + 600
    run_tasks(tasks[:1], deadline=deadline, after_each=lambda: ended.append(None))
    run_tasks(tasks[1:], deadline=0.0)
    pool = processes.Pool(target, rows, tmp_path / "log")
    pool.begin(processes.Task("hang", hang, 300.0), 300.0, None)
    while "hang: child" not in rows:
        pool.listen()
    pool.running[0].end = 0.0
    while not pool.listen():
        pass
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    outcomes = [found[name]["outcome"] for name in ("die", "late", "hang")]
    assert outcomes == ["died: exit code 3", "not run: out of time", "stopped: out of time"]
    assert found["die: seconds"]["passed"] and 0 < found["die: seconds"]["left"] <= 300
    assert not is_alive(found["hang: child"]["pid"]), "what it started is ended with it"
    assert len(ended) == 1
    assert [name for name, row in found.items() if gpu.has_failed(row)] == ["die"]


class Pipe:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def test_a_task_that_raises_keeps_its_rows(gpu, target):
    def fail(target):
        yield "first", {"passed": True}
        raise ValueError("no\nmore")

    processes, pipe = sys.modules["gpu_processes"], Pipe()
    processes.send_rows(pipe, processes.Task("fail", fail, 1.0), target)
    failed = ("failed", {"error": "ValueError: no"})
    assert pipe.sent == [("first", {"passed": True}), failed, None]


def test_rows_hold_what_json_can(gpu):
    row = {"error": float("nan"), "times": {"best": [1.5, float("inf")]}}
    found = sys.modules["gpu_processes"].make_finite(row)
    assert found == {"error": "nan", "times": {"best": [1.5, "inf"]}}


def test_no_name_of_a_task_begins_another(gpu):
    for part in gpu.PARTS.values():
        names = [task.name for task in part.tasks]
        assert len(set(names)) == len(names) and not any(": " in name for name in names)
        assert all(task.seconds <= part.seconds for task in part.tasks)
    kernels = sys.modules["gpu_kernels"]
    timed = {task.name for task in gpu.PARTS["times"].tasks if task.name.startswith("kernel ")}
    assert timed == {f"{kernels.TIMES} {kernel}" for kernel in kernels.BENCHMARKS}


def test_errors_are_relative_and_a_nan_is_one(gpu):
    ones = torch.ones(4)
    find_error = sys.modules["gpu_checks"].find_error
    assert find_error([ones * 1.5, ones], [ones, ones]) == pytest.approx(0.5)
    assert find_error([ones, ones * float("nan")], [ones, ones]) > 1e6


def test_loops_of_all_variants(gpu, target):
    rows = {}
    for name, row in sys.modules["gpu_loops"].time_loops("latte", target):
        rows[f"latte: {name}"] = row
    assert rows["latte: kernels"] == {"gains": "of the package"}
    prepared = {name: row for name, row in rows.items() if "prepare" in name}
    assert all(row["passed"] and not row["first_step_error"] for row in prepared.values())
    calls = {name.rpartition("prepare ")[2]: row.get("calls") for name, row in prepared.items()}
    assert calls == {
        "eager": None,
        "pabc, all computed": 8,
        "pabc pyramid": 8,
        "pabc skip 2x": 4,
        "pabc auto 2x": 4,
    }
    assert prepared["latte: prepare pabc, all computed"]["distance"] == 0
    times = rows["latte: time"]
    assert set(times["variants"]) == set(times["speedup"]) == set(calls)
    assert len(times["variants"]["pabc skip 2x"]["phases"]) == 2
    assert "latte: pabc auto 2x" in gpu.format_times(rows)


def test_plans_that_make_themselves(gpu, target):
    rows = dict(sys.modules["gpu_plans"].check_auto(target))
    assert len(rows) == 2 and all(row["passed"] for row in rows.values()), rows


def test_a_variant_that_is_wrong_is_not_timed(gpu, target):
    loops = sys.modules["gpu_loops"]
    case = loops.make_case(loops.TINY["latte"], target)
    contest = loops.Contest(case, target)
    assert contest.enter("eager", lambda case: loops.Ready(case.model))["passed"]

    def twice(**inputs):
        return (2 * case.model(**inputs)[0],)

    assert contest.enter("twice", lambda case: loops.Ready(twice))["passed"] is False
    assert "error" in contest.enter("none", lambda case: None)
    assert list(contest.ready) == ["eager"]


def test_results_of_tests_are_counted(gpu, tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 0\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    count_tests = sys.modules["gpu_kernels"].count_tests
    *_, (_, row) = count_tests([str(path)], 300.0)
    assert row["passed"] is False and row["ended"] == "exit status 1"
    assert row["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    (which,) = row["failing"]
    assert "test_wrong" in which
    *_, (_, row) = count_tests([str(path)], 0.0)
    assert row == {"passed": False, "ended": "out of time"}


def test_gains_are_written_and_recorded(gpu, tmp_path, monkeypatch):
    kernels = sys.modules["gpu_kernels"]
    rows = {
        "kernel attention: a": {"sizes": [1, 2], "over_best": 1.23456},
        "kernel attention: b": {"sizes": [3, 4], "passed": False},
        "latte: time": {"over_best": 9.0},
    }
    kernels.write_gains(tmp_path, "A GPU", rows)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"A GPU": {"other": []}, "B": {}}))
    monkeypatch.setattr(kernels.gains, "TABLE", table)
    kernels.record_gains(tmp_path)
    expected = {"A GPU": {"other": [], "attention": [[[1, 2], 1.235]]}, "B": {}}
    assert json.loads(table.read_text()) == expected
    assert kernels.follow_gains(tmp_path) == "as just measured"
    assert tmp_path / "gains.json" == kernels.gains.TABLE


def test_the_emoji_model_is_trained_and_resumed(gpu, target, tmp_path):
    training, train = sys.modules["training"], sys.modules["gpu_training"].train
    rows = dict(train(target))
    assert rows["trained"]["steps"] == 4 and rows["trained"]["samples"] == 32
    assert set(rows["accuracy"]) == {"samples", "picture", "placement", "seconds"}
    pieces = training.find_pieces(tmp_path / "checkpoint.pt")
    assert [piece.stat().st_size <= 16 * 2**20 for piece in pieces] == [True] * 3
    state = training.read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["progress"]["steps"] == 4
    assert dict(train(target))["trained"]["steps"] == 4, "there is nothing left to do"


def test_pictures_are_those_of_the_captions(gpu):
    training, script = sys.modules["gpu_training"], sys.modules["train_emoji"]
    pictures = training.Pictures.load()
    table = training.render_all(pictures)
    captions, _ = script.draw_captions(pictures, 40, 7)
    places = torch.tensor([training.find_place(caption) for caption in captions])
    assert torch.equal(table[places], pictures.render(captions))


def test_checks_run_on_a_cpu(gpu, tmp_path):
    left_out = ("latte", "cogvideox", "timestep guard", "kernels in models")
    names = [task.name for task in gpu.PARTS["checks"].tasks if task.name not in left_out]
    names = [name for name in names if not name.startswith("opensora")]
    run(tmp_path, "--part", "checks", "--only", ";".join(names))
    rows = read(tmp_path, "checks")["rows"]
    assert all(rows[name]["outcome"] == "done" for name in names)
    assert sum("passed" in row for row in rows.values()) > 20


def test_compiled_loops_are_timed_on_a_cpu(tmp_path):
    options = ("--part", "times", "--only", "latte; kernel encode_rows; ceilings")
    printed = run(tmp_path, *options, "--backend", "inductor")
    rows = read(tmp_path, "times")["rows"]
    assert rows["kernel encode_rows: smoke"]["passed"] and "latte: torch.compile" in printed
    assert {"eager", "torch.compile", "pabc auto 2x"} < set(rows["latte: time"]["speedup"])
