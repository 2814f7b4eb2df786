"""The demo from end to end, on an untrained model with few steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from filelock import FileLock
from PIL import Image

from pabc.__main__ import main
from pabc.calibration.measurement import FLATTERY
from pabc.demo import calibrated, charts, digits, latte, machine, metrics, timing, variants, worst
from pabc.demo.files import FILES
from pabc.demo.run import DemoOptions, plan_rounds
from pabc.demo.timing import Run
from pabc.plan import Plan, SlotSpec

BASELINES = ("full", "torch.compile", "3 steps", "2 steps")
CALIBRATED = ("calibrated 1.5x", "calibrated 2x")  # 3x of 4 steps computes as many as 2x
REUSE = ("pabc 2/4/6", "skip 2x", *CALIBRATED)
VARIANTS = (*BASELINES, "pabc, no reuse", *REUSE)
PROMPTS = ("a bold seven moving left, fast", "a <three> & moving up, slow")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    latte.build().save(folder)
    return folder


@pytest.fixture(scope="module")
def out(weights: Path, shared_folder: Path) -> Path:
    """The results of the demo, which runs once, whichever process asks first."""
    folder = shared_folder / "demo"
    options = ["--steps", "4", "--clips", "3", "--repeats", "2", "--backend", "eager"]
    options += ["--weights", str(weights), "--out", str(folder)]
    with FileLock(shared_folder / "demo.lock"):
        if not (folder / "metrics.json").is_file():
            assert main(["demo", *options, "--prompts", *PROMPTS]) == 0
    return folder


@pytest.fixture(scope="module")
def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def test_metrics_hold_every_figure(content: dict[str, Any]) -> None:
    assert tuple(content["variants"]) == VARIANTS
    assert (content["steps"], content["batch"], content["clips"]) == (4, 2, 4)
    for name, row in content["variants"].items():
        seconds = row["seconds_per_clip"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        for key in ("digit_accuracy", "direction_accuracy", "flop_share"):
            assert 0 <= row[key] <= 1
        for key in ("speedup_vs_eager", "speedup_vs_torch_compile"):
            assert 0 < row[key] < math.inf
        assert row["ssim"] <= 1 + 1e-9
        assert (row["compile_seconds"] > 0) == (name not in ("full", "3 steps", "2 steps"))
    assert content["variants"]["full"]["speedup_vs_eager"] == 1
    assert content["variants"]["torch.compile"]["speedup_vs_torch_compile"] == 1
    assert {"device", "torch", "pabc", "python", "cpus", "date", "warnings"} <= content.keys()


def test_full_equals_itself_and_reuse_does_not(content: dict[str, Any]) -> None:
    rows = content["variants"]
    assert rows["full"]["psnr"] is None
    assert rows["full"]["ssim"] == pytest.approx(1)
    assert rows["full"]["cache_bytes"] == rows["full"]["phases"] == 0
    assert rows["pabc, no reuse"]["psnr"] is None or rows["pabc, no reuse"]["psnr"] > 100
    for name in REUSE:
        assert math.isfinite(rows[name]["psnr"])
        assert rows[name]["flop_share"] < 1
        assert rows[name]["cache_bytes"] > 0
        assert rows[name]["phases"] >= 2
    assert rows["pabc 2/4/6"]["schedule"].startswith("pyramid spatial=2")


def test_half_of_the_calls_are_skipped(content: dict[str, Any]) -> None:
    row = content["variants"]["skip 2x"]
    assert (row["steps"], row["calls"], row["call_share"], row["phases"]) == (4, 2, 0.5, 2)
    assert row["flop_share"] == 0.5
    assert row["timesteps"] == [content["variants"]["full"]["timesteps"][i] for i in (0, 3)]
    assert row["schedule"] == "skip 2 of 4 model linear"


def test_the_headline_is_what_holds_on_all_machines(out: Path, content: dict[str, Any]) -> None:
    page, row = (out / "report.html").read_text(), content["variants"]["calibrated 2x"]
    headline = re.search(r"<h1>(.*)</h1>", page)
    assert headline is not None
    assert (
        f"calibrated 2x: {row['speedup_by_less_work']:.2f}x by less work (2 of 4 calls, 50%"
        in (headline[1])
    )
    assert "torch.compile" not in headline[1]


def test_calibrated_variants_follow_their_plans(content: dict[str, Any]) -> None:
    """And compute no more calls than variants by rule that are as fast."""
    rows, found = content["variants"], content["calibration"]
    assert tuple(found["plans"]) == CALIBRATED
    for name, calls in zip(CALIBRATED, (3, 2), strict=True):
        row, plan = rows[name], found["plans"][name]
        assert (row["steps"], row["calls"], row["flop_share"]) == (4, calls, calls / 4)
        assert row["timesteps"] == [rows["full"]["timesteps"][i] for i in plan["computed"]]
        assert row["schedule"] == f"calibrated: {calls} of 4 steps, {plan['plan']}"
        assert (plan["judged"], plan["judged_worst"]) == (row["psnr"], row["psnr_min"])


def test_the_frontier_and_predictions_are_kept(content: dict[str, Any]) -> None:
    found = content["calibration"]
    assert [row["computed"] for row in found["frontier"]] == [2, 3]
    for row in found["frontier"]:
        runs = [run for run in found["runs"] if run["computed"] == row["computed"]]
        best = max(
            runs, key=lambda run: run["measured"] + FLATTERY * run["plan"].startswith("hold")
        )
        assert (row["plan"], row["measured"]) == (best["plan"], best["measured"])
        assert row["speedup"] <= 4 / row["computed"]
    assert {run["computed"] for run in found["runs"]} == {2, 3}
    misses = [abs(run["predicted"] - run["measured"]) for run in found["runs"]]
    assert found["largest_miss"] == pytest.approx(max(misses))
    assert -1 <= found["correlation"] <= 1


def test_calibration_sees_no_judged_caption(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor noise that a judged sample starts from."""
    recorded = content["calibration"]["captions"]
    assert len(set(recorded)) == calibrated.NUM_CAPTIONS
    given: dict[str, Any] = {}
    monkeypatch.setattr(calibrated.pabc, "calibrate", lambda *args, **kwargs: given.update(kwargs))
    model = latte.build()
    found = calibrated.calibrate(model, steps=4, judged=set(recorded[:3]), seed=0)
    assert found is not None and not set(recorded[:3]) & set(found.captions)
    assert recorded[3] == found.captions[0]
    rounds = plan_rounds(model, DemoOptions(clips=400))
    assert not {batch.seed for batch in rounds} & set(given["seeds"])


