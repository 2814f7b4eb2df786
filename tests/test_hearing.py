"""What is found in the calls of a generation, and runs of it under a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pabc.base.structure import flatten
from pabc.calibration.hearing import HeardGeneration, Hearing
from pabc.calibration.replay import Replay
from pabc.calibration.updates import Updates

STEPS = 5
SIGMAS = torch.linspace(1, 0, STEPS + 1)


def model(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Returns a velocity that depends on all arguments; x may have one channel more."""
    mixed = x[:, :2] + text.mean(1)[:, None, None]
    return torch.tanh(mixed * (1 + t)[:, None, None] + x.flip(2)[:, :2] / 2)


@dataclass
class Sampler:
    """Flow Euler, with both branches of guidance as one call, or two; a further term is a call of
    its own."""

    batched: bool
    channels: int = 2
    guidance: float = 3.0
    is_last: bool = False
    further: float = 0.0

    def run(self, call: Callable[[int, str, tuple[Any, ...]], torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        x, text = torch.randn(2, 2, 4), torch.randn(2, 3)
        more = torch.randn(2, self.channels - 2, 4)
        empty = torch.zeros_like(text)
        for i in range(STEPS):
            given = torch.cat([more, x] if self.is_last else [x, more], 1)
            t = SIGMAS[i].expand(2)
            if self.batched:
                both = torch.cat([given, given]), torch.cat([t, t]), torch.cat([empty, text])
                uncond, cond = call(i, "", both).chunk(2)
            else:
                uncond = call(i, "uncond", (given, t, empty))
                cond = call(i, "cond", (given, t, text))
            guided = uncond + self.guidance * (cond - uncond)
            if self.further:
                guided += self.further * (cond - call(i, "further", (given, t, text / 2)))
            x += (SIGMAS[i + 1] - SIGMAS[i]) * guided
        return x


def euler(guidance: float, further: float = 0.0) -> Updates:
    """Returns the sampler in numbers: [n, lags], and [n, branches, lags]."""
    steps = SIGMAS.diff().numpy().astype(float)
    weights = [1 - guidance, guidance + further, *([-further] if further else [])]
    outputs = np.stack([steps * weight for weight in weights], 1)[:, :, None]
    return Updates(np.ones((STEPS, 1)), outputs, np.zeros(STEPS))


def hear(sampler: Sampler) -> HeardGeneration:
    hearing = Hearing()

    def call(step: int, name: str, args: tuple[Any, ...]) -> torch.Tensor:
        result = model(*args)
        leaves, structure = flatten((args, {}))
        hearing.hear(step, name, leaves, structure, result)
        return result

    result = sampler.run(call)
    return hearing.finish(SIGMAS[:-1].tolist(), (result,))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("channels", "order"), [(2, "first"), (3, "first"), (3, "last")])
def test_what_is_recorded(batched: bool, channels: int, order: str) -> None:
    """Latents alone, before a condition, and after it."""
    heard = hear(Sampler(batched, channels, is_last=order == "last"))
    recording = heard.recording
    expected = ("[0]", "[1]") if batched else ("uncond", "cond")
    assert recording.branches == expected
    assert (
        heard.streams == ((0, 0, order == "last"),)
        and recording.elements == 16
        and recording.has_result
    )
    rows = [heard.inputs(i)[0].flatten() for i in range(STEPS)]
    assert recording.inputs()[0, 1] == pytest.approx(float(rows[0] @ rows[1]), rel=1e-5)
    name = "" if batched else "cond"
    cond = heard.outputs(2, name, heard.calls[2][name].outputs)[expected[1]]
    square = float(cond[0].square().sum())
    assert recording.outputs(1, 1)[2, 2] == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("further", [0.0, 0.5])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("channels", "order"), [(2, "first"), (3, "first"), (3, "last")])
def test_a_replay_is_the_sampler(batched: bool, channels: int, order: str, further: float) -> None:
    """With other outputs at a step, the replay gives what the sampler itself would give."""
    sampler = Sampler(batched, channels, is_last=order == "last", further=further)
    heard = hear(sampler)
    assert len(heard.recording.branches) == 2 + bool(further)

    def changed(step: int, name: str, args: tuple[Any, ...]) -> torch.Tensor:
        result = model(*args)
        return result * 1.1 if step == 2 else result

    def replayed(step: int, name: str, index: int, args: Any, kwargs: Any) -> Any:
        assert index == 0 and not kwargs
        return changed(step, name, args)

    expected = (sampler.run(changed) - sampler.run(lambda s, n, args: model(*args))).square()
    replay = Replay(heard, euler(sampler.guidance, further))
    assert replay.can_run
    errors = replay.run(replayed).errors
    assert not errors[:3].any() and errors[3] > 0
    assert errors[STEPS] == pytest.approx(float(expected.mean().sqrt()), rel=1e-4)
    same = replay.run(lambda step, name, index, args, kwargs: model(*args))
    assert not same.errors.any() and (same.seconds > 0).all()


def test_arguments_that_were_written_to_since() -> None:
    hearing, big = Hearing(), torch.zeros(5000)
    for i in range(2):
        x = torch.full((1, 4), float(i))
        leaves, structure = flatten(((x, big), {}))
        hearing.hear(i, "", leaves, structure, x + 1)
    heard = hearing.finish()
    assert Replay(heard, euler(1.0)).can_run
    big += 1
    assert not Replay(heard, euler(1.0)).can_run


def test_experts_and_missing_branches() -> None:
    hearing = Hearing()
    for i in range(4):
        x = torch.full((1, 4), float(i))
        leaves, structure = flatten(((x,), {}))
        for name in ("a", "b") if i < 2 else ("a",):
            hearing.hear(i, name, leaves, structure, x + 1, model=i // 2)
    recording = hearing.finish().recording
    assert recording.starts == (0, 2) and not recording.has_result
    assert (np.diag(recording.outputs(1, 1)) > 0).tolist() == [True, True, False, False]


def test_what_cannot_be_recorded() -> None:
    hearing = Hearing()
    for i in range(2):
        leaves, structure = flatten(((torch.ones(1, 4),), {}))
        hearing.hear(i, "", leaves, structure, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"latents: expected an argument .* outputs are \(1, 4\)"):
        hearing.finish()
    with pytest.raises(ValueError, match="calls: expected some at each of 0 steps"):
        Hearing().finish()
