"""LoRA adapters that come, change and go while a pipeline is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import pabc

from .row import Cell, denoisers
from .trial import Trial

LAYERS = r".*\.(to_q|to_v|to_query|to_value|to_qkv|to_qkv_mlp_proj|q_proj|v_proj)"
"""The layers that adapters are put on, as users do: projections of attentions."""


def add(pipe: Any) -> None:
    """Puts an adapter on each transformer, with weights that are not zero."""
    import peft

    for model in denoisers(pipe).values():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=LAYERS)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, "a")
        else:
            peft.inject_adapter_in_model(config, model, "a")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)


def scale(pipe: Any) -> None:
    for layer in _layers(pipe):
        layer.set_scale("a", 0.3)


def disable(pipe: Any) -> None:
    for layer in _layers(pipe):
        layer.enable_adapters(False)


def _layers(pipe: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = (m for model in denoisers(pipe).values() for m in model.modules())
    return [m for m in modules if isinstance(m, BaseTunerLayer)]


def follows_adapters(trial: Trial) -> Cell:
    """Compares with the plain pipeline after each change, from a generation without adapters on."""
    plain, pipe = trial.row.make(), trial.row.make()
    with pabc.compile_pipeline(pipe, pabc.Schedule.none, backend="eager") as fast:
        before = trial.row.run(fast)
        for change in (add, scale, disable):
            for each in (plain, fast.pipe):
                change(each)
            found, expected = trial.row.run(fast), trial.row.run(plain)
            if torch.equal(found, before) != (change is disable):
                return f"no: {change.__name__} changes nothing"
            far = 1e-5 * max(1.0, float(expected.abs().max()))
            if (found - expected).abs().max() > far:
                return f"no: not equal after {change.__name__}"
    return "yes"