def test_calls_of_calibrated_variants() -> None:
    names = [f"calibrated {target}x" for target in ("1.5", "2", "3")]
    counts = {50: [34, 25, 17], 28: [19, 14, 10], 5: [4, 3, 2], 4: [3, 2], 3: [2], 2: [], 1: []}
    for steps, expected in counts.items():
        assert calibrated.count_calls(steps) == dict(zip(names, expected, strict=False))


def test_predictions_are_compared_where_there_are_enough() -> None:
    right = [(10.0, 11.0), (20.0, 21.0), (30.0, 33.0), (None, 40.0)]
    found = calibrated.compare(right)
    assert found["largest_miss"] == 3 and 0.99 < found["correlation"] < 1
    assert calibrated.compare(right[:2]) == {"correlation": None, "largest_miss": 1}
    assert calibrated.compare([]) == {"correlation": None, "largest_miss": None}
    svg = charts.draw_predictions({"a": (20.0, 40.0)}, {"b": (20.0, 20.0), "c": (40.0, 40.0)})
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="(\d)"', svg)
    (left, up, _), (left_too, down, _), (right_side, up_too, _) = places
    assert (left, up, [each[2] for each in places]) == (left_too, up_too, ["4", "7", "7"])
    assert float(up) < float(down) and float(left) < float(right_side)
    assert "b: predicted 20.0 dB, measured 20.0 dB" in svg


def test_the_worst_sample_is_shown_beside_the_full_one(
    out: Path, content: dict[str, Any], weights: Path
) -> None:
    model = latte.load(weights)
    rows = content["variants"]
    first, second = (torch.zeros(4, 1, 8, 16, 16) for _ in range(2))
    second[2] = 0.1
    runs = {name: Run(batches=[second if name in REUSE else first]) for name in VARIANTS}
    table = {name: {**row, "worst_sample": 2 * (name in REUSE)} for name, row in rows.items()}
    rounds = [timing.Round(PROMPTS, 0), timing.Round(PROMPTS, 1)]
    assert worst.save_worst(out / "again.png", model, table, runs, rounds)
    with Image.open(out / "again.png") as found, Image.open(out / "worst.png") as written:
        assert found.size == written.size
        grays = {color for _, color in found.getcolors(2**16)}
    (out / "again.png").unlink()
    full, variant = (int(model.pictures(each)[2, 0, 0, 0, 0]) for each in (first, second))
    for gray in (full, variant, 128, 128 + worst.GAIN * (variant - full)):
        assert (gray,) * 3 in grays


