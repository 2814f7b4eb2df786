"""Transformers of videos."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models import embeddings

from .entry import SELF_AND_CROSS, B, C, Entry, H, L, T, W, randn, steps


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


LATTE = Entry(
    "Latte",
    make_latte,
    {
        "temporal_*.attn1": "temporal",
        "transformer_*.attn1": "spatial",
        "transformer_*.attn2": "cross",
    },
)


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


COGVIDEOX = Entry("CogVideoX", lambda: make_cogvideox(False), {"*.attn1": "joint"})
COGVIDEOX_ROTARY = Entry("CogVideoX, rotary", lambda: make_cogvideox(True), {"*.attn1": "joint"})


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


ALLEGRO = Entry("Allegro", make_allegro, SELF_AND_CROSS)


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


WAN = Entry("Wan", make_wan, SELF_AND_CROSS)


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


LTX = Entry("LTX", make_ltx, SELF_AND_CROSS)


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


HUNYUANVIDEO = Entry(
    "HunyuanVideo",
    make_hunyuan_video,
    {"context_embedder.*": "other", "*_blocks.?.attn": "joint"},
)


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


CHRONOEDIT = Entry("ChronoEdit", make_chrono_edit, SELF_AND_CROSS)


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


CONSISID = Entry(
    "ConsisID",
    make_consisid,
    {
        "*.attn1": "joint",
        "perceiver_cross_attention.?": "cross",
        "local_facial_extractor.*": "other",
    },
)


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


COSMOS = Entry("Cosmos", make_cosmos, SELF_AND_CROSS)


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


EASYANIMATE = Entry("EasyAnimate", make_easy_animate, {"*.attn1": "joint"})


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


KANDINSKY5 = Entry(
    "Kandinsky5",
    make_kandinsky5,
    {
        "text_*.self_attention": "other",
        "visual_*.self_attention": "full",
        "visual_*.cross_attention": "cross",
    },
)


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


KANDINSKY6 = Entry(
    "Kandinsky6",
    make_kandinsky6,
    {"*_text_*.attn": "other", "*.self_attention": "full", "*cross_attention": "cross"},
)


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


HUNYUANVIDEO_FIRST_FRAME = Entry(
    "HunyuanVideo, first frame",
    make_hunyuan_token_replace,
    {"context_embedder.*": "other", "*_blocks.?.attn": "joint"},
)


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


MOTIFVIDEO = Entry(
    "MotifVideo",
    make_motif,
    {"*.cross_attn": "cross", "single_*.1.attn": "full", "*.attn": "joint"},
)


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


TEMPORAL = Entry("Temporal", make_temporal, {"*.attn?": "temporal"})
ENTRIES = (
    LATTE,
    COGVIDEOX,
    COGVIDEOX_ROTARY,
    ALLEGRO,
    WAN,
    LTX,
    HUNYUANVIDEO,
    CHRONOEDIT,
    CONSISID,
    COSMOS,
    EASYANIMATE,
    KANDINSKY5,
    KANDINSKY6,
    HUNYUANVIDEO_FIRST_FRAME,
    MOTIFVIDEO,
    TEMPORAL,
)
