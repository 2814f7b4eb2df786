"""Enables the caches of diffusers as its pipelines do: with their state set at each step."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import diffusers
from case import Ready
from diffusers import hooks
from torch import Tensor, nn


@dataclass
class Clock:
    """The current timestep, which the loop sets and hooks read, as a pipeline's attribute."""

    timestep: Tensor | None = None
    model: Any = None

    @contextlib.contextmanager
    def on_step(self, index: int, timestep: Tensor) -> Iterator[None]:
        """Sets the timestep, as pipelines do, and enters a cache context for the one call."""
        self.timestep = timestep
        where = {"step_index": index, "timestep": timestep}
        model = self.model
        with model.cache_context("cond_uncond", **where) if model else contextlib.nullcontext():
            yield


def with_cache(model: Any, config: Any, note: str = "") -> Ready:
    """Enables a cache of diffusers; adds diffusers' mixin to a model that does not have it."""
    if not isinstance(model, diffusers.CacheMixin):
        model.__class__ = type(type(model).__name__, (type(model), diffusers.CacheMixin), {})
    clock = Clock(model=model)
    if "current_timestep_callback" in {f.name for f in fields(config)}:
        config.current_timestep_callback = lambda: clock.timestep
    model.enable_cache(config)
    return hooked(model, clock, note)


def hooked(model: nn.Module, clock: Clock, note: str = "") -> Ready:
    """Returns a model with hooks, which are reset when a pipeline would reset them."""
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    return Ready(model, clock.on_step, registry.reset_stateful_hooks, note)


def calibrate_mag_cache(
    model: Any, num_steps: int, generate: Callable[[Ready], Any]
) -> list[float]:
    """Returns the ratios that MagCache prints after a generation in which it calibrates.

    `generate` runs one generation of `num_steps` calls of what it is given.
    """
    config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=num_steps)
    calibrated = with_cache(model, config)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate(calibrated)
    found = re.search(r"^\[[\d., e+-]+\]$", printed.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError("calibration: expected ratios, found none: MagCache knows no block list")
    calibrated.on_end()
    calibrated.call.disable_cache()  # type: ignore[attr-defined]
    ratios: list[float] = ast.literal_eval(found[0])
    return ratios
