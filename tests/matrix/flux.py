"""Rows of Flux and those that work alike, which pack the pixels of four latents into a token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from pipelines import build, call_flux, make_flux, quiet, text
from torch import Tensor, nn

from .parts import StandIn, make_image, ones
from .row import Recipe, Row, height, small
from .video import without_noise


def make_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def make_kontext() -> Any:
    vae = small(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
    )
    model = build("Flux", in_channels=16, num_single_layers=1)
    none = [None] * 4
    return quiet(diffusers.FluxKontextPipeline(make_scheduler(), vae, *none, model))


def call_kontext(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "pooled_prompt_embeds": text(1, 1, 8),
        "image": make_image(0),
        "height": height(size),
        "width": 64,
        "max_area": height(size) * 64,
        "_auto_resize": False,
    }


def make_flux_2() -> Any:
    vae = StandIn({"block_out_channels": (4,) * 4, "batch_norm_eps": 1e-4}, bn=nn.BatchNorm2d(16))
    model = build("Flux2", in_channels=16, num_single_layers=1)
    return quiet(diffusers.Flux2Pipeline(make_scheduler(), vae, None, None, model))


def call_flux_2(size: int) -> dict[str, Any]:
    return {"prompt_embeds": text(1, 0), "height": height(size), "width": 64}


def make_chroma() -> Any:
    model = small(
        diffusers.ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return quiet(diffusers.ChromaPipeline(make_scheduler(), None, None, None, model))


def call_chroma(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "prompt_attention_mask": ones(1),
        "negative_prompt_embeds": text(1, 1),
        "negative_prompt_attention_mask": ones(1),
        "height": height(size),
        "width": 64,
    }


def make_qwen_model() -> Any:
    return small(
        diffusers.QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def make_qwen() -> Any:
    return quiet(diffusers.QwenImagePipeline(make_scheduler(), None, None, None, make_qwen_model()))


def call_qwen(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "prompt_embeds_mask": ones(1).long(),
        "negative_prompt_embeds": text(1, 1),
        "negative_prompt_embeds_mask": ones(1).long(),
        "height": height(size),
        "width": 64,
    }


class Means(StandIn):
    """A VAE whose latents are means of 64 times 64 pixels: pictures are a megapixel at least."""

    def encode(self, pictures: Tensor) -> Any:
        means = torch.nn.functional.avg_pool3d(pictures, (1, 64, 64))
        return SimpleNamespace(latents=torch.cat([means, means[:, :1]], dim=1))


def make_qwen_edit() -> Any:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = Means({"z_dim": 4, **statistics}, temperal_downsample=[True] * 6)
    none = [None] * 3
    return quiet(diffusers.QwenImageEditPipeline(make_scheduler(), vae, *none, make_qwen_model()))


def call_qwen_edit(size: int) -> dict[str, Any]:
    return {
        **call_qwen(size),
        "image": make_image(0),
        "height": 256 + 128 * size,
        "width": 512,
    }


ROWS = (
    Row(
        "Flux",
        "FluxPipeline",
        make_flux,
        lambda size: without_noise(call_flux(1, size)),
        Recipe(
            "black-forest-labs/FLUX.1-dev",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=3.5",
        ),
    ),
    Row(
        "Flux Kontext",
        "FluxKontextPipeline",
        make_kontext,
        call_kontext,
        Recipe(
            "black-forest-labs/FLUX.1-Kontext-dev",
            "image, prompt, num_inference_steps=28, guidance_scale=2.5",
        ),
    ),
    Row(
        "Flux 2",
        "Flux2Pipeline",
        make_flux_2,
        call_flux_2,
        Recipe(
            "black-forest-labs/FLUX.2-dev",
            "prompt=prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0",
        ),
    ),
    Row(
        "Chroma",
        "ChromaPipeline",
        make_chroma,
        call_chroma,
        Recipe(
            "lodestones/Chroma1-HD",
            "prompt, negative_prompt=negative_prompt, num_inference_steps=40, guidance_scale=3.0",
        ),
    ),
    Row(
        "Qwen-Image",
        "QwenImagePipeline",
        make_qwen,
        call_qwen,
        Recipe(
            "Qwen/Qwen-Image",
            'prompt, negative_prompt=" ", height=1328, width=1328, num_inference_steps=50, '
            "true_cfg_scale=4.0",
        ),
    ),
    Row(
        "Qwen-Image, edit",
        "QwenImageEditPipeline",
        make_qwen_edit,
        call_qwen_edit,
        Recipe(
            "Qwen/Qwen-Image-Edit",
            'image, prompt, negative_prompt=" ", num_inference_steps=50, true_cfg_scale=4.0',
        ),
    ),
)
