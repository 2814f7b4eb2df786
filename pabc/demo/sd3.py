"""Builds, loads and judges the emoji model: a small diffusers `SD3Transformer2DModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from pabc.demo import folder, nearest
from pabc.demo.emoji import SIZE, WEIGHTS, Pictures
from pabc.demo.model import FRACTION, Model, Reuse, to_bytes
from pabc.demo.text import Text
from pabc.schedule import Schedule

MAX_TOKENS = 8
TEXT_DIM = 128
HEADS = 5
HEAD_DIM = 32
BLOCKS = 4
PATCH = 4
IGNORED = frozenset(("a", "an", "the", "of", "on", "at", "and", "with"))
"""Words without a meaning of their own, which become no token."""


class Emoji(Model):
    """Pictures of animals, food and vehicles, sampled by rectified flow with joint attention."""

    name = "emoji"
    about = "picture model"
    judged = (
        "picture and placement: shares of samples to which, of all pictures that the model knows,"
        " and of all ways to mirror and place one, that of the caption is the nearest"
    )
    num_steps = 28
    guidance = 3.5
    shape = (3, SIZE, SIZE)
    examples = (
        "an octopus",
        "mirrored fire engine",
        "a red apple",
        "a cat on the left",
        "a sailboat at the bottom",
        "a croissant",
        "mirrored parrot at the top",
        "a bicycle",
        "a strawberry on the right",
        "a tropical fish",
    )

    def __init__(self, transformer: nn.Module, scheduler: Any, text: Text, known: Pictures) -> None:
        super().__init__(transformer, scheduler, text)
        self.known = known

    def prompts(self, seed: int, count: int) -> list[str]:
        """Returns captions in random order; no picture repeats before all have occurred."""
        return [self.known.phrase(caption) for caption in self.known.shuffle(seed, count)]

    def check_prompt(self, prompt: str) -> None:
        """Raises CaptionError unless `prompt` names one picture, in known words."""
        self.text.tokenize([prompt])
        self.known.parse(prompt)

    def conditions(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Returns encoder_hidden_states (2B, 8, 128) and pooled_projections (2B, 128)."""
        tokens = self.text.tokenize([*[""] * len(prompts), *prompts])
        embedded, pooled = self.text(tokens.to(self.device))
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    def judge(self, samples: torch.Tensor, prompts: list[str]) -> dict[str, float]:
        """Returns the shares of samples whose nearest picture is the one that the prompt names."""
        return nearest.accuracy(self.known, samples, [self.known.parse(each) for each in prompts])

    def pictures(self, samples: torch.Tensor) -> torch.Tensor:
        """Returns samples as single frames (B, 1, 32, 32, 3) of uint8."""
        return to_bytes(samples).permute(0, 2, 3, 1)[:, None]

    def pyramids(self, timesteps: tuple[float, ...], *, mlp: bool) -> dict[str, Reuse]:
        """Returns the pyramid of joint attention, and with `mlp` one of the MLPs too."""
        found = {
            "pabc joint 2": Reuse(
                Schedule.pyramid(timesteps, joint=2, fraction=FRACTION),
                "joint attention at every second step, in the middle 70 % of the steps",
            )
        }
        if mlp:
            found["pabc joint 2, mlp 2"] = Reuse(
                Schedule.pyramid(timesteps, joint=2, mlp=2, fraction=FRACTION),
                "joint attention and MLPs at every second step, in the middle 70 % of the steps",
            )
        return found


def build_transformer() -> SD3Transformer2DModel:
    """Returns the untrained model: 4 joint blocks of width 160, 4x4 patches."""
    return SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=PATCH,
        in_channels=3,
        out_channels=3,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=TEXT_DIM,
        pos_embed_max_size=SIZE // PATCH,
        qk_norm="rms_norm",
    )


def build_text(words: tuple[str, ...]) -> Text:
    """Returns the untrained embedding of `words`."""
    kept = tuple(word for word in words if word not in IGNORED)
    return Text(kept, dim=TEXT_DIM, max_tokens=MAX_TOKENS, ignored=IGNORED)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler: rectified flow with a shift of 3."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def build() -> Emoji:
    """Returns an untrained model."""
    known = Pictures.load()
    return Emoji(build_transformer(), build_scheduler(), build_text(known.words), known)


def load(weights: Path | None = None, device: str | torch.device = "cpu") -> Emoji:
    """Returns the trained model in eval mode, from the folder `weights` or from the package.

    Weights are stored in float16, and loaded as float32.

    Raises FileNotFoundError if files are missing.
    """
    place = Path(weights) if weights is not None else WEIGHTS
    folder.check_files(place, "bench/train_emoji.py")
    transformer = SD3Transformer2DModel.from_pretrained(
        place / "transformer", low_cpu_mem_usage=False
    ).float()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(place / "scheduler")
    text = folder.load_text(place, dim=TEXT_DIM, max_tokens=MAX_TOKENS, ignored=IGNORED)
    return Emoji(transformer, scheduler, text, Pictures.load()).freeze(device)
