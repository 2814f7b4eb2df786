"""Defines the models, inputs and schedulers of sampling loops: small, of published size, tiny.

A workload defines how its model is built and called; :func:`draw` makes the inputs of a generation,
:func:`denoise` runs it. Guidance is batched, the unconditional half first, as in diffusers'
pipelines. All weights but the demo's are random, from PyTorch's initialization, with which outputs
stay finite. They show how fast a model runs, and whether two runs are equal, but not quality.

Shapes: B clips, C channels, T frames, H x W latent pixels, L text tokens, D text features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pabc.demo import latte as demo_model
from pabc.demo.digits import PROMPTS
from pabc.models import OpenSora12

FRACTION = (0.15, 0.85)
"""The middle 70 % of the steps, in which attention is reused."""
RANGES = {"spatial": 2, "temporal": 4, "cross": 6}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and how it is sampled.

    Attributes:
        build: makes the model, on PyTorch's default device.
        latents: (C, T, H, W) of one clip; (T, C, H, W) where `frames_first`.
        text: (L, D) of one caption.
        call: (latents, timesteps, text, all 2 B) -> the model's keyword arguments.
        scheduler: makes the scheduler.
        ranges: kind -> its range in the schedule: it is computed at every n-th step of the window.
        names: kind -> pattern of the names of its attentions' modules, for caches that need names.
        num_clips: B.
        is_trained: True if the weights are trained, so that similarity to the full run matters.
    """

    name: str
    build: Callable[[], nn.Module]
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    call: Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
    scheduler: Callable[[], Any]
    ranges: Mapping[str, int]
    names: Mapping[str, str]
    frames_first: bool = False
    num_clips: int = 1
    guidance: float = 2.5
    is_trained: bool = False
    step: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Any]:
        """The shapes of the model's inputs at each step, as text."""
        return {
            "latents": [2 * self.num_clips, *self.latents],
            "text": [2 * self.num_clips, *self.text],
        }


@dataclass(frozen=True)
class Start:
    """The inputs of a generation: noise, and text whose first half is unconditional."""

    latents: Tensor
    text: Tensor


