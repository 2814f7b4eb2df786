"""Rows of Wan and its kin."""

from __future__ import annotations

from typing import Any

import diffusers
from pipelines import build, make_two_experts, make_wan, quiet, text

from .parts import make_image, make_image_encoder, make_image_processor
from .row import Recipe, Row, height, small

FRAMES = 9
LATENT_CHANNELS = 4


def make_vae() -> Any:
    """Returns a VAE that halves a picture three times, and the frames twice."""
    return small(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def call_wan(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "negative_prompt_embeds": text(1, 1),
        "height": height(size),
        "width": 64,
        "num_frames": FRAMES,
    }


def make_vace() -> Any:
    model = small(
        diffusers.WanVACETransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=2 * LATENT_CHANNELS + 64,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(diffusers.WanVACEPipeline(None, None, make_vae(), scheduler, model))


def make_image_to_video() -> Any:
    model = build(
        "Wan", num_layers=1, in_channels=2 * LATENT_CHANNELS + 4, image_dim=8, added_kv_proj_dim=24
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    encoder = make_image_encoder()
    return quiet(
        diffusers.WanImageToVideoPipeline(
            None, None, make_vae(), scheduler, make_image_processor(), encoder, model
        )
    )


def call_image_to_video(size: int) -> dict[str, Any]:
    return {**call_wan(size), "image": make_image(size)}


ROWS = (
    Row(
        "Wan 2.1",
        "WanPipeline",
        make_wan,
        call_wan,
        Recipe(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "prompt, negative_prompt=negative_prompt, height=480, width=832, num_frames=81, "
            "num_inference_steps=50, guidance_scale=5.0",
            ".frames[0]",
        ),
    ),
    Row(
        "Wan 2.2, two experts",
        "WanPipeline",
        make_two_experts,
        call_wan,
        Recipe(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "prompt, negative_prompt=negative_prompt, height=480, width=832, num_frames=81, "
            "num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0",
            ".frames[0]",
        ),
    ),
    Row(
        "Wan VACE",
        "WanVACEPipeline",
        make_vace,
        call_wan,
        Recipe(
            "Wan-AI/Wan2.1-VACE-14B-diffusers",
            "prompt, video=frames, mask=masks, height=480, width=832, num_frames=81, "
            "num_inference_steps=30, guidance_scale=5.0",
            ".frames[0]",
        ),
    ),
    Row(
        "Wan 2.1, image to video",
        "WanImageToVideoPipeline",
        make_image_to_video,
        call_image_to_video,
        Recipe(
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            "image, prompt, negative_prompt=negative_prompt, height=480, width=832, "
            "num_frames=81, num_inference_steps=40, guidance_scale=5.0",
            ".frames[0]",
        ),
    ),
)
