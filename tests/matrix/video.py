"""Rows of other videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines import (
    build,
    call_allegro,
    call_cogvideox,
    call_latte,
    make_allegro,
    make_cogvideox,
    make_latte,
    quiet,
    text,
)

from .parts import Connectors, StandIn, make_image, ones
from .row import Recipe, Row, height, small


def without_noise(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a call without what the row's seed gives."""
    return {name: value for name, value in call.items() if name not in ("latents", "generator")}


def make_cogvideox_image() -> Any:
    vae = small(
        diffusers.AutoencoderKLCogVideoX,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDPMScheduler()
    model = build("CogVideoX, rotary", num_layers=1, in_channels=8)
    return quiet(diffusers.CogVideoXImageToVideoPipeline(None, None, vae, model, scheduler))


def make_ltx() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    model = build("LTX", num_layers=1)
    return quiet(diffusers.LTXPipeline(scheduler, None, None, None, model))


def call_ltx(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "prompt_attention_mask": ones(1),
        "negative_prompt_embeds": text(1, 1),
        "negative_prompt_attention_mask": ones(1),
        "height": 96 + 32 * size,
        "width": 128,
        "num_frames": 9,
    }


def make_ltx_2() -> Any:
    statistics = {"latents_mean": torch.zeros(4), "latents_std": torch.ones(4)}
    vae = StandIn(
        {"scaling_factor": 1.0},
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        **statistics,
    )
    audio = {"mel_bins": 8, "latent_channels": 2, "sample_rate": 16000, "mel_hop_length": 160}
    audio_vae = StandIn(audio, mel_compression_ratio=4, temporal_compression_ratio=4, **statistics)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(
        diffusers.LTX2Pipeline(
            scheduler, vae, audio_vae, None, None, Connectors(), build("LTX2"), None
        )
    )


def call_ltx_2(size: int) -> dict[str, Any]:
    """With all the guidance that is there by default."""
    return {**call_ltx(size), "spatio_temporal_guidance_blocks": [0]}


def make_mochi() -> Any:
    model = small(
        diffusers.MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=8,
        time_embed_dim=4,
        max_sequence_length=5,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(diffusers.MochiPipeline(scheduler, None, None, None, model))


def call_mochi(size: int) -> dict[str, Any]:
    masks = {
        "prompt_attention_mask": ones(1).bool(),
        "negative_prompt_attention_mask": ones(1).bool(),
    }
    return {**call_ltx(size), **masks, "height": height(size), "width": 64, "num_frames": 7}


ROWS = (
    Row(
        "LTX",
        "LTXPipeline",
        make_ltx,
        call_ltx,
        Recipe(
            "Lightricks/LTX-Video",
            "prompt, negative_prompt=negative_prompt, height=480, width=704, num_frames=161, "
            "num_inference_steps=50, guidance_scale=3.0",
            ".frames[0]",
        ),
    ),
    Row(
        "LTX-2",
        "LTX2Pipeline",
        make_ltx_2,
        call_ltx_2,
        Recipe(
            "Lightricks/LTX-2",
            "prompt, negative_prompt=negative_prompt, height=512, width=768, num_frames=121, "
            "num_inference_steps=30, return_dict=False",
            "",
        ),
    ),
    Row(
        "CogVideoX",
        "CogVideoXPipeline",
        make_cogvideox,
        lambda size: without_noise(call_cogvideox(1, size)),
        Recipe(
            "zai-org/CogVideoX-5b",
            "prompt, num_frames=49, num_inference_steps=50, guidance_scale=6.0",
            ".frames[0]",
        ),
    ),
    Row(
        "CogVideoX, image to video",
        "CogVideoXImageToVideoPipeline",
        make_cogvideox_image,
        lambda size: {**without_noise(call_cogvideox(1, size)), "image": make_image(size)},
        Recipe(
            "zai-org/CogVideoX-5b-I2V",
            "image, prompt, num_frames=49, num_inference_steps=50, guidance_scale=6.0",
            ".frames[0]",
        ),
    ),
    Row(
        "Mochi",
        "MochiPipeline",
        make_mochi,
        call_mochi,
        Recipe(
            "genmo/mochi-1-preview",
            "prompt, num_frames=85, num_inference_steps=64, guidance_scale=4.5",
            ".frames[0]",
        ),
    ),
    Row(
        "Allegro",
        "AllegroPipeline",
        make_allegro,
        lambda size: without_noise(call_allegro(1, size)),
        Recipe(
            "rhymes-ai/Allegro",
            "prompt, num_frames=88, height=720, width=1280, num_inference_steps=100, "
            "guidance_scale=7.5",
            ".frames[0]",
        ),
    ),
    Row(
        "Latte",
        "LattePipeline",
        make_latte,
        lambda size: without_noise(call_latte(1, size)),
        Recipe(
            "maxin-cn/Latte-1",
            'prompt, negative_prompt="", video_length=16, num_inference_steps=50, '
            "guidance_scale=7.5",
            ".frames[0]",
            dtype="float16",
        ),
    ),
)
