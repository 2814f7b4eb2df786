"""Recordings: inner products of all inputs and outputs, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pabc.calibration.recording import Recorder, Recording, multiply


def record(seed: int, *, result: bool = True, steps: int = 3) -> tuple[Recording, torch.Tensor]:
    """Records random vectors of two branches; returns them too, in the order of the matrix."""
    torch.manual_seed(seed)
    rows = torch.randn(steps + 1 + 2 * steps, 2, 5)
    recorder = Recorder()
    for i in range(steps):
        recorder.add_input(i, rows[i])
        recorder.add_output("cond", i, rows[steps + 1 + i])
        recorder.add_output("uncond", i, rows[2 * steps + 1 + i])
    return recorder.finish(range(steps), rows[steps] if result else None), rows.flatten(1)


def test_products_of_all_pairs() -> None:
    found, rows = record(0)
    expected = (rows.double() @ rows.double().T).numpy()
    np.testing.assert_allclose(found.gram, expected, rtol=1e-12)
    np.testing.assert_allclose(found.inputs(), expected[:4, :4])
    np.testing.assert_allclose(found.outputs(0, 1), expected[4:7, 7:])
    assert found.branches == ("cond", "uncond") and found.elements == 10
    assert found.peak == pytest.approx(float(rows[3].max() - rows[3].min()))


def test_an_unknown_result() -> None:
    found, rows = record(0, result=False)
    assert not found.has_result and record(0)[0].has_result
    assert np.isnan(found.gram[3]).all() and np.isfinite(found.outputs(1, 1)).all()
    assert found.peak == pytest.approx(float(rows[2].max() - rows[2].min()))


def test_sums_of_several() -> None:
    (one, _), (other, _) = record(0), record(1)
    both = one + other
    np.testing.assert_allclose(both.gram, one.gram + other.gram)
    assert both.count == 2 and both.peak == max(one.peak, other.peak)
    with pytest.raises(ValueError, match=r"timesteps: expected \(0.0, 1.0, 2.0\) as before"):
        one + record(0, steps=2)[0]


def test_arrays_there_and_back() -> None:
    found, _ = record(0)
    again = Recording.from_arrays(found.to_arrays())
    np.testing.assert_array_equal(again.gram, found.gram)
    assert (again.timesteps, again.branches) == (found.timesteps, found.branches)
    assert (again.count, again.elements, again.peak) == (1, 10, found.peak)


def test_small_differences_survive_in_half_precision() -> None:
    """The error of a forecast is a difference of nearly equal products."""
    torch.manual_seed(0)
    base = torch.randn(200_000).bfloat16()
    near = (base.float() * (1 + 2**-7)).bfloat16()
    gram = multiply([(base,), (near,)])
    difference = (near.double() - base.double()).square().sum().item()
    assert gram[0, 0] - 2 * gram[0, 1] + gram[1, 1] == pytest.approx(difference, rel=1e-9)


def test_vectors_of_several_tensors_and_missing_ones() -> None:
    torch.manual_seed(0)
    video, sound = torch.randn(2, 3), torch.randn(2, 4)
    gram = multiply([(video[0], sound[0]), None, (video[1], sound[1])])
    rows = torch.cat([video, sound], 1).double()
    np.testing.assert_allclose(gram[[0, 2]][:, [0, 2]], (rows @ rows.T).numpy())
    assert not gram[1].any() and not gram[:, 1].any()


def test_what_is_refused() -> None:
    recorder = Recorder()
    recorder.add_input(0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected one at each of 2 steps, found none at \[1\]"):
        recorder.finish([1, 0])
    with pytest.raises(ValueError, match=r"expected as many elements in each, found \[2, 3\]"):
        multiply([(torch.zeros(2),), (torch.zeros(3),)])
    with pytest.raises(ValueError, match=r"gram: expected shape \(5, 5\)"):
        Recording((1.0, 0.0), ("a",), np.zeros((3, 3)))