def build(workload: Workload, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the workload's model in eval mode, with the same weights at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = workload.build()
    if dtype != torch.float32:
        model = model.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def draw(
    workload: Workload, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Start:
    """Returns noise and text that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    num = workload.num_clips
    latents = torch.randn(num, *workload.latents, generator=generator)
    if workload.is_trained:
        text = demo_model.load().text.encode([*[""] * num, *PROMPTS[:num]])
    else:
        text = torch.randn(2 * num, *workload.text, generator=generator)
        text[:num] = 0
    return Start(latents.to(device, dtype), text.to(device, dtype))


def timesteps(workload: Workload, num_steps: int) -> list[float]:
    """Returns the timesteps that run, in order."""
    scheduler = workload.scheduler()
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]


def first_timestep(workload: Workload, device: str = "cpu") -> Tensor:
    """Returns the first timestep of a generation, a scalar tensor from its scheduler."""
    scheduler = workload.scheduler()
    scheduler.set_timesteps(2, device=device)
    return scheduler.timesteps[0]


OnStep = Callable[[int, Tensor], contextlib.AbstractContextManager[Any]]
"""Entered around each step, with its number and timestep."""


@torch.no_grad()
def denoise(
    workload: Workload, model: Callable[..., Any], start: Start, num_steps: int, on_step: OnStep
) -> Tensor:
    """Runs the sampling loop, calling `model` at each step; returns the last latents."""
    scheduler = workload.scheduler()
    scheduler.set_timesteps(num_steps, device=start.latents.device)
    latents = start.latents
    for index, timestep in enumerate(scheduler.timesteps):
        with on_step(index, timestep):
            batch = torch.cat([latents, latents])
            output = model(**workload.call(batch, timestep.expand(len(batch)), start.text))
            noise = output[0] if isinstance(output, tuple) else output
            noise = noise.to(latents.dtype)
            if noise.shape[1] == 2 * latents.shape[1]:  # half of it is a learned variance
                noise = noise.chunk(2, dim=1)[0]
            free, guided = noise.chunk(2)
            noise = free + workload.guidance * (guided - free)
            latents = scheduler.step(noise, timestep, latents, return_dict=False, **workload.step)[
                0
            ]
    return latents


def as_pictures(workload: Workload, latents: Tensor, reference: Tensor) -> Tensor:
    """Returns latents as frames (B, frames, H, W) in [0, 1], scaled by the reference's range.

    The demo's latents are pixels, whose range is fixed.
    """
    if workload.is_trained:
        low, high = torch.tensor(-1.0), torch.tensor(1.0)
    else:
        low, high = reference.float().aminmax()
    return ((latents.float() - low) / (high - low)).clamp(0, 1).flatten(1, 2)


def _make_ddim() -> Any:
    """Returns DDIM with v-prediction, with which latents stay finite for random weights."""
    return diffusers.DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )


def _make_flow() -> Any:
    """Returns a scheduler of rectified flow."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


LATTE_NAMES = {
    "spatial": r"^transformer_blocks\.\d+\.attn1$",
    "temporal": r"^temporal_transformer_blocks\.\d+\.attn1$",
    "cross": r"^transformer_blocks\.\d+\.attn2$",
}
"""diffusers' own patterns take Latte's temporal attentions for spatial ones."""


def _call_latte(latents: Tensor, when: Tensor, text: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": when,
        "encoder_hidden_states": text,
        "return_dict": False,
    }


def _latte(
    name: str, *, depth: int, heads: int, head_dim: int, frames: int, side: int, text: int = 48
) -> Workload:
    """Returns diffusers' Latte: `depth` spatial and `depth` temporal blocks, 2 x 2 patches."""
    features = 4096 if heads * head_dim > 512 else 256
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": depth,
        "cross_attention_dim": heads * head_dim,
        "attention_bias": True,
        "sample_size": side,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": features,
        "video_length": frames,
    }
    return Workload(
        name=name,
        build=partial(diffusers.LatteTransformer3DModel, **config),
        latents=(4, frames, side, side),
        text=(text, features),
        call=_call_latte,
        scheduler=_make_ddim,
        ranges=RANGES,
        names=LATTE_NAMES,
    )


def _call_cogvideox(latents: Tensor, when: Tensor, text: Tensor) -> dict[str, Any]:
    # In a pipeline the scheduler scales its input; DDIM does not.
    return _call_latte(latents, when, text)


def _cogvideox(
    name: str,
    *,
    depth: int,
    heads: int,
    head_dim: int,
    frames: int,
    height: int,
    width: int,
    text: int = 48,
) -> Workload:
    """Returns diffusers' CogVideoX, with joint attention, and positions as in the 2b model."""
    features = 4096 if heads * head_dim > 512 else 256
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": depth,
        "text_embed_dim": features,
        "max_text_seq_length": text,
        "sample_frames": 4 * (frames - 1) + 1,
        "sample_height": height,
        "sample_width": width,
    }
    return Workload(
        name=name,
        build=partial(diffusers.CogVideoXTransformer3DModel, **config),
        latents=(frames, 16, height, width),
        text=(text, features),
        call=_call_cogvideox,
        scheduler=_make_ddim,
        ranges={"joint": RANGES["spatial"]},
        names={"spatial": r"^transformer_blocks\.\d+\.attn1$"},
        frames_first=True,
    )


