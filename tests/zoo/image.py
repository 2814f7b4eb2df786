"""Transformers of images."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models import embeddings

from .entry import SELF_AND_CROSS, B, C, Entry, H, L, W, randn, steps


def make_flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=C,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": randn(B, 12, C),
        "encoder_hidden_states": randn(B, L, 8),
        "pooled_projections": randn(B, 8),
        "timestep": torch.full((B,), 0.3),
        "img_ids": torch.arange(36.0).view(12, 3) % 4,
        "txt_ids": torch.zeros(L, 3),
        "guidance": torch.full((B,), 3.0),
    }


FLUX = Entry("Flux", make_flux, {"*.attn": "joint"})


def make_sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=C,
        out_channels=C,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": randn(B, C, H, W),
        "encoder_hidden_states": randn(B, L, 8),
        "pooled_projections": randn(B, 8),
        "timestep": steps(torch.float32),
    }


SD3 = Entry("SD3", make_sd3, {"*.attn": "joint", "*.attn2": "full"})


def make_pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=C,
        out_channels=2 * C,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": randn(B, C, H, W),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


PIXART = Entry("PixArt", make_pixart, SELF_AND_CROSS)


def make_dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=C,
        out_channels=2 * C,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    return model, {
        "hidden_states": randn(B, C, 8, 8),
        "timestep": steps(),
        "class_labels": torch.tensor([1, 2]),
    }


DIT = Entry("DiT", make_dit, {"*.attn1": "full"})


def make_aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=C,
        out_channels=C,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=8,
        pos_embed_max_size=64,
    )
    return model, {
        "hidden_states": randn(B, C, 8, 8),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": torch.full((B,), 0.3),
    }


AURAFLOW = Entry("AuraFlow", make_aura_flow, {"*.attn": "joint"})


def make_bria_fibo2():
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=C,
        patch_size=2,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=8,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=6,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=10,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )
    return model, {
        "hidden_states": randn(B, C, H, W),
        "timestep": torch.full((B,), 0.3),
        "encoder_hidden_states": randn(B, 2, L, 8),
        "context_latents": [randn(B, C, 4, 6)],
    }


BRIAFIBO2 = Entry(
    "BriaFibo2",
    make_bria_fibo2,
    {
        "perceiver.*": "other",
        "noise_refiner.?.attention": "joint",
        "layers.?.attention": "joint",
        "layers.?.cross_attention": "cross",
    },
)


def make_ernie_image():
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=C,
        out_channels=C,
        patch_size=2,
        text_in_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": randn(B, C, H, W),
        "timestep": torch.full((B,), 3.0),
        "text_bth": randn(B, L, 8),
        "text_lens": torch.tensor([L, L - 2]),
    }


ERNIEIMAGE = Entry("ErnieImage", make_ernie_image, {"*.self_attention": "joint"})


def make_flux2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=C,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, {
        "hidden_states": randn(B, 12, C),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": torch.full((B,), 0.3),
        "img_ids": torch.arange(48.0).view(12, 4) % 4,
        "txt_ids": torch.zeros(L, 4),
        "guidance": torch.full((B,), 3.0),
    }


FLUX2 = Entry("Flux2", make_flux2, {"*.attn": "joint"}, shared="single_*.attn")


def make_hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=C,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=L,
        text_len_t5=4,
    )
    return model, {
        "hidden_states": randn(B, C, 8, 8),
        "timestep": steps(torch.float32),
        "encoder_hidden_states": randn(B, L, 8),
        "text_embedding_mask": torch.ones(B, L),
        "encoder_hidden_states_t5": randn(B, 4, 8),
        "text_embedding_mask_t5": torch.ones(B, 4),
        "image_meta_size": torch.ones(B, 6),
        "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4)),
    }


HUNYUANDIT = Entry("HunyuanDiT", make_hunyuan_dit, {**SELF_AND_CROSS, "*.pooler": "other"})


def make_lumina2():
    """Text and latents written sample by sample into one sequence; refiners for both."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=C,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    return model, {
        "hidden_states": randn(B, C, H, W),
        "timestep": torch.full((B,), 0.3),
        "encoder_hidden_states": randn(B, L, 8),
        "encoder_attention_mask": torch.ones(B, L, dtype=torch.bool),
    }


LUMINA_2 = Entry(
    "Lumina 2",
    make_lumina2,
    {"context_*": "other", "noise_*": "full", "layers.*.attn": "joint"},
)
ENTRIES = (
    FLUX,
    SD3,
    PIXART,
    DIT,
    AURAFLOW,
    BRIAFIBO2,
    ERNIEIMAGE,
    FLUX2,
    HUNYUANDIT,
    LUMINA_2,
)
