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
    """A model, one call of it, and the kind of each attention module by name pattern.

    `shared`: pattern of attention modules that also hold an MLP, both in one output projection.
    """

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    kinds: Mapping[str, str]
    shared: str = ""

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode, nothing in it zero, and the keyword arguments of a call."""
        torch.manual_seed(0)
        model, call = self.make()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model.eval(), {"return_dict": False, **call}


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


def make_ace_step():
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=12,
        audio_acoustic_hidden_dim=C,
        sliding_window=3,
        encoder_hidden_size=8,
    )
    return model, {
        "hidden_states": randn(B, 14, C),
        "timestep": torch.full((B,), 0.3),
        "timestep_r": torch.full((B,), 0.1),
        "encoder_hidden_states": randn(B, L, 8),
        "context_latents": randn(B, 14, 8),
    }


def make_chrono_edit():
    model = diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=C,
        out_channels=C,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=6,
        added_kv_proj_dim=24,
    )
    return model, {
        "hidden_states": randn(B, C, 2, H, W),
        "timestep": steps(),
        "encoder_hidden_states": randn(B, 512, 8),
        "encoder_hidden_states_image": randn(B, 4, 6),
    }


def make_consisid():
    model = diffusers.ConsisIDTransformer3DModel(
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
        max_text_seq_length=L,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=6,
        LFE_vit_dim=6,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=4,
        LFE_output_dim=21,
        LFE_ff_mult=2,
    )
    grid = (H // 2, W // 2)
    return model, {
        "hidden_states": randn(B, T, C, H, W),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
        "image_rotary_emb": embeddings.get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, T),
        "id_cond": randn(B, 6),
        "id_vit_hidden": [randn(B, 3, 6) for _ in range(5)],
    }


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


def make_cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=C + 1,
        out_channels=C,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": randn(B, C, T, H, W),
        "timestep": torch.full((B, 1, T, 1, 1), 0.3),
        "encoder_hidden_states": randn(B, L, 16),
        "condition_mask": torch.ones(B, 1, T, H, W),
        "fps": 16,
    }


def make_easy_animate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * C + 1,
        out_channels=C,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=8,
        text_embed_dim_t5=8,
        after_norm=True,
    )
    return model, {
        "hidden_states": randn(B, C, T, H, W),
        "timestep": steps(),
        "encoder_hidden_states": randn(B, L, 8),
        "encoder_hidden_states_t5": randn(B, L, 8),
        "inpaint_latents": randn(B, C + 1, T, H, W),
    }


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


def make_kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=C,
        in_text_dim=8,
        in_text_dim2=6,
        time_dim=16,
        out_visual_dim=C,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )
    return model, {
        "hidden_states": randn(B, T, H, W, C),
        "encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(),
        "pooled_projections": randn(B, 6),
        "visual_rope_pos": [torch.arange(n) for n in (T, H // 2, W // 2)],
        "text_rope_pos": torch.arange(L),
        "return_dict": True,  # without, it returns a tensor rather than a tuple
    }


def make_ltx2():
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=C,
        out_channels=C,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=C,
        audio_out_channels=C,
        audio_num_attention_heads=2,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=12,
        num_layers=1,
        caption_channels=8,
        rope_double_precision=False,
    )
    return model, {
        "hidden_states": randn(B, 24, C),
        "audio_hidden_states": randn(B, 7, C),
        "encoder_hidden_states": randn(B, L, 8),
        "audio_encoder_hidden_states": randn(B, L, 8),
        "timestep": steps(torch.float32),
        "encoder_attention_mask": torch.ones(B, L),
        "audio_encoder_attention_mask": torch.ones(B, L),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 7,
    }


def make_kandinsky6():
    """Video and audio, each with a stream of its own, and attention between them."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=C,
        out_visual_dim=C,
        in_text_dim=8,
        in_text_dim2=6,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
        visual_cond=False,
        in_audio_dim=5,
        out_audio_dim=5,
    )
    return model, {
        "hidden_states": randn(B, T, H, W, C),
        "audio_hidden_states": randn(B, 7, 5),
        "encoder_hidden_states": randn(B, L, 8),
        "pooled_projections": randn(B, 6),
        "timestep": steps(torch.float32),
        "encoder_attention_mask": torch.ones(B, L, dtype=torch.bool),
    }


