"""Rows of audio, and of models of the world."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines import build, quiet, text

from .parts import StandIn
from .row import Recipe, Row, height, small


def make_stable_audio() -> Any:
    vae = StandIn({"sampling_rate": 100, "audio_channels": 2}, hop_length=8)
    projection = small(
        diffusers.StableAudioProjectionModel,
        text_encoder_dim=8,
        conditioning_dim=8,
        min_value=0,
        max_value=32,
    )
    model = build("StableAudio", global_states_input_dim=16)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    return quiet(diffusers.StableAudioPipeline(vae, None, projection, None, model, scheduler))


def call_stable_audio(size: int) -> dict[str, Any]:
    """The length is the model's: another size is another number of prompts."""
    return {
        "prompt_embeds": text(1 + size, 0),
        "attention_mask": torch.ones(1 + size, 5),
        "negative_prompt_embeds": text(1 + size, 1),
        "negative_attention_mask": torch.ones(1 + size, 5),
    }


def make_kandinsky_5() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    model, none = build("Kandinsky5"), [None] * 5
    return quiet(diffusers.Kandinsky5T2VPipeline(model, *none, scheduler))


def call_kandinsky_5(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds_qwen": text(1, 0),
        "prompt_embeds_clip": text(1, 1, 6),
        "prompt_cu_seqlens": torch.tensor([0, 5]),
        "negative_prompt_embeds_qwen": text(1, 2),
        "negative_prompt_embeds_clip": text(1, 3, 6),
        "negative_prompt_cu_seqlens": torch.tensor([0, 5]),
        "height": height(size),
        "width": 64,
        "num_frames": 9,
    }


def make_cosmos() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    model = build("Cosmos", in_channels=4, num_layers=1)  # a padding mask would need torchvision
    return quiet(
        diffusers.Cosmos2TextToImagePipeline(
            None, None, model, None, scheduler, safety_checker=StandIn({})
        )
    )


def call_cosmos(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0, 5, 16),
        "negative_prompt_embeds": text(1, 1, 5, 16),
        "height": height(size),
        "width": 64,
    }


ROWS = (
    Row(
        "Stable Audio",
        "StableAudioPipeline",
        make_stable_audio,
        call_stable_audio,
        Recipe(
            "stabilityai/stable-audio-open-1.0",
            "prompt, negative_prompt=negative_prompt, num_inference_steps=100, "
            "audio_end_in_s=10.0, guidance_scale=7.0",
            ".audios[0]",
            dtype="float16",
        ),
    ),
    Row(
        "Kandinsky 5",
        "Kandinsky5T2VPipeline",
        make_kandinsky_5,
        call_kandinsky_5,
        Recipe(
            "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
            "prompt, height=512, width=768, num_frames=121, num_inference_steps=50, "
            "guidance_scale=5.0",
            ".frames[0]",
        ),
    ),
    Row(
        "Cosmos-Predict 2",
        "Cosmos2TextToImagePipeline",
        make_cosmos,
        call_cosmos,
        Recipe(
            "nvidia/Cosmos-Predict2-2B-Text2Image",
            "prompt, negative_prompt=negative_prompt, num_inference_steps=35, guidance_scale=7.0",
        ),
    ),
)
