"""`pabc.calibrate`: what is recorded, what is run, which plan is taken, and what is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from damage import damage
from denoising import NUM_STEPS, TIMESTEPS, Denoiser, draw_noise, sample, sample_guided
from loops import Loop, loop_call, make_denoiser
from torch import Tensor

import pabc
from pabc.calibration.notes import Notes, fingerprint
from pabc.calibration.results import as_tensors, decibels

pytestmark = pytest.mark.runtime


def calibrate(sample: Any, model: Any, **options: Any) -> pabc.Calibration:
    return pabc.calibrate(sample, model, **{"progress": False, "floor": 1.0, **options})


def run(sample: Any, model: Any, schedule: pabc.Schedule, seed: int) -> tuple[float, int]:
    """The PSNR of a schedule as a user runs it, and the calls that it computes."""
    full = as_tensors(sample(pabc.compile(model, NONE, backend="original"), seed))
    model.count_calls()
    fast = as_tensors(sample(pabc.compile(model, schedule, backend="original"), seed))
    return decibels(full, fast), model.count_calls()


NONE = pabc.Schedule.none(TIMESTEPS)


@pytest.mark.parametrize(("loop", "branches"), [(sample, 1), (sample_guided, 2)])
@torch.no_grad()
def test_the_plan_gives_a_user_what_was_measured(loop: Any, branches: int) -> None:
    model = Denoiser().eval()
    calibration = calibrate(loop, model, calls=8, seeds=(3,))
    best = max(calibration.measured, key=lambda each: each.merit)
    assert calibration.timesteps == TIMESTEPS
    assert len(calibration.recording.branches) == branches
    assert best.candidate == calibration.chosen and best.num_computed == 8
    assert best.mean > 50
    found, calls = run(loop, model, calibration.schedule(), 3)
    assert found == pytest.approx(best.mean, abs=1e-3)
    assert calls == 8 * branches


@torch.no_grad()
def test_a_generation_that_is_recorded_is_the_plain_one() -> None:
    model = Denoiser().eval()
    seen: list[Tensor] = []

    def watched(given: Any, seed: int) -> Tensor:
        seen.append(sample(given, seed))
        return seen[-1]

    calibrate(watched, model, calls=8, candidates=1)
    assert len(seen) == 2 and model.count_calls() == NUM_STEPS + 8
    assert torch.equal(seen[0], sample(model, 0))


def test_the_best_of_what_was_run_is_taken() -> None:
    calibration = calibrate(sample, Denoiser().eval(), calls=(6, 10), candidates=4)
    for target, plan in calibration.plans:
        known = [each for each in calibration.measured if each.num_computed == target.value]
        assert len(known) > 1
        assert plan == max(known, key=lambda each: each.merit).candidate


def test_a_speedup_follows_from_the_seconds_of_calls() -> None:
    calibration = calibrate(sample, Denoiser().eval(), speedup=1.01, candidates=1)
    assert calibration.seconds_full > 0 and calibration.seconds_skipped > 0
    (_, plan), n = calibration.plans[0], NUM_STEPS
    found = calibration.costs.speedup(n, len(plan.computed))
    assert found >= 1.0 or len(plan.computed) == n


def test_several_seeds_are_summed_and_the_best_plan_is_run_with_each() -> None:
    calibration = calibrate(sample, Denoiser().eval(), calls=8, seeds=(5, 6, 7), candidates=4)
    assert calibration.recording.count == 3
    counts = sorted(len(each.decibels) for each in calibration.measured)
    assert counts[0] == 1 and counts[-1] == 3
    taken = next(m for m in calibration.measured if m.candidate == calibration.chosen)
    assert set(taken.decibels) == {5, 6, 7}
    assert taken.worst <= taken.mean


def test_all_is_the_same_when_repeated() -> None:
    first, second = (calibrate(sample, Denoiser().eval(), calls=7) for _ in range(2))
    assert first.chosen == second.chosen
    assert [m.decibels for m in first.measured] == [m.decibels for m in second.measured]


def test_the_fastest_plan_with_a_fidelity() -> None:
    calibration = calibrate(sample, Denoiser().eval(), psnr=60.0)
    best: dict[int, float] = {}
    for each in calibration.measured:
        best[each.num_computed] = max(best.get(each.num_computed, 0.0), each.mean)
    taken = len(calibration.chosen.computed)
    assert 2 < taken < NUM_STEPS
    assert best[taken] >= 60 > best[taken - 1]


def test_below_the_floor_the_fastest_plan_above_it_is_taken() -> None:
    with pytest.warns(UserWarning, match=r"calls=3: expected 60 dB or more, found .* at best"):
        calibration = calibrate(sample, Denoiser().eval(), calls=3, floor=60.0)
    taken = next(m for m in calibration.measured if m.candidate == calibration.chosen)
    assert taken.num_computed > 3 and taken.mean >= 60


def test_fewer_calls_than_any_plan_has() -> None:
    with pytest.warns(UserWarning, match=r"calls=1: expected 30 dB or more, found no plan"):
        calibration = calibrate(sample, Denoiser().eval(), calls=1, floor=30.0)
    assert len(calibration.chosen.computed) > 1


def test_a_fidelity_that_only_the_full_generation_has() -> None:
    with pytest.warns(UserWarning, match="but the full generation"):
        calibration = calibrate(sample, Denoiser().eval(), psnr=500.0)
    assert not calibration.schedule().reuses


# ---- pipelines ----


def sample_loop(pipe: Any, seed: int) -> Tensor:
    _, *texts = loop_call()
    latents = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return pipe(12, latents, *texts)


def test_a_pipeline_is_calibrated_and_left_as_it_was() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = Loop(scheduler, transformer=make_denoiser())
    before = {**vars(pipe)}, {**vars(pipe.transformer)}, sample_loop(pipe, 0)
    calibration = calibrate(sample_loop, pipe, calls=6)
    assert vars(pipe) == before[0] and vars(pipe.transformer).keys() == before[1].keys()
    assert "step" not in vars(scheduler)
    assert torch.equal(sample_loop(pipe, 0), before[2])
    assert calibration.num_steps == 12 and len(calibration.recording.branches) == 2
    taken = next(m for m in calibration.measured if m.candidate == calibration.chosen)
    with pabc.compile_pipeline(pipe, calibration.schedule(), backend="original") as fast:
        found = decibels([before[2]], [sample_loop(fast, 0)])
    assert found == pytest.approx(taken.mean, abs=1e-3)


def test_experts_share_no_history() -> None:
    pipe = Loop(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make_denoiser(),
        transformer_2=make_denoiser(1),
    )

    def two_experts(pipe: Any, seed: int) -> Tensor:
        _, *texts = loop_call()
        latents = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
        names = ["transformer"] * 5 + ["transformer_2"] * 7
        return pipe(12, latents, *texts, model_of=names.__getitem__)

    calibration = calibrate(two_experts, pipe, calls=6)
    assert calibration.recording.starts == (0, 5)
    assert all(5 in each.candidate.computed for each in calibration.measured)


# ---- what was run is not run again ----


def test_notes_resume(tmp_path: Path) -> None:
    notes, model = tmp_path / "notes.npz", Denoiser().eval()
    first = calibrate(sample, model, calls=8, seeds=(0, 1), candidates=3, resume=notes)
    model.count_calls()
    again = calibrate(sample, model, calls=8, seeds=(0, 1), candidates=3, resume=notes)
    assert model.count_calls() == 3, "the first steps, to compare them"
    assert again.chosen == first.chosen and str(again) == str(first)
    more = calibrate(sample, model, calls=9, seeds=(0, 1), candidates=1, resume=notes)
    assert model.count_calls() == 3 + 2 * 9
    assert {m.num_computed for m in more.measured} == {8, 9}


def test_an_interrupted_calibration_resumes(tmp_path: Path) -> None:
    notes, model, calls = tmp_path / "notes.npz", Denoiser().eval(), []

    def fails_at_third(given: Any, seed: int) -> Tensor:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(given, seed)

    with pytest.raises(KeyboardInterrupt):
        calibrate(fails_at_third, model, calls=8, candidates=3, resume=notes)
    resumed = calibrate(fails_at_third, model, calls=8, candidates=3, resume=notes)
    assert len(calls) == 3 + 1 + 2  # of four generations, two were kept; one is compared
    assert resumed.chosen == calibrate(sample, model, calls=8, candidates=3).chosen


def test_notes_of_another_model_are_refused(tmp_path: Path) -> None:
    model, other = Denoiser().eval(), Denoiser().eval()
    with torch.no_grad():
        other.weight[3, 3] += 1
    calibrate(sample, model, calls=8, candidates=1, resume=tmp_path / "notes.npz")
    with pytest.raises(ValueError, match="resume: expected notes of this model"):
        calibrate(sample, other, calls=8, candidates=1, resume=tmp_path / "notes.npz")


def test_damaged_notes_are_refused(tmp_path: Path) -> None:
    notes, model = tmp_path / "notes.npz", Denoiser().eval()
    calibrate(sample, model, calls=8, candidates=1, resume=notes)
    refused = list[str]()
    for damaged in damage(notes.read_bytes(), 200):
        notes.write_bytes(damaged)
        try:
            Notes.open(fingerprint(model), notes)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 150 and all(str(notes) in each for each in refused)


# ---- generations that are not what they should be ----


def test_noise_that_does_not_follow_from_the_seed_is_refused() -> None:
    def unseeded(model: Any, seed: int) -> Tensor:
        return sample(model, int(torch.randint(1 << 30, ())))

    with pytest.raises(ValueError, match="the same inputs at step 0 whenever the seed is 0"):
        calibrate(unseeded, Denoiser().eval(), calls=8)


def test_random_numbers_of_a_sampler_are_warned_of() -> None:
    def stochastic(model: Any, seed: int) -> Tensor:
        latents = draw_noise(seed)
        for timestep in TIMESTEPS:
            latents = latents - model(latents, timestep=timestep) / NUM_STEPS
            latents = latents + 0.1 * torch.randn(latents.shape)
        return latents

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(stochastic, Denoiser().eval(), calls=8)
    texts = [str(each.message) for each in caught]
    assert sum("two generations with seed 0 differ at step 1" in text for text in texts) == 1
    assert sum("it adds noise, clips, or rescales" in text for text in texts) == 1


def test_calls_without_names_in_one_step_are_refused() -> None:
    def unnamed(model: Any, seed: int) -> Tensor:
        latents = draw_noise(seed)
        for timestep in TIMESTEPS:
            text = torch.linspace(-1, 1, 8)
            both = [model(latents, timestep=timestep, text=text * k) for k in (1, 2)]
            latents = latents - sum(both) / NUM_STEPS
        return latents

    with pytest.raises(ValueError, match=r"a name for each of several calls .*cache_context"):
        calibrate(unnamed, Denoiser().eval(), calls=8)


def test_a_model_of_zeros_is_refused() -> None:
    model = Denoiser().eval()
    with torch.no_grad():
        model.register_forward_hook(lambda module, args, output: output * 0)
    for run_full in (sample, sample_guided):
        with pytest.raises(ValueError, match=r"latents: expected .*, and 0 in every call"):
            calibrate(run_full, model, calls=8)


def test_two_generations_in_one_are_refused() -> None:
    def twice(model: Any, seed: int) -> Tensor:
        return sample(model, seed) + sample(model, seed + 1)

    with pytest.raises(ValueError, match="found that another begins after 16 steps"):
        calibrate(twice, Denoiser().eval(), calls=8)


def test_a_sample_that_does_not_use_the_model_is_refused() -> None:
    other = copy.deepcopy(Denoiser()).eval()
    with pytest.raises(ValueError, match="expected it to call the model that it is given"):
        calibrate(lambda model, seed: sample(other, seed), Denoiser().eval(), calls=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of speedup, psnr and calls, found none"),
        ({"speedup": 0.5}, "speedup: expected a number of 1 or more, found 0.5"),
        ({"calls": 2.5}, "calls: expected an integer of 1 or more, found 2.5"),
        ({"psnr": "high"}, "psnr: expected a number of dB above 0, found 'high'"),
        ({"calls": 8, "seeds": ()}, "seeds: expected one integer or more"),
        ({"calls": 8, "candidates": 0}, "candidates: expected 1 or more, found 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(sample, Denoiser().eval(), **options)


def test_bad_models_and_results_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, or a pipeline"):
        calibrate(sample, 3, calls=8)
    with pytest.raises(TypeError, match="sample: expected it to return a tensor, an array"):
        calibrate(lambda model, seed: str(sample(model, seed)), Denoiser().eval(), calls=8)