def _call_opensora(
    pixels: tuple[int, int], latents: Tensor, when: Tensor, text: Tensor
) -> dict[str, Any]:
    device = latents.device
    mask = torch.ones(text.shape[:2], dtype=torch.long, device=device)
    mask[len(text) // 2 :, -(text.shape[1] // 4) :] = 0  # captions are padded
    height, width = (torch.tensor([float(side)], device=device) for side in pixels)
    return {
        "x": latents,
        "timestep": when,
        "y": text[:, None],
        "mask": mask,
        "fps": torch.tensor([24.0], device=device),
        "height": height,
        "width": width,
    }


def _opensora(
    name: str,
    *,
    depth: int,
    heads: int,
    width: int,
    frames: int,
    rows: int,
    columns: int,
    text: int = 48,
    features: int = 256,
) -> Workload:
    """Returns pabc's Open-Sora 1.2: `depth` blocks of each kind, 2 x 2 patches."""
    config: dict[str, Any] = {
        "depth": depth,
        "num_heads": heads,
        "hidden_size": width,
        "caption_channels": features,
        "model_max_length": text,
    }
    return Workload(
        name=name,
        build=partial(OpenSora12, **config),
        latents=(4, frames, rows, columns),
        text=(text, features),
        call=partial(_call_opensora, (8 * rows, 8 * columns)),
        scheduler=_make_flow,
        ranges=RANGES,
        names={
            "spatial": r"^spatial_blocks\.\d+\.attn$",
            "temporal": r"^temporal_blocks\.\d+\.attn$",
            "cross": r"^(spatial|temporal)_blocks\.\d+\.cross_attn$",
        },
    )


def _demo() -> Workload:
    """Returns the demo's trained model: frames of 16 x 16 pixels, four clips at a time."""
    return Workload(
        name="demo",
        build=demo_model.load_transformer,
        latents=(1, 8, 16, 16),
        text=(demo_model.MAX_TOKENS, demo_model.TEXT_DIM),
        call=_call_latte,
        scheduler=demo_model.build_scheduler,
        ranges=RANGES,
        names=LATTE_NAMES,
        num_clips=4,
        guidance=demo_model.Digits.guidance,
        is_trained=True,
        step=dict(demo_model.Digits.step_options),
    )


def _named(workloads: list[Workload]) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


SMALL = _named(
    [
        _demo(),
        _latte("latte", depth=3, heads=4, head_dim=64, frames=8, side=24),
        _latte("latte-attention", depth=3, heads=4, head_dim=24, frames=8, side=40),
        _cogvideox("cogvideox", depth=4, heads=4, head_dim=48, frames=5, height=24, width=32),
        _opensora("opensora", depth=3, heads=4, width=192, frames=8, rows=24, columns=32),
    ]
)
"""For two CPU cores: a tenth to half a second a step."""

FULL = _named(
    [
        _latte("latte", depth=28, heads=16, head_dim=72, frames=16, side=64, text=120),
        _cogvideox(
            "cogvideox", depth=30, heads=30, head_dim=64, frames=13, height=60, width=90, text=226
        ),
        _opensora(
            "opensora",
            depth=28,
            heads=16,
            width=1152,
            frames=15,
            rows=60,
            columns=106,
            text=300,
            features=4096,
        ),
    ]
)
"""Published sizes: Latte-1 at 16 x 512 x 512, CogVideoX-2b at 49 x 480 x 720, Open-Sora 1.2 at
51 x 480 x 848."""

TINY = _named(
    [
        replace(_demo(), num_clips=1),
        _latte("latte", depth=2, heads=2, head_dim=8, frames=3, side=12, text=5),
        _latte("latte-attention", depth=1, heads=2, head_dim=8, frames=3, side=16, text=5),
        _cogvideox(
            "cogvideox", depth=2, heads=2, head_dim=16, frames=2, height=12, width=12, text=5
        ),
        _opensora("opensora", depth=2, heads=2, width=32, frames=3, rows=12, columns=12, text=6),
    ]
)
"""To see that everything runs."""


@contextlib.contextmanager
def no_context(index: int, timestep: Tensor) -> Iterator[None]:
    """Returns a context that does nothing, for steps that need none."""
    yield
