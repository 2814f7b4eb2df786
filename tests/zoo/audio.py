"""Transformers of sound, alone or beside video."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models import embeddings

from .entry import SELF_AND_CROSS, B, C, Entry, L, randn, steps


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


ACESTEP = Entry("AceStep", make_ace_step, {"*.self_attn": "full", "*.cross_attn": "cross"})


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


LTX2 = Entry(
    "LTX2",
    make_ltx2,
    {
        "*.audio_attn1": "full",
        "*.audio_attn2": "cross",
        "*.video_to_audio_attn": "cross",
        "*.audio_to_video_attn": "cross",
        **SELF_AND_CROSS,
    },
)


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


STABLEAUDIO = Entry("StableAudio", make_stable_audio, {"*.attn1": "joint", "*.attn2": "cross"})


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


MINIMAX_H3 = Entry("MiniMax-H3", make_minimax, {"token_refiner.*": "other", "*.attn": "joint"})
ENTRIES = (
    ACESTEP,
    LTX2,
    STABLEAUDIO,
    MINIMAX_H3,
)
