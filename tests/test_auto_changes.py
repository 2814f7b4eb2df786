"""pabc.auto: models that change after a generation was recorded, and before it is planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_loops import Loop, compile_auto, make_denoiser, run
from torch import Tensor, nn

from pabc.automatic.plans import AutoPlan
from pabc.calibration.digests import describe_weights

pytestmark = pytest.mark.runtime


class Adapted(nn.Module):
    """A denoiser with an adapter, which acts where the timestep is below `until`."""

    def __init__(self, until: float = 2000.0) -> None:
        super().__init__()
        self.base, self.more, self.until = make_denoiser(), make_denoiser(5), until
        self.is_on = False

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        found = self.base(x, timestep, text=text)
        if not self.is_on:
            return found
        return found + (timestep < self.until)[:, None, None] * self.more(x, timestep, text=text)


def adapt(model: nn.Module) -> None:
    model.is_on = True


def adapt_late(model: nn.Module) -> None:
    model.is_on, model.until = True, 300.0


def write(model: nn.Module) -> None:
    model.base.mix.weight.data.mul_(-1.5)


def load(model: nn.Module) -> None:
    model.base.load_state_dict(make_denoiser(3).state_dict())


def hook(model: nn.Module) -> None:
    model.base.register_forward_hook(lambda module, args, output: output * 1.2)


@pytest.mark.parametrize("change", [adapt, adapt_late, write, load, hook])
@pytest.mark.parametrize("backend", ["original", "eager"])
def test_a_recording_of_a_model_that_has_changed_is_dropped(
    change: Callable[[nn.Module], None],
    backend: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, model = Loop(), Adapted().eval()
    fast = compile_auto(model, tmp_path, backend=backend)
    run(fast, loop, 0)
    change(model)
    found, stats = run(fast, loop, 1)
    assert torch.equal(found, loop(model, 1)) and stats.recorded == 0
    assert "the model changed after the generation before was recorded" in stats.plan_source
    assert "call fast.reset() first" in caplog.text
    assert not list(tmp_path.rglob("*.json"))
    _, stats = run(fast, loop, 2)
    assert stats.recorded == 1 and stats.reused == 5, "the next generation is recorded"
    assert [p.kind.weights for p in _plans(fast)] == [describe_weights({"": model})]


def test_a_model_that_draws_random_numbers_is_planned() -> None:
    model = Adapted().eval()
    model.base.register_forward_hook(lambda m, args, x: x + 0.01 * torch.randn(x.shape))
    fast = compile_auto(model)
    run(fast, Loop(), 0)
    assert run(fast, Loop(), 1)[1].recorded == 1


def test_weights_are_read_anew_where_a_recording_begins(tmp_path: Path) -> None:
    """Writes to `weight.data` change no version."""
    model = Adapted().eval()
    fast = compile_auto(model, tmp_path)
    run(fast, Loop(), 0)
    fast.reset()
    before = describe_weights({"": model})
    write(model)
    run(fast, Loop(num_steps=10), 0)
    fast.reset()
    kinds = [plan.kind for plan in _plans(fast)]
    expected = {12: before, 10: describe_weights({"": model})}
    assert {len(kind.timesteps): kind.weights for kind in kinds} == expected


def _plans(fast: Any) -> list[AutoPlan]:
    return fast._plans._planner._plans
