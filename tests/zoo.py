"""diffusers' transformers at small sizes with random weights, and the kinds of their attentions.

Shapes: B batch, T frames, H x W latent pixels, N tokens, L text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor, nn

B, T, H, W, L, C = 2, 3, 6, 8, 5, 4


@dataclass(frozen=True)
class Entry:
    """A model, one call of it, and the kind of each attention module by name pattern."""

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    kinds: Mapping[str, str]

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode, nothing in it zero, and the keyword arguments of a call."""
        torch.manual_seed(0)
        model, call = self.make()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model.eval(), {**call, "return_dict": False}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def steps(dtype: torch.dtype = torch.long) -> Tensor:
    return torch.full((B,), 3, dtype=dtype)


def make_latte():
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=C,
        out_channels=C,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=8,
        video_length=T,
    )
    latents = randn(B, C, T, H, W)
    return model, {
        "hidden_states": latents,
        "timestep": steps(),
        "encoder_hidden_states": randn(B, L, 8),
    }


def make_cogvideox(rotary: bool):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=C,
        out_channels=C,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=W,
        sample_height=H,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=L,
        use_rotary_positional_embeddings=rotary,
    )
    call = {
        "hidden_states": randn(B, T, C, H, W),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
    }
    if rotary:
        grid = (H // 2, W // 2)
        call["image_rotary_emb"] = embeddings.get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, T)
    return model, call


def make_allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=C,
        out_channels=C,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=H,
        sample_width=W,
        sample_frames=T,
        caption_channels=8,
    )
    (freqs, grid) = _allegro_rotary()
    return model, {
        "hidden_states": randn(B, C, T, H, W),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
        "attention_mask": torch.ones(B, T, H, W),
        "encoder_attention_mask": torch.ones(B, L),
        "image_rotary_emb": (freqs, grid),
    }


def _allegro_rotary():
    rows, columns = H // 2, W // 2
    freqs_t, freqs_h, freqs_w, *grid = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=T,
    )
    positions = torch.cartesian_prod(*(torch.as_tensor(g).long() for g in grid))
    return (freqs_t, freqs_h, freqs_w), tuple(positions.T.reshape(3, 1, -1))


def make_wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=C,
        out_channels=C,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": randn(B, C, T, H, W),
        "timestep": steps(),
        "encoder_hidden_states": randn(B, L, 8),
    }


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


def make_ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=C,
        out_channels=C,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=8,
    )
    return model, {
        "hidden_states": randn(B, 24, C),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
        "encoder_attention_mask": torch.ones(B, L, dtype=torch.bool),
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }


def make_hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=C,
        out_channels=C,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=8,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": randn(B, C, T, 4, 6),
        "encoder_hidden_states": randn(B, L, 8),
        "encoder_attention_mask": torch.ones(B, L, dtype=torch.long),
        "pooled_projections": randn(B, 6),
        "timestep": steps(),
        "guidance": torch.full((B,), 6.0),
    }


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


_SELF_AND_CROSS = {"*.attn1": "full", "*.attn2": "cross"}
ENTRIES = (
    Entry(
        "Latte",
        make_latte,
        {
            "temporal_*.attn1": "temporal",
            "transformer_*.attn1": "spatial",
            "transformer_*.attn2": "cross",
        },
    ),
    Entry("CogVideoX", lambda: make_cogvideox(False), {"*.attn1": "joint"}),
    Entry("CogVideoX, rotary", lambda: make_cogvideox(True), {"*.attn1": "joint"}),
    Entry("Allegro", make_allegro, _SELF_AND_CROSS),
    Entry("Wan", make_wan, _SELF_AND_CROSS),
    Entry("Flux", make_flux, {"*.attn": "joint"}),
    Entry("SD3", make_sd3, {"*.attn": "joint", "*.attn2": "full"}),
    Entry("PixArt", make_pixart, _SELF_AND_CROSS),
    Entry("DiT", make_dit, {"*.attn1": "full"}),
    Entry("LTX", make_ltx, _SELF_AND_CROSS),
    Entry(
        "HunyuanVideo",
        make_hunyuan_video,
        {"context_embedder.*": "other", "*_blocks.?.attn": "joint"},
    ),
    Entry("AuraFlow", make_aura_flow, {"*.attn": "joint"}),
)
