"""pabc.auto: the first generation is computed and recorded, later ones follow its plan."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage
from sampling_loops import Loop, compile_auto, make_denoiser, plan_of, run
from torch import Tensor, nn

import pabc
from pabc.automatic.store import default_folder

FORMS = ("one", "batched", "named", "unnamed")


@pytest.mark.parametrize("backend", ["original", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_the_second_generation_follows_the_plan(form: str, backend: str) -> None:
    loop, model = Loop(form), make_denoiser()
    fast = compile_auto(model, backend=backend)
    branches = 2 if form in ("named", "unnamed") else 1
    first, stats = run(fast, loop, 0)
    assert torch.equal(first, loop(model, 0)), "the first generation is computed in full"
    assert stats.reused == 0 and stats.recorded == 0
    assert "no generation of this kind is recorded yet" in stats.plan_source
    second, stats = run(fast, loop, 1)
    assert stats.recorded == 1 and stats.reused == 5 * branches
    assert stats.calls == 24 * branches, "plans that were tried are not counted"
    assert "calls=7: computes 7 of 12 steps" in stats.plan_source
    assert "recorded in this process" in stats.plan_source
    expected = loop.by_hand(model, 1, plan_of(fast))
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)
    third, stats = run(fast, loop, 2)
    assert stats.recorded == 1 and stats.reused == 10 * branches
    full = loop(model, 2)
    error = (third - full).square().mean().sqrt()
    assert 0 < error < 0.05 * full.std()
    assert not stats.fallbacks
    assert f"plan: {stats.plan_source}" in str(fast.explain())


@pytest.mark.parametrize("order", [1, 2])
def test_multistep_samplers(order: int) -> None:
    loop, model = Loop("named", order=order), make_denoiser()
    fast = compile_auto(model)
    run(fast, loop, 0)
    found, stats = run(fast, loop, 1)
    assert stats.recorded == 1 and stats.reused == 10
    full = loop(model, 1)
    assert 0 < (found - full).square().mean().sqrt() < 0.05 * full.std()


def test_another_guidance_scale_is_recorded_anew() -> None:
    loop, model = Loop("batched"), make_denoiser()
    other = loop.but(guidance=5.0)
    fast = compile_auto(model)
    run(fast, loop, 0)
    run(fast, loop, 1)
    with torch.no_grad():
        changed = other(fast, 2)
    assert "found at step 1 latents that differ" in fast.stats.plan_source
    torch.testing.assert_close(changed, other(model, 2), rtol=1e-5, atol=1e-6)
    run(fast, other, 3)  # recorded
    reused = fast.stats.reused
    run(fast, other, 4)
    assert fast.stats.recorded == 2 and fast.stats.reused == reused + 5
    run(fast, loop, 5)
    assert fast.stats.recorded == 2 and fast.stats.reused == reused + 10, "both plans are known"


@pytest.mark.parametrize("change", [{"order": 2}, {"num_steps": 9}, {"num_steps": 15}])
def test_another_sampler_or_number_of_steps(change: dict[str, Any]) -> None:
    loop, model = Loop(), make_denoiser()
    other = loop.but(**change)
    fast = compile_auto(model)
    run(fast, loop, 0)
    run(fast, loop, 1)
    for seed in (2, 3, 4):
        found, stats = run(fast, other, seed)
    assert stats.recorded == 2
    full = other(model, 4)
    assert 0 < (found - full).square().mean().sqrt() < 0.1 * full.std()


def test_other_weights_and_shapes_may_use_the_plan() -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model)
    run(fast, loop, 0)
    run(fast, loop, 1)
    _, stats = run(fast, loop.but(clips=3), 2)
    assert stats.recorded == 1 and stats.reused == 10
    assert "with other shapes" in stats.plan_source
    with torch.no_grad():
        model.mix.weight.mul_(1.01)
    _, stats = run(fast, loop, 3)
    assert stats.recorded == 1 and stats.reused == 15
    assert "with other weights" in stats.plan_source


def test_a_generation_that_raises_or_stops_is_not_planned() -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        fast(torch.randn(2, 6, 4), torch.full((2,), 1000.0), text=torch.randn(2, 9))
    run(fast, loop, 0)
    run(fast, loop, 1)
    assert fast.stats.recorded == 1
    x, t, text = torch.randn(2, 6, 4), torch.full((2,), 1000.0), torch.randn(2, 3)
    with torch.no_grad():
        fast(x, t, text=text)  # begins a generation, and leaves it
    found, stats = run(fast, loop, 2)
    torch.testing.assert_close(found, loop.by_hand(model, 2, plan_of(fast)))
    assert stats.recorded == 1


def test_trajectories_record_and_follow_apart() -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model)
    with fast.trajectory():
        run(fast, loop, 0)
    with fast.trajectory():
        found, stats = run(fast, loop, 1)
        plan = plan_of(fast)
    assert stats.recorded == 1 and stats.reused == 5
    torch.testing.assert_close(found, loop.by_hand(model, 1, plan))


def test_reset_ends_a_generation() -> None:
    fast = compile_auto(make_denoiser())
    run(fast, Loop(), 0)
    fast.reset()
    run(fast, Loop(), 1)
    assert fast.stats.recorded == 1 and fast.stats.reused == 5


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(inference: bool) -> None:
    fast, loop = compile_auto(make_denoiser()), Loop("named")
    with torch.inference_mode(inference), torch.no_grad():
        for seed in range(2):
            loop(fast, seed)
    assert fast.stats.recorded == 1 and fast.stats.reused == 10


def test_targets_and_the_floor() -> None:
    loop, model = Loop(num_steps=20), make_denoiser()
    fast = compile_auto(model, psnr=60.0)
    run(fast, loop, 0)
    found, stats = run(fast, loop, 1)
    full = loop(model, 1)
    peak = float(full.max() - full.min())
    psnr = 20 * torch.log10(peak / (found - full).square().mean().sqrt())
    assert psnr > 50 and stats.reused > 2
    fast = pabc.compile(model, pabc.auto(calls=3, floor=90.0, cache=False), backend="original")
    run(fast, loop, 0)
    with pytest.warns(UserWarning, match=r"calls=3: expected 90 dB or more, found .* dB at best"):
        run(fast, loop, 1)
    assert fast.stats.reused < 17


def test_too_few_steps_and_models_without_latents() -> None:
    fast = compile_auto(make_denoiser())
    for seed in range(3):
        run(fast, Loop(num_steps=3), seed)
    assert fast.stats.recorded == 0 and fast.stats.reused == 0
    assert "had 3 steps: there is nothing to skip in fewer than 4" in fast.stats.plan_source
    fast = compile_auto(make_denoiser())
    for seed in range(3):
        run(fast, Loop(num_steps=1), seed)
    assert "no argument has changed as a timestep does in 3 steps" in fast.stats.plan_source
    fast.reset()
    assert fast.stats.reused == 0

    class Sum(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return x.sum() + timestep.sum() + text.sum()

    fast = compile_auto(Sum().eval())
    run(fast, Loop(num_steps=5), 0)
    with pytest.warns(UserWarning, match="all steps are computed, since latents: expected"):
        run(fast, Loop(num_steps=5), 1)
    assert fast.stats.reused == 0 and "all steps are computed" in fast.stats.plan_source


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_zeros_is_told_of(form: str) -> None:
    """As one whose last layer is initialized with zeros."""
    model = make_denoiser()
    model.register_forward_hook(lambda module, args, output: output * 0)
    fast = compile_auto(model)
    run(fast, Loop(form), 0)
    with pytest.warns(UserWarning, match="found none; the outputs are .*, and 0 in every call"):
        run(fast, Loop(form), 1)
    assert "and 0 in every call" in fast.stats.plan_source


def test_two_numbers_of_steps_in_turn() -> None:
    model = make_denoiser()
    fast = compile_auto(model)
    for seed in range(8):
        loop = Loop(num_steps=(12, 20)[seed % 2])
        found, stats = run(fast, loop, seed)
        reused = 0 if seed < 2 else sum((5, 13)[i % 2] for i in range(2, seed + 1))
        assert stats.reused == reused, f"generation {seed}: {stats.plan_source}"
    full = loop(model, seed)
    assert 0 < (found - full).square().mean().sqrt() < 0.1 * full.std()


def test_latents_that_something_else_changes_do_not_end_the_check() -> None:
    loop, model = Loop("named"), make_denoiser()
    fast = compile_auto(model)
    run(fast, loop, 0)
    run(fast, loop, 1)

    class Disturbed(Loop):
        def guide(self, model: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            disturbed = x + torch.randn(x.shape) if 800 < float(t[0]) < 900 else x
            return super().guide(model, disturbed, t, text)

    run(fast, Disturbed("named"), 2)
    run(fast, loop, 3)
    other = loop.but(guidance=9.0)
    found, _ = run(fast, other, 4)
    torch.testing.assert_close(found, other(model, 4), rtol=1e-5, atol=1e-6)


def calls_of(loop: Loop, model: nn.Module, seed: int) -> list[tuple[Any, Any]]:
    """Returns the arguments of each call of a generation."""
    kept = []

    def call(*args: Any, **kwargs: Any) -> Tensor:
        kept.append((args, kwargs))
        return model(*args, **kwargs)

    loop(call, seed)
    return kept


def test_generations_in_turn_without_trajectories() -> None:
    model, loop = make_denoiser(), Loop()
    fast = compile_auto(model)
    calls = [calls_of(loop, model, seed) for seed in range(2)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for pair in zip(*calls, strict=True):
                for args, more in pair:
                    assert torch.equal(fast(*args, **more), model(*args, **more))
    assert "needs a trajectory of its own" in fast.stats.plan_source


def test_schedules_that_are_set_are_followed() -> None:
    model, loop = make_denoiser(), Loop()
    fast = compile_auto(model)
    run(fast, loop, 0)
    run(fast, loop, 1)
    none = pabc.Schedule.none((1000 * torch.linspace(1, 0, 13)[:-1]).tolist())
    with fast.trajectory(none):
        assert torch.equal(run(fast, loop, 2)[0], loop(model, 2))
    _, stats = run(fast, loop, 3)
    assert stats.reused == 10, "the others follow the plan as before"
    fast.schedule = none
    found, stats = run(fast, loop, 4)
    assert torch.equal(found, loop(model, 4))
    assert stats.plan_source == "the schedule that was given"


def test_what_is_held_is_bounded() -> None:
    model = make_denoiser()
    fast = compile_auto(model)
    x, text = torch.randn(2, 6, 4), torch.randn(2, 3)
    with torch.no_grad():
        for i in range(64):
            fast(x + i, torch.tensor([900.0, 100.0]), text=text)
        with pytest.warns(UserWarning, match="no argument changes as a timestep does"):
            fast(x, torch.tensor([900.0, 100.0]), text=text)


def test_outputs_that_are_not_finite() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return x / (timestep > 100).float()[:, None, None] + text.sum()

    model = Overflow().eval()
    fast = compile_auto(model)
    run(fast, Loop(), 0)
    with pytest.warns(UserWarning, match="all steps are computed, since .* finite"):
        found, _ = run(fast, Loop(), 1)
    torch.testing.assert_close(found, Loop()(model, 1), equal_nan=True)


def test_errors_while_plans_are_tried_lose_nothing() -> None:
    """A model that keeps state cannot be skipped; its results are those of eager mode."""

    class Counting(nn.Module):
        count = 0

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            self.count += 1
            return torch.tanh(x) + text.sum() / 9 + timestep.mean() / 1000

    model = Counting().eval()
    fast = compile_auto(model)
    run(fast, Loop(), 0)
    with pytest.warns(UserWarning, match="no plan could be made: .* leave nothing behind"):
        found, _ = run(fast, Loop(), 1)
    assert torch.equal(found, Loop()(model, 1))
    for seed in range(2, 5):
        assert torch.equal(run(fast, Loop(), seed)[0], Loop()(model, seed))
    assert fast.stats.reused == 0


def test_samplers_that_are_not_linear_are_told_of() -> None:
    class Noisy(Loop):
        def guide(self, model: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return super().guide(model, x, t, text) + torch.randn(x.shape)

    fast = compile_auto(make_denoiser())
    run(fast, Noisy(), 0)
    with pytest.warns(UserWarning, match="does not follow from the model's outputs"):
        run(fast, Noisy(), 1)


def test_half_precision_is_not_promised_more_than_it_has() -> None:
    model, loop = make_denoiser().to(torch.bfloat16), Loop(num_steps=20, clips=16)
    fast = compile_auto(model, psnr=65.0)
    half = loop.but(dtype=torch.bfloat16)
    run(fast, half, 0)
    found, stats = run(fast, half, 0)
    full = half(model, 0).double()
    error = (found.double() - full).square().mean().sqrt()
    said = float(stats.plan_source.partition(" dB when")[0].split()[-1])
    assert abs(20 * torch.log10((full.max() - full.min()) / error) - said) < 4


def test_plans_below_the_floor_are_not_taken_from_the_folder(tmp_path: Path) -> None:
    model = make_denoiser()
    fast = compile_auto(model, cache=tmp_path, calls=4, floor=5.0)
    run(fast, Loop(), 0)
    fast.reset()
    assert fast.stats.recorded == 1 and len(list(tmp_path.rglob("*.json"))) == 1
    for floor, reused in ((5.0, 8), (20.0, 8), (150.0, 0)):
        fast = compile_auto(model, cache=tmp_path, calls=4, floor=floor)
        assert run(fast, Loop(), 1)[1].reused == reused


def test_other_models_of_one_class_have_other_plans(tmp_path: Path) -> None:
    fast = compile_auto(make_denoiser(), cache=tmp_path)
    run(fast, Loop(), 0)
    fast.reset()
    other = make_denoiser()
    other.more = nn.Linear(2, 2)
    assert run(compile_auto(other, cache=tmp_path), Loop(), 1)[1].reused == 0


PROCESS = """
import sys, json, torch, pabc
sys.path.insert(0, sys.argv[1])
from sampling_loops import Loop, compile_auto, make_denoiser, plan_of, run
fast = pabc.compile(make_denoiser(), pabc.auto(calls=7, floor=5), backend="original")
sums = []
with torch.no_grad():
    for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 2):
        sums.append(float(Loop()(fast, seed).sum()))
