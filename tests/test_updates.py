"""The sampler is identified from inner products alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from vectors import make_model, record_outputs, sample

from pabc.calibration.recording import Recorder, Recording
from pabc.calibration.updates import identify

SAMPLERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DDIM v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "flow Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "DPM-Solver++ 2M": lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "DPM-Solver++ 2M flow": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "DPM-Solver++ 3M": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "UniPC": lambda: UniPCMultistepScheduler(prediction_type="v_prediction"),
    "DEIS": lambda: DEISMultistepScheduler(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SAMPLERS)
def test_transitions_follow_from_the_coefficients(name: str, dtype: torch.dtype) -> None:
    recording, latents = sample(SAMPLERS[name](), dtype=dtype)
    updates = identify(recording)
    assert updates.residual.max() < 1e-4
    outputs = rerun(recording, latents)
    n = recording.num_steps
    for i in range(n):
        lags = range(min(3, i + 1))
        found = sum(updates.inputs[i, lag] * latents[i - lag].double() for lag in lags)
        for b in range(2):
            found = found + sum(updates.outputs[i, b, lag] * outputs[b][i - lag] for lag in lags)
        size = (latents[i + 1] - latents[i]).double().norm()
        assert (latents[i + 1].double() - found).norm() < 1e-3 * size


@pytest.mark.parametrize("guidance", [1.5, 3.5, 7.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_is_recovered(name: str, guidance: float) -> None:
    recording, _ = sample(SAMPLERS[name](), guidance=guidance, dtype=torch.float32)
    shares = identify(recording).shares()
    np.testing.assert_allclose(shares, [[guidance, 1 - guidance]] * len(shares), atol=1e-3)


def test_single_steps_have_no_lags() -> None:
    for name in ("DDIM v", "flow Euler"):
        updates = identify(sample(SAMPLERS[name]())[0])
        assert not updates.inputs[:, 1:].any()
        assert not updates.outputs[:, :, 1:].any()


def test_coefficients_of_flow_are_differences_of_sigma() -> None:
    scheduler = SAMPLERS["flow Euler"]()
    updates = identify(sample(scheduler)[0])
    np.testing.assert_allclose(updates.direct, np.diff(scheduler.sigmas.numpy()), rtol=1e-5)
    np.testing.assert_allclose(updates.own, 1.0, atol=1e-5)
    np.testing.assert_allclose(updates.propagated(), updates.direct, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_propagated_coefficients_are_those_of_the_sampler(name: str) -> None:
    """One output is changed, and the sampler runs on with the other outputs as they were."""
    recording, latents = sample(SAMPLERS[name]())
    outputs = rerun(recording, latents)
    change = torch.randn_like(latents[0])
    for changed in (0, 4, recording.num_steps - 2):
        scheduler = SAMPLERS[name]()
        scheduler.set_timesteps(12)
        x = latents[0]
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            guided = outputs[1][step] + 3.5 * (outputs[0][step] - outputs[1][step])
            guided = guided + change * (step == changed)
            x = scheduler.step(guided, timestep, x, return_dict=False)[0]
        true = float(((x - latents[-1]) * change).sum() / change.square().sum())
        found = identify(recording).propagated()[changed]
        assert found == pytest.approx(true, rel=1e-2, abs=1e-6)


def test_changing_guidance_is_kept_per_step() -> None:
    recorder, random = Recorder(), np.random.default_rng(0)
    x = torch.zeros(50, dtype=torch.float64)
    for step in range(6):
        a, b = (torch.as_tensor(random.normal(size=50)) for _ in range(2))
        recorder.add_input(step, x)
        recorder.add_output("a", step, a)
        recorder.add_output("b", step, b)
        scale = 1.0 if step < 3 else 4.0
        x = 0.9 * x + 0.1 * (b + scale * (a - b))
    recording = recorder.finish(range(6), x)
    updates = identify(recording)
    expected = [[1.0, 0.0]] * 3 + [[4.0, -3.0]] * 3
    np.testing.assert_allclose(updates.shares(), expected, atol=1e-6)
    guided = updates.guided(recording)
    a, b = recording.outputs(0, 0), recording.outputs(0, 1)
    np.testing.assert_allclose(guided[0], a, atol=1e-6)
    mixed = 16 * a - 12 * (b + b.T) + 9 * recording.outputs(1, 1)
    np.testing.assert_allclose(guided[4], mixed, atol=1e-6)


def test_unknown_result_repeats_the_transition_before() -> None:
    recording, _ = sample(SAMPLERS["flow Euler"]())
    n, gram = recording.num_steps, recording.gram.copy()
    gram[n], gram[:, n] = np.nan, np.nan
    known, unknown = identify(recording), identify(replace(recording, gram=gram))
    np.testing.assert_allclose(unknown.inputs[:-1], known.inputs[:-1], atol=1e-5)
    np.testing.assert_allclose(unknown.outputs[-1], known.outputs[-2], atol=1e-5)


def test_noise_leaves_a_residual_and_no_lags() -> None:
    random = np.random.default_rng(1)
    recorder, x = Recorder(), torch.as_tensor(random.normal(size=4000))
    for step in range(8):
        output = torch.as_tensor(random.normal(size=4000))
        recorder.add_input(step, x)
        recorder.add_output("a", step, output)
        x = 0.9 * x + 0.2 * output + torch.as_tensor(random.normal(scale=0.1, size=4000))
    updates = identify(recorder.finish(range(8), x))
    assert updates.residual.min() > 0.1
    assert not updates.inputs[:, 1:].any()
    np.testing.assert_allclose(updates.own, 0.9, atol=0.02)
    np.testing.assert_allclose(updates.direct, 0.2, atol=0.02)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_constant_outputs_give_finite_coefficients(num_steps: int, value: float) -> None:
    updates = identify(record_outputs(np.full((num_steps, 30), value)))
    for array in (updates.inputs, updates.outputs, updates.residual, updates.shares()):
        assert np.isfinite(array).all()
    np.testing.assert_array_equal(updates.shares(), np.ones((num_steps, 1)))


def test_few_elements_do_not_make_a_fit_exact() -> None:
    """Ten numbers are explained by ten coefficients, whatever they are."""
    random = np.random.default_rng(2)
    recorder = Recorder()
    for step in range(8):
        recorder.add_input(step, torch.as_tensor(random.normal(size=6)))
        recorder.add_output("a", step, torch.as_tensor(random.normal(size=6)))
    updates = identify(recorder.finish(range(8), torch.as_tensor(random.normal(size=6))))
    assert not updates.inputs[:, 1:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recording: (recording, {"lags": 0}), "lags: expected a positive number, found 0"),
        (lambda recording: (spoil(recording), {}), "recording: expected finite inner products"),
    ],
)
def test_bad_values_are_refused(change: Any, message: str) -> None:
    recording, settings = change(record_outputs(np.ones((3, 5))))
    with pytest.raises(ValueError, match=message):
        identify(recording, **settings)


def spoil(recording: Recording) -> Recording:
    gram = recording.gram.copy()
    gram[0, 0] = np.nan
    return replace(recording, gram=gram)


def rerun(recording: Recording, latents: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Returns the outputs of both branches again, of `vectors.sample`."""
    model = make_model(latents[0].shape[-1])
    return [
        [
            model(x.double(), time / 1000, condition).to(x.dtype).double()
            for x, time in zip(latents, recording.timesteps, strict=False)
        ]
        for condition in (0.4, 0.0)
    ]