def test_skips_are_named_by_what_they_save() -> None:
    names = {50: "skip 2x", 20: "skip 2x", 5: "skip 1.7x", 1: "skip 1x"}
    assert {steps: variants.name_skip(steps) for steps in names} == names


def test_fewer_steps_are_judged_against_all_steps(content: dict[str, Any]) -> None:
    rows = content["variants"]
    for name, calls in {"3 steps": 3, "2 steps": 2}.items():
        row = rows[name]
        assert (row["steps"], row["calls"], row["call_share"]) == (calls, calls, calls / 4)
        assert row["flop_share"] == calls / 4
        assert math.isfinite(row["psnr"])
        assert len(row["timesteps"]) == calls
        assert row["timesteps"] != rows["full"]["timesteps"][:calls]


def test_less_work_and_other_code_make_the_speedup(content: dict[str, Any]) -> None:
    """What a machine's libraries contribute is apart from what the variant leaves out."""
    rows = content["variants"]
    for name, row in rows.items():
        whole = rows[row["whole"]]
        assert whole["flop_share"] == 1 and whole["whole"] == row["whole"]
        assert whole["speedup_by_less_work"] == 1
        product = row["speedup_by_less_work"] * row["speedup_by_code"]
        assert product == pytest.approx(row["speedup_vs_torch_compile"])
        assert (row["whole"] == "torch.compile") == (name in BASELINES[1:])
    assert {rows[name]["whole"] for name in REUSE} == {"pabc, no reuse"}
    assert content["matmul"]["torch"] == content["matmul"]["pabc"] != "oneDNN"  # eager


def test_the_library_of_products_is_that_of_the_onednn_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for is_faster in (False, True):
        monkeypatch.setattr(machine, "onednn_is_faster", lambda found=is_faster: found)
        found = machine.find_libraries(cpu, "inductor")
        assert (found["pabc"] == "oneDNN") == is_faster
        assert found["torch"] == machine.find_libraries(cpu, "eager")["pabc"]


def test_fewer_steps_are_shares_of_all_steps() -> None:
    model = latte.build()
    names = {50: ["40 steps", "25 steps"], 10: ["8 steps", "5 steps"], 2: ["1 step"], 1: []}
    for steps, expected in names.items():
        made = variants.make_baselines(model, model.timesteps(steps), "eager")
        assert [each.name for each in made[2:]] == expected
        assert [f"{each.steps} step" in each.name for each in made[2:]] == [True] * len(expected)


def test_poor_accuracy_is_warned_of(content: dict[str, Any]) -> None:
    assert any("the full model's digit accuracy" in warning for warning in content["warnings"])


