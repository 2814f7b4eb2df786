"""Kinds of generations of `pabc.auto`: autocast, and where a loop of a user's own ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_loops import Loop, compile_auto, make_denoiser, plan_of, run
from torch import Tensor


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.mark.parametrize("backend", ["original", "eager"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.bfloat16, None), (None, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_autocast_is_part_of_the_kind(
    first: torch.dtype | None, second: torch.dtype | None, backend: str, tmp_path: Path
) -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model, tmp_path, backend=backend)
    with autocast(first):
        run(fast, loop, 0)
        run(fast, loop, 1)
    with autocast(second):
        found, stats = run(fast, loop, 2)
        torch.testing.assert_close(found, loop(model, 2), rtol=1e-3, atol=1e-3)
        assert stats.recorded == 1 and stats.reused == 5, "computed, to be recorded"
        assert "no generation of this kind is recorded yet" in stats.plan_source
        assert run(fast, loop, 3)[1].reused == 10
    with autocast(first):
        assert run(fast, loop, 4)[1].reused == 15, "both plans are known"
    assert fast.stats.recorded == 2
    for dtype in (first, second):
        fast = compile_auto(model, tmp_path, backend=backend)
        with autocast(dtype):
            assert run(fast, loop, 5)[1].reused == 5, "and kept"


def test_dtype_is_part_of_the_kind() -> None:
    loop, model = Loop(), make_denoiser()
    fast = compile_auto(model)
    for seed in range(2):
        run(fast, loop, seed)
    model.double()
    double = loop.but(dtype=torch.float64)
    found, stats = run(fast, double, 2)
    assert torch.equal(found, double(model, 2)) and stats.reused == 5
    assert run(fast, double, 3)[1].recorded == 2


def test_plans_are_tried_under_the_autocast_of_the_recording() -> None:
    """Though the recording ends, by `reset`, outside of it."""
    seen = []

    model = make_denoiser()
    model.register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    fast = compile_auto(model)
    with autocast(torch.bfloat16):
        run(fast, Loop(), 0)
    fast.reset()
    assert fast.stats.recorded == 1 and len(seen) > 12 and all(seen)
    seen.clear()
    run(fast, Loop(), 1)
    with autocast(torch.bfloat16):
        run(fast, Loop(), 2)
    assert fast.stats.recorded == 2 and seen[:12] == [False] * 12
    assert not any(seen[: 12 + 4 * 7]) and seen[-7:] == [True] * 7


class Left(Loop):
    """A loop that its user leaves by `break` after `taken` steps."""

    taken = 8

    def __call__(self, model: Any, seed: int) -> Tensor:
        class Enough(Exception):
            pass

        def call(*args: Any, **kwargs: Any) -> Tensor:
            if len(calls) == self.taken:
                raise Enough
            calls.append(args)
            return model(*args, **kwargs)

        calls: list[Any] = []
        with contextlib.suppress(Enough):
            super().__call__(call, seed)
        return calls[-1][0]


@pytest.mark.parametrize("ends", [False, True])
def test_a_generation_that_is_left_is_not_planned(ends: bool) -> None:
    model, loop = make_denoiser(), Loop(num_steps=16)
    fast = compile_auto(model, calls=5)
    run(fast, Left(num_steps=16), 0)
    if ends:
        fast.reset()
        assert "ended with noise left, at timestep 562.5" in fast.stats.plan_source
    found, stats = run(fast, loop, 1)
    assert torch.equal(found, loop(model, 1)) and stats.recorded == 0
    assert "ended with noise left, at timestep 562.5" in stats.plan_source
    _, stats = run(fast, loop, 2)
    assert stats.recorded == 1 and stats.reused == 11, "a whole one is planned at once"
    run(fast, Left(num_steps=16), 3)
    found, stats = run(fast, loop, 4)
    torch.testing.assert_close(found, loop.by_hand(model, 4, plan_of(fast)))
    assert stats.recorded == 1, "one that is left while it follows a plan changes nothing"


def test_generations_that_always_end_with_noise_are_planned_from_the_second_on() -> None:
    """Another model may take over, as in Wan 2.2."""
    fast = compile_auto(make_denoiser(), calls=5)
    for seed in range(3):
        _, stats = run(fast, Left(num_steps=16), seed)
    assert stats.recorded == 1 and stats.reused == 3
    assert "computes 5 of 8 steps" in stats.plan_source


def test_a_generation_longer_than_the_plan(tmp_path: Path) -> None:
    """Steps after those of the plan are computed in full, and the next generation is recorded."""
    model, loop = make_denoiser(), Loop(num_steps=16)
    outputs: list[tuple[Tensor, Tensor]] = []

    def compared(*args: Any, **kwargs: Any) -> Tensor:
        found = fast(*args, **kwargs)
        outputs.append((found, model(*args, **kwargs)))
        return found

    fast = compile_auto(model, tmp_path, calls=5)
    for seed in range(3):
        run(fast, Left(num_steps=16), seed)
    with torch.no_grad():
        loop(compared, 3)
    assert all(torch.equal(*pair) for pair in outputs[8:]), "bitwise"
    assert not all(torch.equal(*pair) for pair in outputs[:8])
    assert fast.stats.recorded == 1 and fast.stats.reused == 6
    assert "expected a generation of 8 steps, found a longer one" in fast.stats.plan_source
    found, _ = run(fast, loop, 4)
    assert torch.equal(found, loop(model, 4)), "recorded anew"
    found, stats = run(fast, loop, 5)
    assert stats.recorded == 2 and "of 16 steps" in stats.plan_source
    torch.testing.assert_close(found, loop.by_hand(model, 5, plan_of(fast)))
    assert len(list(tmp_path.rglob("*.json"))) == len(list(tmp_path.rglob("*.npz"))) == 1
    assert run(compile_auto(model, tmp_path, calls=5), loop, 6)[1].reused == 11
