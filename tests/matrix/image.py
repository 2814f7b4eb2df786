"""Rows of other images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines import build, quiet, text

from .flux import call_chroma
from .row import Recipe, Row, height, small


def make_sd3() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model, none = build("SD3", num_layers=2), [None] * 7
    return quiet(diffusers.StableDiffusion3Pipeline(model, scheduler, *none))


def call_sd3(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "pooled_prompt_embeds": text(1, 1, 8),
        "negative_prompt_embeds": text(1, 2),
        "negative_pooled_prompt_embeds": text(1, 3, 8),
        "height": height(size),
        "width": 64,
    }


def make_z_image() -> Any:
    model = small(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(diffusers.ZImagePipeline(scheduler, None, None, None, model))


def call_z_image(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": [text(1, 0)[0]],
        "negative_prompt_embeds": [text(1, 1)[0]],
        "height": height(size),
        "width": 64,
    }


def make_lumina_2() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(diffusers.Lumina2Pipeline(build("Lumina 2"), scheduler, None, None, None))


def call_lumina_2(size: int) -> dict[str, Any]:
    call = call_chroma(size)
    return {name: x.bool() if name.endswith("mask") else x for name, x in call.items()}


def make_sana() -> Any:
    model = small(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return quiet(diffusers.SanaPipeline(None, None, None, model, scheduler))


def call_sana(size: int) -> dict[str, Any]:
    more = {"use_resolution_binning": False, "negative_prompt": None}
    return {**call_chroma(size), **more, "height": 192 + 64 * size, "width": 256}


def make_hidream() -> Any:
    """Routed experts; pictures that are no squares are padded."""
    model = small(
        diffusers.HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[8, 6],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.HiDreamImagePipeline(scheduler, *[None] * 9, model)
    pipe.default_sample_size = 8
    return quiet(pipe)


def call_hidream(size: int) -> dict[str, Any]:
    texts = {
        f"{sign}{name}": text(*shape[:1], seed, *shape[1:])
        for seed, sign in enumerate(("", "negative_"))
        for name, shape in (
            ("prompt_embeds_t5", (1, 5, 8)),
            ("prompt_embeds_llama3", (2, 1, 5, 6)),
            ("pooled_prompt_embeds", (1, 8)),
        )
    }
    return {**texts, "height": 64 + 32 * size, "width": 64}


def make_pixart() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    model = build("PixArt", num_layers=1)
    return quiet(diffusers.PixArtSigmaPipeline(None, None, None, model, scheduler))


def call_pixart(size: int) -> dict[str, Any]:
    return {**call_chroma(size), "use_resolution_binning": False, "negative_prompt": None}


def make_aura_flow() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return quiet(diffusers.AuraFlowPipeline(None, None, None, build("AuraFlow"), scheduler))


def make_hunyuan_dit() -> Any:
    model, none = build("HunyuanDiT"), [None] * 2
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    return quiet(
        diffusers.HunyuanDiTPipeline(
            None, *none, model, scheduler, *none, requires_safety_checker=False
        )
    )


def call_hunyuan_dit(size: int) -> dict[str, Any]:
    second = {
        f"{sign}{name}_2": value
        for seed, sign in enumerate(("", "negative_"))
        for name, value in (
            ("prompt_embeds", text(1, 4 + seed, 4, 8)),
            ("prompt_attention_mask", torch.ones(1, 4)),
        )
    }
    return {**call_chroma(size), **second, "use_resolution_binning": False}


ROWS = (
    Row(
        "Stable Diffusion 3.5",
        "StableDiffusion3Pipeline",
        make_sd3,
        call_sd3,
        Recipe(
            "stabilityai/stable-diffusion-3.5-large",
            "prompt, height=1024, width=1024, num_inference_steps=28, guidance_scale=3.5",
        ),
    ),
    Row(
        "Z-Image",
        "ZImagePipeline",
        make_z_image,
        call_z_image,
        Recipe(
            "Tongyi-MAI/Z-Image",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0",
        ),
    ),
    Row(
        "Lumina 2",
        "Lumina2Pipeline",
        make_lumina_2,
        call_lumina_2,
        Recipe(
            "Alpha-VLLM/Lumina-Image-2.0",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0",
        ),
    ),
    Row(
        "Sana",
        "SanaPipeline",
        make_sana,
        call_sana,
        Recipe(
            "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            "prompt, height=1024, width=1024, num_inference_steps=20, guidance_scale=4.5",
        ),
    ),
    Row(
        "HiDream",
        "HiDreamImagePipeline",
        make_hidream,
        call_hidream,
        Recipe(
            "HiDream-ai/HiDream-I1-Full",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0",
            before=(
                'llama = "meta-llama/Meta-Llama-3.1-8B-Instruct"',
                "tokenizer_4 = transformers.AutoTokenizer.from_pretrained(llama)",
                "text_encoder_4 = transformers.LlamaForCausalLM.from_pretrained(",
                "    llama, output_hidden_states=True, torch_dtype=torch.bfloat16",
                ")",
            ),
            parts="tokenizer_4=tokenizer_4, text_encoder_4=text_encoder_4",
        ),
    ),
    Row(
        "PixArt-Sigma",
        "PixArtSigmaPipeline",
        make_pixart,
        call_pixart,
        Recipe(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "prompt, num_inference_steps=20, guidance_scale=4.5",
            dtype="float16",
        ),
    ),
    Row(
        "AuraFlow",
        "AuraFlowPipeline",
        make_aura_flow,
        call_chroma,
        Recipe(
            "fal/AuraFlow-v0.3",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=3.5",
            dtype="float16",
        ),
    ),
    Row(
        "Hunyuan-DiT",
        "HunyuanDiTPipeline",
        make_hunyuan_dit,
        call_hunyuan_dit,
        Recipe(
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
            "prompt, height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0",
            dtype="float16",
        ),
    ),
)
