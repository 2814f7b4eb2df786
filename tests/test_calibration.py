"""What a calibration gives: schedules for other targets, a frontier, files, a plot, a check."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from damage import damage
from denoising import NUM_STEPS, TIMESTEPS, Denoiser, sample

import pabc
from pabc.calibration.frontier import Corrections, best_within, find_frontier, winning_kinds
from pabc.calibration.measurement import Measurement, from_arrays, to_arrays
from pabc.calibration.search import search

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def calibration() -> pabc.Calibration:
    """Ten and eight of sixteen calls; a call takes a second."""
    found = pabc.calibrate(
        sample, Denoiser().eval(), calls=(10, 8), seeds=(0, 1), floor=30.0, progress=False
    )
    return replace(found, seconds_full=1.0, seconds_skipped=0.0)


def test_schedules_for_targets(calibration: pabc.Calibration) -> None:
    first, second = (candidate for _, candidate in calibration.plans)
    assert calibration.schedule() == first.schedule(TIMESTEPS)
    assert calibration.schedule(calls=8) == second.schedule(TIMESTEPS)
    assert calibration.schedule(speedup=2.0) == second.schedule(TIMESTEPS)
    assert calibration.schedule().label.startswith("calibrated: 10 of 16 steps, ")
    assert sum(calibration.schedule(calls=9).mask("model")) >= NUM_STEPS - 9
    assert not calibration.schedule(speedup=1.0).reuses
    with pytest.raises(ValueError, match="expected one of speedup, psnr and calls, found speedup"):
        calibration.schedule(speedup=2.0, calls=8)


def test_a_fidelity_takes_the_fewest_calls(calibration: pabc.Calibration) -> None:
    rows = calibration.frontier()
    wanted = next(row for row in rows if row.computed == 8).decibels
    plan = calibration.plan(psnr=wanted)
    assert len(plan.computed) == min(row.computed for row in rows if row.decibels >= wanted)
    assert not calibration.schedule(psnr=400.0).reuses


def test_below_the_floor_a_schedule_is_slower(calibration: pabc.Calibration) -> None:
    strict = replace(calibration, floor=60.0)
    with pytest.warns(UserWarning, match=r"speedup=6: expected 60 dB or more, found .* at best"):
        plan = strict.plan(speedup=6.0)
    row = next(row for row in strict.frontier() if row.candidate == plan)
    assert row.decibels >= 60 and row.computed > 2
    with pytest.warns(UserWarning, match="speedup=100: expected 60 dB or more, found no plan"):
        assert strict.plan(speedup=100.0) == plan


def test_the_frontier(calibration: pabc.Calibration) -> None:
    rows = calibration.frontier()
    assert [row.computed for row in rows] == list(range(2, NUM_STEPS + 1))
    assert [row.computed for row in rows if row.measured is not None] == [8, 10, NUM_STEPS]
    assert rows[-1].decibels == math.inf and rows[-1].speedup == 1
    for row in rows:
        assert len(row.candidate.computed) == row.computed
        assert row.speedup == pytest.approx(NUM_STEPS / row.computed)
    for row in rows[6], rows[8]:
        known = [m for m in calibration.measured if m.num_computed == row.computed]
        assert row.measured == pytest.approx(max(m.mean for m in known if len(m.decibels) == 2))
        assert row.worst is not None and row.worst <= row.measured


def test_predictions_are_corrected_by_plans_of_their_kind(calibration: pabc.Calibration) -> None:
    found = search(calibration.recording, calibration.updates)
    low, high = found.best(6), found.best(10)
    measured = [
        Measurement(low, 50.0, {0: 53.0}),
        Measurement(high, 70.0, {0: 71.0}),
    ]
    corrections = Corrections(measured)
    middle = found.best(8)
    assert corrections.correct(middle, 60.0) == pytest.approx(62.0)
    assert corrections.correct(found.best(12), 60.0) == pytest.approx(61.0)
    other = next(c for c in found.candidates(8) if c.name != middle.name)
    assert not corrections.knows(other) and corrections.correct(other, 60.0) == 60.0
    rows = find_frontier(found, measured, calibration.costs, 1.0)
    assert {row.name for row in rows[:-1]} == {middle.name}


def test_a_plan_of_fewer_calls_is_taken_where_it_is_better(calibration: pabc.Calibration) -> None:
    rows = [replace(row, measured=None) for row in calibration.frontier()[:4]]
    rows = [
        replace(row, predicted=value) for row, value in zip(rows, (40, 50, 45, 44), strict=True)
    ]
    assert best_within(rows, 5) == rows[1]
    measured = [*rows[:3], replace(rows[3], measured=43.0)]
    assert best_within(measured, 5) == measured[3]
    assert best_within(rows, 1) is None


def test_only_kinds_that_were_measured_best_are_searched(calibration: pabc.Calibration) -> None:
    rows = calibration.frontier()[:-1]
    best = {row.name for row in rows if row.measured is not None}
    assert {row.name for row in rows} <= best
    assert {kind.name for kind in winning_kinds(calibration.measured)} == best
    assert len(winning_kinds(())) == 1


def test_files_hold_all_of_it(calibration: pabc.Calibration, tmp_path: Path) -> None:
    path = calibration.save(tmp_path / "found")
    again = pabc.Calibration.load(path)
    assert str(again) == str(calibration)
    assert again.plans == calibration.plans and again.measured == calibration.measured
    assert np.array_equal(again.recording.gram, calibration.recording.gram, equal_nan=True)
    assert again.schedule(calls=9) == calibration.schedule(calls=9)
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no numbers")
    np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
    for name in ("text", "arrays.npz"):
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            pabc.Calibration.load(tmp_path / name)


def test_damaged_files_are_refused(calibration: pabc.Calibration, tmp_path: Path) -> None:
    whole = calibration.save(tmp_path / "whole").read_bytes()
    path, refused = tmp_path / "damaged", list[str]()
    for damaged in damage(whole, 400):
        path.write_bytes(damaged)
        try:
            assert str(pabc.Calibration.load(path)) == str(calibration)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert all(str(path) in each and len(each) < 600 for each in refused)
    with pytest.raises(FileNotFoundError):
        pabc.Calibration.load(tmp_path / "nowhere")


def test_threads_may_write_one_file(calibration: pabc.Calibration, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        saved = [pool.submit(calibration.save, tmp_path / "found") for _ in range(40)]
    paths = {each.result() for each in saved}
    assert list(tmp_path.iterdir()) == list(paths)
    assert str(pabc.Calibration.load(*paths)) == str(calibration)


def test_measurements_as_arrays(calibration: pabc.Calibration) -> None:
    measured = calibration.measured
    assert any(len(m.decibels) == 1 for m in measured)
    assert from_arrays(to_arrays(measured, NUM_STEPS)) == measured
    assert from_arrays(to_arrays((), NUM_STEPS)) == ()


def test_a_table(calibration: pabc.Calibration) -> None:
    lines = str(calibration).splitlines()
    assert repr(calibration) == str(calibration)
    assert lines[0].startswith(
        "calibration: 16 steps, recorded with seeds 0, 1; a call takes 1e+03"
    )
    assert lines[1] == "asked for calls=10, calls=8; floor 30 dB; * marks what is taken"
    assert [line.split()[0] for line in lines if "*" in line.split()[0][-1:]] == ["8*", "10*"]


def test_a_plot(calibration: pabc.Calibration, tmp_path: Path) -> None:
    path = calibration.plot(tmp_path / "frontier.svg")
    root = ElementTree.parse(path).getroot()
    classes = [element.get("class") for element in root.iter()]
    assert classes.count("measured") == 2 and classes.count("taken") == 2
    style = next(each.text for each in root.iter() if each.tag.endswith("style"))
    assert all(rule.startswith(".frontier ") for rule in style.split("\n")), "in a page, its own"
    assert classes.count("compute") == 18 and classes.count("skip") == 2 * NUM_STEPS - 18


def test_verify_runs_the_plan_on_other_seeds(calibration: pabc.Calibration) -> None:
    model = Denoiser().eval()
    found = calibration.verify(sample, model, seeds=(1, 20, 21), calls=8, progress=False)
    assert model.count_calls() == 3 * (NUM_STEPS + 8)
    assert list(found.decibels) == [1, 20, 21] and found.recorded == (1,)
    taken = next(m for m in calibration.measured if m.candidate == calibration.plans[1][1])
    assert found.decibels[1] == pytest.approx(taken.decibels[1], abs=1e-3)
    assert found.worst <= min(found.mean, found.median)
    assert "(recorded)" in str(found) and "worst" in str(found)
    with pytest.raises(ValueError, match="seeds: expected one integer or more"):
        calibration.verify(sample, model, seeds=())


def test_progress_is_told(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    pabc.calibrate(sample, Denoiser().eval(), calls=8, candidates=2, floor=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pabc: 1/1: recorded seed 0"
    assert lines[-1].startswith("pabc: 3/3: 8 steps, ")


def test_verify_checks_what_it_runs() -> None:
    made = pabc.calibrate(sample, Denoiser().eval(), calls=6, floor=1.0, progress=False)
    model = Denoiser().eval()

    def ignores(_: Any, seed: int) -> Any:
        return sample(model, seed)

    with pytest.raises(ValueError, match="sample: expected it to call the model"):
        made.verify(ignores, model, (5,), progress=False)
    drawn = iter(range(100))
    with pytest.raises(ValueError, match="sample: expected the same inputs at step 0"):
        made.verify(lambda m, _: sample(m, next(drawn)), model, (5,), progress=False)
    with pytest.raises(ValueError, match=r"seeds: expected one integer or more, .* found 3"):
        made.verify(sample, model, 3, progress=False)
