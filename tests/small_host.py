"""A host in the form of ComfyUI: model patchers, wrappers around calls, and samplers.

Only what nodes see of its interface is here; `comfy_host.py` is the same for ComfyUI.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Executor:
    """Calls wrappers one within the other, and the function itself in the innermost."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: Sequence[Any], idx: int):
        self.original, self.class_obj, self.wrappers, self.idx = original, owner, wrappers, idx

    @classmethod
    def new_class_executor(cls, original: Any, class_obj: Any, wrappers: Any, idx: int = 0) -> Any:
        return cls(original, class_obj, wrappers, idx)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = Executor(self.original, self.class_obj, self.wrappers, self.idx + 1)
        return inner.execute(*args, **kwargs)


def run_wrapped(kind: str, function: Any, owner: Any, options: Any, *args: Any, **kw: Any) -> Any:
    wrappers = _all_of(options.get("wrappers", {}), kind)
    return Executor(function, owner, wrappers, 0).execute(*args, **kw)


def _all_of(kept: dict[str, dict[str, list[Any]]], kind: str) -> list[Any]:
    return [each for group in kept.get(kind, {}).values() for each in group]


class Patcher:
    """A model that nodes share, and what one of them wants of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, Any] = {}
        self.callbacks: dict[str, Any] = {}
        self.patches: dict[str, Tensor] = {}

    def clone(self) -> Patcher:
        clone = Patcher(self.model)
        clone.model_options = copy.deepcopy(self.model_options)
        clone.wrappers = {a: {b: c[:] for b, c in d.items()} for a, d in self.wrappers.items()}
        clone.callbacks = {a: {b: c[:] for b, c in d.items()} for a, d in self.callbacks.items()}
        clone.patches = dict(self.patches)
        return clone

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def add_patches(self, patches: dict[str, Tensor]) -> None:
        self.patches |= patches

    def call_back(self, kind: str, *args: Any) -> None:
        for callback in _all_of(self.callbacks, kind):
            callback(self, *args)


class Net(nn.Module):
    """A diffusion model of a few layers. Latents are [B, 4, H, W], conditions [B, 5, 8]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.enter, self.text = nn.Conv2d(4, width, 3, padding=1), nn.Linear(8, width)
        self.time, self.mix = nn.Linear(1, width), nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Any = None,
        **others: Any,
    ) -> Tensor:
        shift = self.time(timestep[:, None]) + self.text(context).mean(1)
        h = torch.tanh(self.enter(x) + shift[..., None, None])
        if control is not None:
            h = h + control["output"].pop()
        for patch in (transformer_options or {}).get("patches", {}).get("middle", ()):
            h = patch(h)
        return self.leave(h + torch.tanh(self.mix(h)))


class Flow:
    """Rectified flow: latents are a mix of noise and data."""


