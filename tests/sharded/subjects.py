"""Models of sharded generations, and the calls of their steps.

T, H, W of the workloads are 3, 5, 7 after patches, heads 2: none divides by all of 2, 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from models import MODELS
from torch import nn

Call = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model, the same on every rank, and its keyword arguments at each step.

    `call`: (step, branch) -> arguments; the text is the branch's own, latents and timestep differ
    from step to step.
    """

    model: nn.Module
    call: Callable[[int, int], Call]


LATENTS = {"latte": (4, 3, 10, 14), "opensora": (4, 3, 10, 14), "cogvideox": (3, 16, 10, 14)}
CHANGES: dict[str, dict[str, Any]] = {
    "latte": {},
    "opensora": {},
    "cogvideox": {"sample_frames": 9, "sample_height": 10, "sample_width": 14},
}
"""What else these latents take."""
SHALLOW = {"latte": {"num_layers": 1}, "opensora": {"depth": 1}, "cogvideox": {"num_layers": 1}}


@cache
def find_subject(name: str, batch: int) -> Subject:
    """A workload of the benchmarks, a model of the zoo, or a small model, by name."""
    workload, *variant = name.split(", ")
    if workload in LATENTS:
        return _make_workload(workload, batch, *variant)
    if name in ENTRIES:
        return _make_entry(name)
    if name in RECORDED:
        return _make_recorded(name)
    (case,) = (case for case in MODELS if case.name == name)
    model = case.model().requires_grad_(False)
    return Subject(model, lambda step, branch: case.call(step))


def _make_workload(name: str, batch: int, variant: str = "") -> Subject:
    from workloads import TINY, build  # bench/ is on the worker's path alone

    workload = TINY[name]
    changes = CHANGES[name] | (SHALLOW[name] if variant == "shallow" else {})
    workload = replace(workload, latents=LATENTS[name], build=partial(workload.build, **changes))

    def call(step: int, branch: int) -> Call:
        latents = _draw(step, batch, *workload.latents)
        text = _draw(100 + branch, batch, *workload.text)
        return workload.call(latents, torch.full((batch,), 900.0 - 100 * step), text)

    return Subject(build(workload), call)


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mask_lengths(batch: int, length: int) -> torch.Tensor:
    """1 where a text has a token: texts of unequal lengths, none empty."""
    lengths = length - torch.arange(batch) % (length - 1)
    return (torch.arange(length) < lengths[:, None]).float()


def _make_entry(name: str) -> Subject:
    from zoo import ENTRIES as ZOO

    (entry,) = (entry for entry in ZOO if entry.name == name)
    model, made = entry.build()
    mask = made["encoder_attention_mask"]
    made["encoder_attention_mask"] = _mask_lengths(*mask.shape).to(mask.dtype)
    return Subject(model.requires_grad_(False), _redraw(made, "hidden_states"))


def _make_recorded(name: str) -> Subject:
    from recordings import load_model, load_part

    made = load_part(name, "in/")
    model = load_model(name)[0].requires_grad_(False)
    return Subject(model, _redraw(made, "x" if "x" in made else "hidden_states"))


def _redraw(made: Call, latents: str) -> Callable[[int, int], Call]:
    def call(step: int, branch: int) -> Call:
        when = torch.full_like(made["timestep"], 900 - 100 * step)
        return {**made, latents: _draw(step, *made[latents].shape), "timestep": when}

    return call


ENTRIES = ("HunyuanVideo", "LTX")
"""Models of the zoo with a mask of their text, here with texts of unequal lengths."""
RECORDED = ("latte_t2v_mask", "opensora12_stdit3_xmask", "osp11_latte_rope", "osp12_rope_basic")
"""Models of pabc with every mask they have, of text, of frames, of latents."""
