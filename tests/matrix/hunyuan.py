"""Rows of HunyuanVideo and its kin."""

from __future__ import annotations

from typing import Any

import diffusers
from pipelines import build, quiet, text

from .parts import StandIn, make_image, make_image_encoder, make_image_processor, ones
from .row import Recipe, Row, height, small


def make_hunyuan_video() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    model = build("HunyuanVideo", patch_size=2)
    return quiet(diffusers.HunyuanVideoPipeline(None, None, model, None, scheduler, None, None))


def call_hunyuan_video(size: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text(1, 0),
        "pooled_prompt_embeds": text(1, 1, 6),
        "prompt_attention_mask": ones(1),
        "height": height(size),
        "width": 64,
        "num_frames": 9,
    }


def make_hunyuan_video_1_5() -> Any:
    model = small(
        diffusers.HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=8,
        text_embed_2_dim=6,
        image_embed_dim=6,
        rope_axes_dim=(2, 4, 4),
        target_size=64,
        task_type="t2v",
    )
    vae = StandIn({"latent_channels": 4}, temporal_compression_ratio=4, spatial_compression_ratio=8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    pipe = diffusers.HunyuanVideo15Pipeline(None, None, model, vae, scheduler, None, None, guider)
    pipe.vision_num_semantic_tokens = 4  # of an image that is not there, 729 else
    return quiet(pipe)


def call_hunyuan_video_1_5(size: int) -> dict[str, Any]:
    texts = {
        f"{sign}prompt_embeds{which}": text(1, seed, 5, width)
        for seed, (sign, which, width) in enumerate(
            [("", "", 8), ("negative_", "", 8), ("", "_2", 6), ("negative_", "_2", 6)]
        )
    }
    masks = {name.replace("embeds", "embeds_mask"): ones(1) for name in texts}
    return {**texts, **masks, "height": height(size), "width": 64, "num_frames": 9}


def make_framepack() -> Any:
    model = small(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=8,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    vae = small(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vision = make_image_encoder(), make_image_processor()
    return quiet(
        diffusers.HunyuanVideoFramepackPipeline(
            None, None, model, vae, scheduler, None, None, *vision
        )
    )


def call_framepack(size: int) -> dict[str, Any]:
    """Two sections, each with a loop of its own."""
    call = {**call_hunyuan_video(size), "image": make_image(size)}
    return {**call, "latent_window_size": 3, "num_frames": 18}


ROWS = (
    Row(
        "HunyuanVideo",
        "HunyuanVideoPipeline",
        make_hunyuan_video,
        call_hunyuan_video,
        Recipe(
            "hunyuanvideo-community/HunyuanVideo",
            "prompt, height=720, width=1280, num_frames=61, num_inference_steps=50, "
            "guidance_scale=6.0",
            ".frames[0]",
        ),
    ),
    Row(
        "HunyuanVideo 1.5",
        "HunyuanVideo15Pipeline",
        make_hunyuan_video_1_5,
        call_hunyuan_video_1_5,
        Recipe(
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            "prompt, num_frames=121, num_inference_steps=50",
            ".frames[0]",
        ),
    ),
    Row(
        "Framepack",
        "HunyuanVideoFramepackPipeline",
        make_framepack,
        call_framepack,
        Recipe(
            "hunyuanvideo-community/HunyuanVideo",
            "image, prompt=prompt, height=832, width=480, num_frames=91, "
            "num_inference_steps=30, guidance_scale=9.0",
            ".frames[0]",
            before=(
                "transformer = diffusers.HunyuanVideoFramepackTransformer3DModel.from_pretrained(",
                '    "lllyasviel/FramePackI2V_HY", torch_dtype=torch.bfloat16',
                ")",
                'vision = "lllyasviel/flux_redux_bfl"',
                "feature_extractor = transformers.SiglipImageProcessor.from_pretrained(",
                '    vision, subfolder="feature_extractor"',
                ")",
                "image_encoder = transformers.SiglipVisionModel.from_pretrained(",
                '    vision, subfolder="image_encoder", torch_dtype=torch.bfloat16',
                ")",
            ),
            parts="transformer=transformer, image_encoder=image_encoder, "
            "feature_extractor=feature_extractor",
        ),
    ),
)
