"""Results of generations as numbers, their PSNR, targets, and speedups from seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pabc.calibration.costs import Costs
from pabc.calibration.results import as_tensors, decibels
from pabc.calibration.target import Target

NUMBERS = torch.tensor([[0.0, 1.0], [2.0, 4.0]])


@dataclass
class Output:
    images: Any
    flagged: Any = None


@pytest.mark.parametrize(
    "result",
    [
        NUMBERS,
        NUMBERS.half().requires_grad_(False),
        NUMBERS.to(torch.uint8),
        NUMBERS.numpy(),
        NUMBERS.double().numpy(),
        (NUMBERS, [False]),
        {"images": NUMBERS, "name": "x", "seconds": 3.0},
        Output(NUMBERS.requires_grad_()),
        Output([NUMBERS], torch.tensor([True])),
    ],
)
def test_results_are_found_in_containers(result: Any) -> None:
    (found,) = as_tensors(result)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, NUMBERS)


def test_pictures_and_outputs_of_pipelines() -> None:
    image = pytest.importorskip("PIL.Image")
    outputs = pytest.importorskip("diffusers.utils")

    @dataclass
    class PipelineOutput(outputs.BaseOutput):
        images: Any

    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    pictures = [image.fromarray(pixels), image.fromarray(pixels + 1)]
    found = as_tensors(PipelineOutput(pictures))
    assert [t.tolist() for t in found] == [pixels.tolist(), (pixels + 1).tolist()]


def test_results_without_finite_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a result of finite numbers, found none in \(0"):
        as_tensors([NUMBERS[:0], NUMBERS[:0]])
    assert len(as_tensors([NUMBERS, NUMBERS[:0]])) == 2
    with pytest.raises(TypeError, match="found NoneType without any"):
        as_tensors(None)
    with pytest.raises(ValueError, match="found NaN or infinity"):
        as_tensors([NUMBERS, torch.tensor(math.nan)])


def test_decibels_over_all_numbers_of_a_result() -> None:
    """An error of 0.04 on half of the numbers, whose range is 4, is 40 dB and 3 for the half."""
    full = [NUMBERS, NUMBERS / 2]
    assert decibels(full, full) == math.inf
    found = decibels(full, [NUMBERS + 0.04, NUMBERS / 2])
    assert found == pytest.approx(40 + 10 * math.log10(2), abs=1e-3)
    with pytest.raises(ValueError, match=r"expected a result of shapes \[\(2, 2\)\]"):
        decibels([NUMBERS], [NUMBERS[:1]])


def test_speedups_from_seconds() -> None:
    costs = Costs(full=10.0, skipped=1.0)
    assert costs.speedup(50, 50) == 1
    assert costs.speedup(50, 20) == pytest.approx(500 / 230)
    assert costs.most_computed(50, 2.0) == 22  # 250 seconds, of which 28 are forecasts
    assert costs.most_computed(50, 1.0) == 50
    assert costs.most_computed(50, 9.0) == 0
    assert Costs().most_computed(50, 2.0) == 25
    assert Costs.of([5.0, 1.0, 2.0, 3.0, 4.0], [0.5]) == Costs(2.0, 0.5)
    assert Costs.of([], []) == Costs()


def test_targets() -> None:
    assert Target.of(speedup=2, psnr=None) == Target("speedup", 2.0)
    several = Target.all_of(speedup=(1.5, 2), calls=np.array([17]))
    assert [str(target) for target in several] == ["speedup=1.5", "speedup=2", "calls=17"]
    with pytest.raises(ValueError, match="expected one of speedup, psnr and calls, found speedup"):
        Target.of(speedup=(1, 2))
    with pytest.raises(ValueError, match="calls: expected an integer of 1 or more, found True"):
        Target.of(calls=True)