class Model(nn.Module):
    """What patchers share: a diffusion model, and how its output becomes denoised latents."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.diffusion_model = Net()
        self.model_sampling = Flow()

    def apply_model(
        self, x: Tensor, t: Tensor, control: Any, transformer_options: Any, **kwargs: Any
    ) -> Tensor:
        options = transformer_options
        inputs = x, t, control, options  # by position, as ComfyUI gives them to wrappers
        return run_wrapped("apply_model", self._apply_model, self, options, *inputs, **kwargs)

    def _apply_model(
        self, x: Tensor, t: Tensor, control: Any, transformer_options: Any, **kwargs: Any
    ) -> Tensor:
        kwargs |= {"control": control, "transformer_options": transformer_options}
        output = self.diffusion_model(x.to(self.diffusion_model.dtype), t, **kwargs).float()
        return x - output * t.view(-1, *(1,) * (x.ndim - 1))


class Guider:
    """Runs a sampler with conditions. A condition is a dictionary: `context`, maybe `control`,
    `patches`, `hooks` and `area`, the number of rows from the top that it is for."""

    def __init__(self, patcher: Patcher, conds: dict[str, list[Any]], cfg: float) -> None:
        self.model_patcher, self.conds, self.cfg = patcher, conds, cfg
        self.splits = False

    def sample(self, noise: Tensor, sampler: Sampler, sigmas: Tensor, callback: Any) -> Tensor:
        patcher = self.model_patcher
        options = copy.copy(patcher.model_options["transformer_options"])
        options |= {"wrappers": patcher.wrappers, "sample_sigmas": sigmas}
        extra = {"model_options": {"transformer_options": options}, "seed": 0}
        self.conds = {k: [{**c, "uuid": uuid.uuid4()} for c in v] for k, v in self.conds.items()}
        try:
            call = run_wrapped, "sampler_sample", sampler.sample, sampler, options
            return call[0](*call[1:], self, sigmas, extra, callback, noise)
        finally:
            patcher.call_back("on_cleanup")

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any, seed: int) -> Tensor:
        sides = [self.conds["positive"], self.conds["negative"] if self.cfg != 1 else []]
        to_run = [(side, c) for side, conds in enumerate(sides) for c in conds][::-1]
        sums, counts = [torch.zeros_like(x) for _ in sides], [torch.zeros_like(x) for _ in sides]
        for batch in _group(to_run, x, self.splits):
            outputs = self._call(batch, x, sigma, model_options["transformer_options"])
            for (side, cond), output in zip(batch, outputs, strict=True):
                sums[side][..., : cond.get("area"), :] += output
                counts[side][..., : cond.get("area"), :] += 1
        cond, uncond = (s / n.clamp(min=1) for s, n in zip(sums, counts, strict=True))
        return uncond + (cond - uncond) * self.cfg if self.cfg != 1 else cond

    def _call(self, batch: Any, x: Tensor, sigma: Tensor, options: Any) -> Sequence[Tensor]:
        n, first = len(batch), batch[0][1]
        area = x[..., : first.get("area"), :]
        options = {
            **options,
            **({"patches": first["patches"]} if "patches" in first else {}),
            "cond_or_uncond": [side for side, _ in batch],
            "uuids": [cond["uuid"] for _, cond in batch],
            "sigmas": sigma,
        }
        control = first.get("control")
        given = {"control": None if control is None else control(sigma)}
        given["context"] = torch.cat([cond["context"].repeat(len(x), 1, 1) for _, cond in batch])
        model, inputs = self.model_patcher.model, (torch.cat([area] * n), torch.cat([sigma] * n))
        return model.apply_model(*inputs, transformer_options=options, **given).chunk(n)


def _group(to_run: list[Any], x: Tensor, splits: bool) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for i, (side, cond) in enumerate(to_run):
        alone = splits or "control" in cond or "patches" in cond
        groups.setdefault(i if alone else f"{cond.get('area')}", []).append((side, cond))
    return list(groups.values())


class Sampler:
    """A function that moves latents from noise level to noise level, and its settings."""

    def __init__(self, function: Any) -> None:
        self.sampler_function, self.extra_options = function, {}

    def sample(
        self, guider: Guider, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor
    ) -> Tensor:
        ones = noise.new_ones(len(noise))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return guider(x, sigma * ones, extra["model_options"], extra["seed"])

        return self.sampler_function(denoise, noise * sigmas[0], sigmas, callback)


def euler(denoise: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    for i, (here, there) in enumerate(pairwise(sigmas)):
        x = x + (x - denoise(x, here)) / here * (there - here)
        callback(i)
    return x


def _second_order(has_end: bool) -> Any:
    """Returns Heun's method, whose second calls are at the end of a step, or DPM-Solver-2."""

    def sample(denoise: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
        for i, (here, there) in enumerate(pairwise(sigmas)):
            d = (x - denoise(x, here)) / here
            if there > 0:
                at = there if has_end else (here * there).sqrt()
                y = x + d * (at - here)
                second = (y - denoise(y, at)) / at
                d = (d + second) / 2 if has_end else second
            x = x + d * (there - here)
            callback(i)
        return x

    return sample


def restart(denoise: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    middle = len(sigmas) // 2
    x = euler(denoise, x, sigmas[: middle + 1], callback)
    return euler(denoise, x + 0.1, sigmas[middle - 2 :], callback)


SAMPLERS = {"euler": euler, "heun": _second_order(True), "dpm_2": _second_order(False)}


class SmallHost:
    """Makes models and runs samplers, as tests ask."""

    samplers = ("euler", "heun", "dpm_2")
    nests = True
    restart = staticmethod(restart)

    def make(self, seed: int = 0) -> Patcher:
        return Patcher(Model(seed).eval().requires_grad_(False))

    def context(self, seed: int, tokens: int = 5) -> Tensor:
        return torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))

    def with_lora(self, patcher: Patcher) -> Patcher:
        clone = patcher.clone()
        clone.add_patches(
            {"mix.weight": torch.full_like(clone.model.diffusion_model.mix.weight, 0.02)}
        )
        return clone

    def unload(self, patcher: Patcher) -> None:
        patcher.call_back("on_detach_after", True)

    @torch.no_grad()
    def sample(
        self,
        patcher: Patcher,
        sampler: Any = "euler",
        steps: int = 12,
        cfg: float = 1.0,
        seed: int = 0,
        size: int = 8,
        prompt: int = 1,
        positive: list[Any] | None = None,
        callback: Any = None,
        splits: bool = False,
    ) -> Tensor:
        conds = {
            "positive": positive or [{"context": self.context(prompt)}],
            "negative": [{"context": self.context(0)}],
        }
        guider = Guider(patcher, conds, cfg)
        guider.splits = splits
        noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))
        sigmas = 1 - torch.linspace(0, 1, steps + 1) ** 1.3
        function = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        net = patcher.model.diffusion_model
        before = {key: net.get_parameter(key).data.clone() for key in patcher.patches}
        for key, patch in patcher.patches.items():
            net.get_parameter(key).data += patch
        try:
            return guider.sample(noise, Sampler(function), sigmas, callback or (lambda i: None))
        finally:
            for key, weight in before.items():
                net.get_parameter(key).data = weight
