"""What is left of errors: measured from runs, and expected from the noise in the latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vectors import record_outputs

from pabc.calibration.growth import amplify_early, expect_growth, measure_growth
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


def test_growth_of_a_run_of_all_steps_is_a_quotient() -> None:
    errors = np.array([2.0, 1.0, 4.0, 0.5, 0.25])
    np.testing.assert_allclose(measure_growth(errors), 0.25 / errors[1:])


def test_errors_of_skipped_steps_are_no_growth() -> None:
    """Errors halve at computed steps, and are made at skipped ones."""
    errors, computed = [0.0], (0, 1, 3, 4, 6, 7)
    for step in range(8):
        errors.append(errors[-1] / 2 if step in computed else errors[-1] / 2 + 3.0)
    growth = measure_growth(np.array(errors), computed)
    np.testing.assert_allclose(growth, 0.5 ** np.arange(7, -1, -1.0))


def test_without_errors_nothing_grows() -> None:
    np.testing.assert_array_equal(measure_growth(np.zeros(5), (0, 2, 3)), np.ones(4))
    assert np.isfinite(measure_growth(np.array([0.0, 1e-300, 1e300, 1.0]))).all()


@pytest.mark.parametrize("errors", [[1.0], [1.0, -1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_bad_norms_are_refused(errors: list[float]) -> None:
    with pytest.raises(ValueError, match="errors: expected"):
        measure_growth(np.array(errors))


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
