"""Weights that are kept elsewhere, or in another dtype, than they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import pabc

from .row import Cell, Row, denoisers
from .trial import Trial, describe, is_equal

CPU = torch.device("cpu")


def offloads_models(trial: Trial) -> Cell:
    """Whole models that move between calls, which are captured as without."""
    pipe = trial.row.make()
    pipe.enable_model_cpu_offload(device="cpu")
    with pabc.compile_pipeline(pipe, pabc.Schedule.none, backend="eager") as fast:
        found, captures = [], []
        for _ in range(2):
            found.append(trial.row.run(fast))
            captures.append(max(model.stats.captures for model in fast.models.values()))
    if captures[0] != captures[1]:
        return f"no: captured anew in each generation, {captures[1]} times"
    return is_equal(torch.cat(found), trial.expected().repeat(2))


def offloads_groups(trial: Trial) -> Cell:
    def offload(pipe: Any) -> None:
        for model in denoisers(pipe).values():
            apply_group_offloading(model, CPU, CPU, "leaf_level")

    return skips_calls(trial, offload)


def offloads_layers(trial: Trial) -> Cell:
    """What `enable_sequential_cpu_offload` does to each part. On a CPU that itself fails: it names
    the device `cpu:0`, which accelerate then takes for another one than `cpu`."""

    def offload(pipe: Any) -> None:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                cpu_offload(part, CPU, offload_buffers=bool(part._parameters))
        weights = (x for model in denoisers(pipe).values() for x in model.parameters())
        assert any(weight.is_meta for weight in weights), "nothing is offloaded"

    return skips_calls(trial, offload)


def skips_calls(trial: Trial, offload: Callable[[Any], None]) -> Cell:
    """Weights that move within a call: whole calls are skipped, as without."""
    pipe = trial.row.make()
    offload(pipe)
    try:
        trial.row.run(pipe)
    except Exception as error:
        return f"no: the plain pipeline fails, too: {describe(error)}"
    found = [skip_calls(trial.row, put_on) for put_on in (offload, lambda _: None)]
    if not all(reused for _, reused in found):
        return "no: no call is skipped"
    same = is_equal(*(latents for latents, _ in found))
    return "calls" if same == "yes" else same


def skip_calls(row: Row, put_on: Callable[[Any], None]) -> tuple[Tensor, int]:
    """Returns the latents of a second generation, and how many calls it skipped. In the first one,
    a model may build tables that it keeps, which costs a step."""

    def skip(timesteps: Any) -> pabc.Schedule:
        return pabc.Schedule.skip(timesteps, len(timesteps) // 2 + 1)

    pipe = row.make()
    put_on(pipe)
    with pabc.compile_pipeline(pipe, skip, backend="original") as fast:
        row.run(fast)
        before = sum(model.stats.reused for model in fast.models.values())
        found = row.run(fast)
        return found, sum(model.stats.reused for model in fast.models.values()) - before


def casts_layers(trial: Trial) -> Cell:
    """Weights that are kept as float8, and cast in each layer."""
    plain, pipe = trial.row.make(), trial.row.make()
    for each in (plain, pipe):
        for model in denoisers(each).values():
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pabc.compile_pipeline(pipe, pabc.Schedule.none, backend="eager") as fast:
        return is_equal(trial.row.run(fast), trial.row.run(plain))
