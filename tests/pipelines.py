"""diffusers' pipelines around small transformers with random weights, and calls of them.

No text encoder and no VAE: prompt embeddings are passed in, latents come out. :class:`ByHand` is
the cache that compiled pipelines are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import diffusers
import torch
import zoo
from torch import Tensor, nn

Masks = Mapping[str, Sequence[bool]]
"""Kind -> one bool per step, True where it reuses."""
TEXT = 5
"""Text tokens."""


class ByHand(nn.Module):
    """A model in which modules whose kind is reused at a step give what they last gave.

    `kinds`: patterns of module names. `where`: per call of this or another expert, the branch and
    the step. A step that lacks any value it is to reuse computes them all; a value is lacking where
    a step since it was computed would have replaced it.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Mapping[str, str],
        masks: Masks,
        where: Iterator[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.model = model
        self.where = where
        self.kept: dict[int, dict[nn.Module, tuple[int, Any]]] = {}
        self.masks = masks
        self.points = {
            module: kind
            for name, module in model.named_modules()
            for pattern, kind in kinds.items()
            if fnmatch(name, pattern)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        branch, step = next(self.where)
        kept = self.kept.setdefault(branch, {})
        due = [
            m for m, kind in self.points.items() if kind in self.masks and self.masks[kind][step]
        ]
        due = [m for m in due if m in kept]  # a layer that is skipped in this branch never runs
        for module in due:
            mask = self.masks[self.points[module]]
            if not all(mask[kept[module][0] + 1 : step]):
                due = []

        def keep(module: nn.Module, _: Any, output: Any) -> Any:
            if module not in due:
                kept[module] = step, output
            return kept[module][1]

        handles = [module.register_forward_hook(keep) for module in self.points]
        try:
            return self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, calls of it, and what the kinds of its modules are.

    `call`: (batch, size) -> arguments; sizes 0 and 1 differ in height. `calls`: of the model, a
    step. `schedulers`: name -> scheduler, and steps asked for -> steps that run. `more`: arguments
    that follow from the number of steps.
    """

    name: str
    make: Callable[[], Any]
    call: Callable[[int, int], dict[str, Any]]
    kinds: Mapping[str, str]
    schedulers: Mapping[str, tuple[Any, Callable[[int], int]]]
    calls: int = 1
    more: Callable[[int], dict[str, Any]] = field(default=lambda _: {})

    def __str__(self) -> str:
        return self.name

    def run(
        self, pipe: Any, num_steps: int = 6, batch: int = 1, size: int = 0, **more: Any
    ) -> Tensor:
        arguments = {**self.call(batch, size), **self.more(num_steps), **more}
        arguments = {"num_inference_steps": num_steps, **arguments}
        return pipe(output_type="latent", return_dict=False, **arguments)[0]

    def masks(self, num_steps: int) -> dict[str, list[bool]]:
        """A rhythm for each kind, and one step without reuse before the last."""
        kinds = sorted(set(self.kinds.values()))
        return {
            kind: [step % (2 + i) != 0 and step != num_steps - 2 for step in range(num_steps)]
            for i, kind in enumerate(kinds)
        }

    def where(self, num_steps: int) -> Iterator[tuple[int, int]]:
        """Branch and step of each call."""
        return ((call, step) for step in range(num_steps) for call in range(self.calls))


def text(batch: int, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *(shape or (TEXT, 8)), generator=generator)


def noise(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(7))


def build(name: str, **changes: Any) -> nn.Module:
    """A transformer of the zoo, with changes to its configuration."""
    model, _ = next(entry for entry in zoo.ENTRIES if entry.name == name).build()
    if changes:
        torch.manual_seed(0)
        model = type(model).from_config({**model.config, **changes}).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


VIDEO_KINDS = {"*.attn1": "full", "*.attn2": "cross", "*.ff": "mlp"}
WAN_KINDS = {"*.attn1": "full", "*.attn2": "cross", "*.ffn": "mlp"}
LATTE_KINDS = {
    "transformer_blocks.*.attn1": "spatial",
    "transformer_blocks.*.attn2": "cross",
    "temporal_transformer_blocks.*.attn1": "temporal",
    "*blocks.?.ff": "mlp",
}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(num_steps: int) -> int:
    return num_steps


def twice(num_steps: int) -> int:
    """Heun: every step but the last one calls the model twice."""
    return 2 * num_steps - 1


def make_latte() -> Any:
    model = build(
        "Latte", num_layers=1, out_channels=8
    )  # the second half: a learned variance, dropped
    return quiet(diffusers.LattePipeline(None, None, None, model, diffusers.DDIMScheduler()))


def call_latte(batch: int, size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(batch, 0),
        "negative_prompt_embeds": text(batch, 1),
        "negative_prompt": None,
        "latents": noise(batch, 4, 3, 6 + 2 * size, 8),
        "height": 48 + 16 * size,
        "width": 64,
        "video_length": 3,
    }


def make_cogvideox() -> Any:
    model, scheduler = build("CogVideoX, rotary", num_layers=1), diffusers.CogVideoXDDIMScheduler()
    return quiet(diffusers.CogVideoXPipeline(None, None, None, model, scheduler))


def call_cogvideox(batch: int, size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(batch, 0),
        "negative_prompt_embeds": text(batch, 1),
        "latents": noise(batch, 3, 4, 6 + 2 * size, 8),
        "height": 48 + 16 * size,
        "width": 64,
        "num_frames": 9,
        "generator": torch.Generator().manual_seed(3),
    }


def make_wan(**more: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = build("Wan", num_layers=1)
    return quiet(diffusers.WanPipeline(None, None, None, scheduler, model, **more))


def make_two_experts() -> Any:
    second = build("Wan", num_layers=1)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.9)
    return make_wan(transformer_2=second, boundary_ratio=0.8)


def call_wan(batch: int, size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(batch, 0),
        "negative_prompt_embeds": text(batch, 1),
        "latents": noise(batch, 4, 3, 6 + 2 * size, 8),
        "height": 48 + 16 * size,
        "width": 64,
        "num_frames": 9,
    }


def make_allegro() -> Any:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    model = build("Allegro", num_layers=1)
    return quiet(diffusers.AllegroPipeline(None, None, None, model, scheduler))


def call_allegro(batch: int, size: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[:, -1] = 0
    return {
        "prompt_embeds": text(batch, 0),
        "negative_prompt_embeds": text(batch, 1),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": torch.ones(batch, TEXT),
        "negative_prompt": None,
        "latents": noise(batch, 4, 3, 6 + 2 * size, 8),
        "height": 48 + 16 * size,
        "width": 64,
        "num_frames": 12,
        "generator": torch.Generator().manual_seed(3),
    }


def make_flux() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    model = build("Flux", in_channels=16, num_single_layers=1, guidance_embeds=False)
    return quiet(diffusers.FluxPipeline(scheduler, None, None, None, None, None, model))


def call_flux(batch: int, size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(batch, 0),
        "pooled_prompt_embeds": text(batch, 1, 8),
        "negative_prompt_embeds": text(batch, 2),
        "negative_pooled_prompt_embeds": text(batch, 3, 8),
        "true_cfg_scale": 3.0,
        "latents": noise(batch, 12 + 4 * size, 16),
        "height": 48 + 16 * size,
        "width": 64,
    }


def make_sd3() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model, none = build("SD3", num_layers=1), [None] * 7
    return quiet(diffusers.StableDiffusion3Img2ImgPipeline(model, scheduler, *none))


def call_sd3(batch: int, size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(batch, 0),
        "pooled_prompt_embeds": text(batch, 1, 8),
        "negative_prompt_embeds": text(batch, 2),
        "negative_pooled_prompt_embeds": text(batch, 3, 8),
        "image": torch.zeros(batch, 3, 48 + 16 * size, 64),
        "latents": noise(batch, 4, 6 + 2 * size, 8),
        "height": 48 + 16 * size,
        "width": 64,
        "strength": 0.6,
    }


def most(num_steps: int) -> int:
    """Of so many steps, those that image to image runs at strength 0.6."""
    return num_steps - int(num_steps - num_steps * 0.6)


def custom_sigmas(num_steps: int) -> dict[str, Any]:
    return {"sigmas": [1.0 - (step / num_steps) ** 2 for step in range(num_steps)]}


PIPELINES = (
    Pipeline(
        "Latte",
        make_latte,
        call_latte,
        LATTE_KINDS,
        {
            "DDIM": (diffusers.DDIMScheduler(), same),
            "Heun": (diffusers.HeunDiscreteScheduler(), twice),
        },
    ),
    Pipeline(
        "CogVideoX",
        make_cogvideox,
        call_cogvideox,
        {"*.attn1": "joint", "*.ff": "mlp"},
        {
            "DDIM": (diffusers.CogVideoXDDIMScheduler(), same),
            "DPM": (diffusers.CogVideoXDPMScheduler(), same),
        },
    ),
    Pipeline(
        "Wan",
        make_wan,
        call_wan,
        WAN_KINDS,
        {
            "flow Euler, shift 3": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), same),
            "UniPC, shift 5": (
                diffusers.UniPCMultistepScheduler(
                    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
                ),
                same,
            ),
            "flow Heun": (diffusers.FlowMatchHeunDiscreteScheduler(), twice),
        },
        calls=2,
    ),
    Pipeline(
        "Wan, two experts",
        make_two_experts,
        call_wan,
        WAN_KINDS,
        {"flow Euler, shift 3": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), same)},
        calls=2,
    ),
    Pipeline(
        "Allegro",
        make_allegro,
        call_allegro,
        VIDEO_KINDS,
        {
            "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler(), same),
            "Heun": (diffusers.HeunDiscreteScheduler(), twice),
        },
    ),
    Pipeline(
        "Flux",
        make_flux,
        call_flux,
        {
            "*.attn": "joint",
            "*blocks.?.ff": "mlp",
            "*blocks.?.ff_context": "mlp",
            "*.act_mlp": "mlp",
        },
        {
            "flow Euler, custom sigmas": (
                diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                same,
            )
        },
        calls=2,
        more=custom_sigmas,
    ),
    Pipeline(
        "SD3, image to image",
        make_sd3,
        call_sd3,
        {"*.attn": "joint", "*.attn2": "full"},
        {"flow Euler, strength 0.6": (diffusers.FlowMatchEulerDiscreteScheduler(), most)},
    ),
)