def make_stable_audio():
    model = diffusers.StableAudioDiTModel(
        sample_size=12,
        in_channels=C,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=C,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=8,
    )
    rotary = embeddings.get_1d_rotary_pos_embed(8, 13, use_real=True, repeat_interleave_real=False)
    return model, {
        "hidden_states": randn(B, C, 12),
        "timestep": steps(),
        "encoder_hidden_states": randn(B, L, 8),
        "global_hidden_states": randn(B, 1, 8),
        "rotary_embedding": rotary,
    }


def make_hunyuan_token_replace():
    """The first frame's tokens have gates of their own."""
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
        image_condition_type="token_replace",
    )
    return model, make_hunyuan_video()[1]


def make_motif():
    """Cross attention on the joint attention's output, and a decoder without text."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=C,
        out_channels=C,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=8,
        image_embed_dim=6,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return model, {
        "hidden_states": randn(B, C, T, H, W),
        "timestep": steps(),
        "encoder_hidden_states": randn(B, L, 8),
        "encoder_attention_mask": torch.ones(B, L),
        "image_embeds": randn(B, 3, 6),
    }


def make_temporal():
    """Frames in the batch."""
    model = diffusers.TransformerTemporalModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )
    return model, {"hidden_states": randn(B * T, 16, H, W), "num_frames": T}


def make_minimax():
    """Text, video and audio tokens written into one packed sequence."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=C,
        audio_in_channels=5,
        text_dim=8,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    tags = torch.tensor([1] * L + [0] * 18 + [2] * 4)  # text, video, audio
    return model, {
        "hidden_states": randn(1, 18, 4 * C),
        "audio_hidden_states": randn(1, 4, 5),
        "encoder_hidden_states": randn(1, L, 8),
        "timestep": torch.tensor([0.3, 0.5]),
        "timestep_indices": tags // 2,
        "token_tags": tags,
        "position_ids": torch.arange(3 * len(tags)).view(-1, 3) % 5,
        **{
            f"{name}_indices": (tags == tag).nonzero()[:, 0]
            for tag, name in enumerate(("video", "text", "audio"))
        },
    }


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
    Entry("AceStep", make_ace_step, {"*.self_attn": "full", "*.cross_attn": "cross"}),
    Entry("ChronoEdit", make_chrono_edit, _SELF_AND_CROSS),
    Entry(
        "ConsisID",
        make_consisid,
        {
            "*.attn1": "joint",
            "perceiver_cross_attention.?": "cross",
            "local_facial_extractor.*": "other",
        },
    ),
    Entry(
        "BriaFibo2",
        make_bria_fibo2,
        {
            "perceiver.*": "other",
            "noise_refiner.?.attention": "joint",
            "layers.?.attention": "joint",
            "layers.?.cross_attention": "cross",
        },
    ),
    Entry("Cosmos", make_cosmos, _SELF_AND_CROSS),
    Entry("EasyAnimate", make_easy_animate, {"*.attn1": "joint"}),
    Entry("ErnieImage", make_ernie_image, {"*.self_attention": "joint"}),
    Entry("Flux2", make_flux2, {"*.attn": "joint"}, shared="single_*.attn"),
    Entry("HunyuanDiT", make_hunyuan_dit, {**_SELF_AND_CROSS, "*.pooler": "other"}),
    Entry(
        "Kandinsky5",
        make_kandinsky5,
        {
            "text_*.self_attention": "other",
            "visual_*.self_attention": "full",
            "visual_*.cross_attention": "cross",
        },
    ),
    Entry(
        "LTX2",
        make_ltx2,
        {
            "*.audio_attn1": "full",
            "*.audio_attn2": "cross",
            "*.video_to_audio_attn": "cross",
            "*.audio_to_video_attn": "cross",
            **_SELF_AND_CROSS,
        },
    ),
    Entry(
        "Kandinsky6",
        make_kandinsky6,
        {"*_text_*.attn": "other", "*.self_attention": "full", "*cross_attention": "cross"},
    ),
    Entry("StableAudio", make_stable_audio, {"*.attn1": "joint", "*.attn2": "cross"}),
    Entry(
        "HunyuanVideo, first frame",
        make_hunyuan_token_replace,
        {"context_embedder.*": "other", "*_blocks.?.attn": "joint"},
    ),
    Entry(
        "MotifVideo",
        make_motif,
        {"*.cross_attn": "cross", "single_*.1.attn": "full", "*.attn": "joint"},
    ),
    Entry("Temporal", make_temporal, {"*.attn?": "temporal"}),
    Entry("MiniMax-H3", make_minimax, {"token_refiner.*": "other", "*.attn": "joint"}),
    Entry(
        "Lumina 2",
        make_lumina2,
        {"context_*": "other", "noise_*": "full", "layers.*.attn": "joint"},
    ),
)