print(json.dumps([fast.stats.recorded, fast.stats.reused, fast.stats.plan_source, sums]))
"""


def test_another_process_starts_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PABC_CACHE", str(tmp_path))
    assert default_folder() == tmp_path

    def run_process() -> list[Any]:
        command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        return json.loads(done.stdout.splitlines()[-1])

    recorded, reused, source, sums = run_process()
    assert (recorded, reused) == (1, 5) and "in this process" in source
    again, reused, source, others = run_process()
    assert (again, reused) == (0, 10) and str(tmp_path) in source and "recorded on" in source
    assert others[1] == pytest.approx(sums[1], rel=1e-4)
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 1
    calibration = pabc.Calibration.load(files[0])
    assert calibration.num_steps == 12 and len(calibration.chosen.computed) == 7


def test_the_plan_is_saved_with_the_code(tmp_path: Path) -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model, backend="inductor")
    run(fast, loop, 0)
    with pytest.raises(pabc.ArtifactError, match="expected a plan to save, found none yet"):
        fast.save(tmp_path / "model.pabc")
    fast.reset()
    found, _ = run(fast, loop, 1)
    fast.save(tmp_path / "model.pabc")
    loaded = pabc.load(tmp_path / "model.pabc", model)
    again, stats = run(loaded, loop, 1)
    assert stats.reused == 5 and stats.captures == 0
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)


def test_damaged_and_foreign_files_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model, cache=tmp_path)
    run(fast, loop, 0)
    run(fast, loop, 1)
    (file,) = tmp_path.rglob("*.json")
    whole = json.loads(file.read_text())
    cut = json.dumps({**whole, "calls": whole["calls"][:3]})
    for text in ("{", "{}", '{"version": 99}', cut):
        file.write_text(text)
        fast = compile_auto(model, cache=tmp_path)
        run(fast, loop, 0)
        assert fast.stats.reused == 0
    assert "is left out" in caplog.text


def test_a_generation_is_not_lost_to_a_damaged_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model, cache=tmp_path)
    run(fast, loop, 0)
    fast.reset()
    for file in (next(tmp_path.rglob("*.npz")), next(tmp_path.rglob("*.json"))):
        whole = file.read_bytes()
        for damaged in damage(whole):
            file.write_bytes(damaged)
            found, stats = run(compile_auto(model, cache=tmp_path), loop, 0)
            if stats.reused == 0:
                assert f"{file}: expected a " in caplog.text
                assert torch.equal(found, loop(model, 0))
            caplog.clear()
        file.write_bytes(whole)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of speedup, psnr and calls, found"):
        pabc.auto(2.0, calls=3)
    with pytest.raises(ValueError, match="speedup: expected a number of 1 or more, found 0"):
        pabc.auto(0.5)
    with pytest.raises(ValueError, match="candidates: expected 1 or more, found 0"):
        pabc.auto(candidates=0)
    with pytest.raises(ValueError, match="calls: expected an integer of 1 or more, found inf"):
        pabc.auto(calls=float("inf"))
    with pytest.raises(ValueError, match="floor: expected a number of dB, found nan"):
        pabc.auto(floor=float("nan"))
    with pytest.raises(ValueError, match="cache: expected a folder, True or False, found None"):
        pabc.auto(cache=None)
    assert str(pabc.auto()) == "auto(speedup=2)"
