"""Builds, loads and judges the digits model: a small diffusers `LatteTransformer3DModel`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from pabc import presets
from pabc.demo import digits, folder
from pabc.demo.digits import CANVAS, FRAMES, WORDS
from pabc.demo.judge import Judge
from pabc.demo.model import FRACTION, Model, Reuse, to_bytes, to_unit
from pabc.demo.text import Text
from pabc.schedule import Schedule

WEIGHTS = Path(__file__).parent / "weights"
MAX_TOKENS = 12
TEXT_DIM = 64


class Digits(Model):
    """Clips of a handwritten digit that moves, sampled by DDIM."""

    name = "digits"
    about = "video model"
    judged = (
        "digit and direction: shares of clips in which a classifier reads what the caption says"
    )
    num_steps = 50
    guidance = 2.5
    shape = (1, FRAMES, CANVAS, CANVAS)
    examples = digits.PROMPTS
    # Guidance pushes samples out of range. The scheduler clips them, and must derive the noise from
    # the clipped sample, or errors accumulate over many steps.
    step_options = MappingProxyType({"use_clipped_model_output": True})

    @cached_property
    def _judge(self) -> Judge:
        return Judge()

    def prompts(self, seed: int, count: int) -> list[str]:
        """Returns captions in random order; none of the 240 repeats before all have occurred."""
        return [str(caption) for caption in digits.shuffled_captions(count, seed)]

    def check_prompt(self, prompt: str) -> None:
        """Raises CaptionError unless `prompt` has a digit, a direction, and only known words."""
        digits.parse(prompt)
        self.text.tokenize([prompt])

    def conditions(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Returns encoder_hidden_states (2B, 12, 64)."""
        return {"encoder_hidden_states": self.text.encode([*[""] * len(prompts), *prompts])}

    def judge(self, samples: torch.Tensor, prompts: list[str]) -> dict[str, float]:
        """Returns the shares of samples whose digit, and whose direction, is the prompt's."""
        return self._judge.accuracy(to_unit(samples[:, 0]), prompts)

    def pictures(self, samples: torch.Tensor) -> torch.Tensor:
        """Returns samples as gray frames (B, 8, 16, 16, 3) of uint8."""
        return to_bytes(samples[:, 0])[..., None].expand(-1, -1, -1, -1, 3)

    def pyramids(self, timesteps: tuple[float, ...], *, mlp: bool) -> dict[str, Reuse]:
        """Returns the published pyramid, and a wider one in the middle of the steps."""
        found = {
            "pabc 2/3/6": Reuse(
                presets.latte(timesteps, mlp=False),
                "the published Latte preset, without its MLP broadcast",
            ),
            "pabc 2/4/6": Reuse(
                Schedule.pyramid(timesteps, spatial=2, temporal=4, cross=6, fraction=FRACTION),
                "spatial, temporal, cross attention, in the middle 70 % of the steps",
            ),
        }
        if mlp:
            found["pabc 2/3/6 + mlp"] = Reuse(
                presets.latte(timesteps), "the published Latte preset with its MLP broadcast"
            )
        return found


def build_transformer() -> LatteTransformer3DModel:
    """Returns the untrained model: 6 spatial and 6 temporal blocks of width 128, 4x4 patches."""
    return LatteTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        cross_attention_dim=128,
        attention_bias=True,
        sample_size=CANVAS,
        patch_size=4,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=FRAMES,
    )


def build_text() -> Text:
    """Returns the untrained embedding of all words of the captions."""
    return Text(WORDS, dim=TEXT_DIM, max_tokens=MAX_TOKENS)


def build_scheduler() -> DDIMScheduler:
    """Returns the scheduler: cosine schedule, v-prediction, sampling from pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )


def build() -> Digits:
    """Returns an untrained model."""
    return Digits(build_transformer(), build_scheduler(), build_text())


def load(weights: Path | None = None, device: str | torch.device = "cpu") -> Digits:
    """Returns the trained model in eval mode, from the folder `weights` or from the package.

    Raises FileNotFoundError if files are missing.
    """
    place = Path(weights) if weights is not None else WEIGHTS
    folder.check_files(place, "bench/train_demo.py")
    transformer = LatteTransformer3DModel.from_pretrained(
        place / "transformer", low_cpu_mem_usage=False
    )
    scheduler = DDIMScheduler.from_pretrained(place / "scheduler")
    text = folder.load_text(place, dim=TEXT_DIM, max_tokens=MAX_TOKENS)
    return Digits(transformer, scheduler, text).freeze(device)


def load_transformer() -> LatteTransformer3DModel:
    """Returns the trained transformer, on the CPU in eval mode."""
    return load().transformer
