"""Growth of errors: what is expected from the noise in the latents, and of the first steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vectors import record_outputs

from pabc.calibration.growth import amplify_early, expect_growth
from pabc.calibration.recording import Recorder, Recording


def record_flow(noise: list[float], *, has_result: bool = True) -> Recording:
    """Records latents with these shares of noise."""
    random = np.random.default_rng(0)
    start, data = (torch.as_tensor(random.normal(size=300)) for _ in range(2))
    recorder, latents = Recorder(), [share * start + (1 - share) * data for share in noise]
    for step, x in enumerate(latents[:-1]):
        recorder.add_input(step, x)
        recorder.add_output("a", step, x)
    return recorder.finish(range(len(noise) - 1), latents[-1] if has_result else None)


def test_errors_are_expected_to_shrink_with_the_noise() -> None:
    noise = [1.0, 0.9, 0.6, 0.3, 0.0]
    growth = expect_growth(record_flow(noise), floor=0.05)
    np.testing.assert_allclose(growth, 0.05 / np.hypot(noise[1:], 0.05), rtol=1e-6)
    unknown = expect_growth(record_flow([*noise, -1.0], has_result=False), floor=0.05)
    np.testing.assert_allclose(unknown[:4], growth, rtol=1e-6)
    assert unknown[4] == 1.0


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_constant_latents_have_finite_growth(num_steps: int, value: float) -> None:
    growth = expect_growth(record_outputs(np.full((num_steps, 5), value)))
    assert np.isfinite(growth).all() and (growth > 0).all()


def test_early_errors_count_more() -> None:
    growth = amplify_early(50)
    assert growth[0] == 4.0
    assert (np.diff(growth) < 0).all()
    assert growth[25] < 1.05