def test_pictures_show_every_frame(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == set(FILES)
    with Image.open(out / "clips.gif") as gif:
        assert gif.n_frames == digits.FRAMES
        assert gif.info["loop"] == 0
    with Image.open(out / "clips.png") as still:
        assert still.width > 4 * 3 * digits.CANVAS * 4


def test_report_needs_nothing_beside_itself(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/gif') == 1
    assert page.count('src="data:image/png') == 2  # what was generated, and the worst of it
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    page = re.sub(r'"data:[^"]*"', '""', page)  # encoded pictures may spell anything
    assert "http" not in page
    assert not re.findall(r"\$\w+", page)
    assert page.count("<svg") == 5 + 1 + 1 + 4 + 2  # plans, calls, means, kinds, calibration
    for name in VARIANTS:
        tables = 3 if name in CALIBRATED else 2  # work, time, and what was predicted
        assert page.count(f"<td>{name}</td>") == tables


@pytest.mark.parametrize(("prompts", "clips", "rounds"), [(4, 40, 10), (3, 40, 14), (4, 4, 5)])
def test_rounds_serve_repeats_and_clips(prompts: int, clips: int, rounds: int) -> None:
    planned = plan_rounds(latte.build(), DemoOptions(prompts=prompts, clips=clips, repeats=5))
    assert len(planned) == rounds
    assert {len(batch.captions) for batch in planned} == {prompts}
    assert len({batch.seed for batch in planned}) == rounds
    assert planned[0].captions == digits.PROMPTS[:prompts]
    captions = [digits.parse(caption) for batch in planned[1:] for caption in batch.captions]
    assert len(set(captions)) == len(captions)


def test_given_captions_are_kept_in_every_round() -> None:
    options = DemoOptions(prompts=("a two moving up",), clips=3, repeats=1)
    planned = plan_rounds(latte.build(), options)
    assert [batch.captions for batch in planned] == [("a two moving up",)] * 3
    assert [batch.seed for batch in planned] == [0, 1, 2]


def test_two_processes_give_the_same_clips(weights: Path, tmp_path: Path) -> None:
    """What each variant of one process has, next to it."""
    options = ["--steps", "4", "--clips", "1", "--repeats", "1", "--backend", "eager"]
    options += ["--weights", str(weights), "--out", str(tmp_path), "--prompts", PROMPTS[0]]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pabc"]
    ran = subprocess.run(
        [sys.executable, "-m", *command, "demo", "--mesh", "2", *options],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())["variants"]
    shared = ("pabc, no reuse", "pabc 2/4/6", "skip 2x")
    assert tuple(found) == (*VARIANTS, *(f"{name}, 2 ranks" for name in shared))
    none, reused = found["pabc, no reuse, 2 ranks"], found["pabc 2/4/6, 2 ranks"]
    assert none["psnr"] is None or none["psnr"] > 100
    assert reused["psnr"] == pytest.approx(found["pabc 2/4/6"]["psnr"], abs=0.01)
    assert reused["cache_bytes"] * 2 == found["pabc 2/4/6"]["cache_bytes"]
    skip = found["skip 2x, 2 ranks"]
    assert skip["psnr"] == pytest.approx(found["skip 2x"]["psnr"], abs=0.01)
    assert ran.stdout.count("ranks: 2, hidden_states") == 3
    assert "a generation:" in ran.stdout


def test_compile_seconds_exclude_a_steady_generation() -> None:
    assert Run(first_seconds=9.0, seconds=[2.0, 2.5, 2.0]).compile_seconds == 7.0
    assert Run(first_seconds=1.0, seconds=[2.0]).compile_seconds == 0.0


def test_wide_spread_is_warned_of() -> None:
    row = {
        "seconds_per_clip": {"median": 1.0, "min": 0.9, "max": 1.3},
        "digit_accuracy": 1.0,
        "direction_accuracy": 1.0,
        "psnr": 20.0,
    }
    steady = {**row, "seconds_per_clip": {"median": 1.0, "min": 0.95, "max": 1.05}}
    concerns = metrics.find_concerns({"full": {**steady, "psnr": None}, "torch.compile": row})
    assert len(concerns) == 2
    assert "spread widely, in shares of the median: torch.compile 40%;" in concerns[0]
    assert concerns[1] == "torch.compile of the full model is off: PSNR 20.0 dB"


def test_calls_are_marked_at_their_timesteps() -> None:
    svg = charts.draw_calls({"all": [900, 600, 300, 0], "half": [900, 0]})
    assert svg.count("<rect") == 4 + 2
    assert "half: t = 900" in svg and "half: t = 600" not in svg


def test_timeline_has_a_cell_per_step_and_group() -> None:
    slots = [SlotSpec("a", "spatial", 0), SlotSpec("b", "spatial", 1), SlotSpec("c", "mlp", 0)]
    reuse = [[False] * 3, [True, True, False], [False, False, True]]
    svg = charts.draw_timeline(Plan.from_reuse((3, 2, 1), slots, reuse))
    assert svg.count("<rect") == 2 * 3  # the two spatial slots act alike
    assert svg.count('class="reuse"') == 2
    assert svg.count('class="store"') == 2
    assert "spatial, step 1, t = 2: reuse" in svg


def test_timeline_tells_forecasts_and_what_they_cover() -> None:
    slots = [SlotSpec("a", "spatial", 0, outer=("m",)), SlotSpec("m", "model", 0)]
    reuse = [[False] * 2, [False] * 2, [False, True]]
    plan = Plan.from_reuse((9, 6, 3), slots, reuse, ["hold", "linear"])
    svg = charts.draw_timeline(plan)
    assert svg.count('class="reuse"') == svg.count('class="covered"') == 1
    assert "model, step 2, t = 3: forecast, +2 of step 1, -1 of step 0" in svg
    assert "spatial, step 2, t = 3: part of what is reused" in svg
