"""Builds, saves and loads the demo's model: a small diffusers `LatteTransformer3DModel`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from pabc.demo.digits import CANVAS, FRAMES, WORDS, split_words

WEIGHTS = Path(__file__).parent / "weights"
MAX_TOKENS = 12
TEXT_DIM = 64
PAD = "<pad>"


class Text(nn.Module):
    """A tokenizer of words and its trained embedding table."""

    def __init__(self, vocab: tuple[str, ...] = (PAD, *WORDS), dim: int = TEXT_DIM) -> None:
        super().__init__()
        self.vocab = {word: index for index, word in enumerate(vocab)}
        self.embedding = nn.Embedding(len(vocab), dim)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Returns token ids (B, 12), padded; "" is the null caption.

        Raises ValueError for unknown or too many words.
        """
        return torch.tensor([self._tokenize_one(caption) for caption in captions])

    def _tokenize_one(self, caption: str) -> list[int]:
        words = split_words(caption)
        unknown = [word for word in words if word not in self.vocab]
        if unknown:
            raise ValueError(
                f"caption {caption!r}: expected words among {', '.join(WORDS)}; found {unknown}"
            )
        if len(words) > MAX_TOKENS:
            raise ValueError(
                f"caption {caption!r}: expected at most {MAX_TOKENS} words, found {len(words)}"
            )
        return [self.vocab[word] for word in words] + [self.vocab[PAD]] * (MAX_TOKENS - len(words))

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Returns the embeddings (B, 12, 64) of the captions, padding included."""
        return self.embedding(self.tokenize(captions).to(self.embedding.weight.device))


@dataclass(slots=True)
class Demo:
    """The model, scheduler and text embedding with which `pabc.demo.sampling` samples."""

    transformer: LatteTransformer3DModel
    scheduler: DDIMScheduler
    text: Text


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


def build_scheduler() -> DDIMScheduler:
    """Returns the scheduler: cosine schedule, v-prediction, sampling from pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )


def build() -> Demo:
    """Returns an untrained demo."""
    return Demo(build_transformer(), build_scheduler(), Text())


def save(demo: Demo, weights: Path) -> None:
    """Writes `demo` in diffusers' folder layout, with a folder `text/` for the text embedding."""
    demo.transformer.save_pretrained(weights / "transformer")
    demo.scheduler.save_pretrained(weights / "scheduler")
    folder = weights / "text"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(list(demo.text.vocab), indent=1) + "\n")
    save_file(demo.text.state_dict(), folder / "embedding.safetensors")
    for file in weights.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def load(weights: Path | None = None, device: str | torch.device = "cpu") -> Demo:
    """Returns the trained demo in eval mode, from the folder `weights` or from the package.

    Raises FileNotFoundError if files are missing.
    """
    folder = Path(weights) if weights is not None else WEIGHTS
    _check_files(folder)
    transformer = LatteTransformer3DModel.from_pretrained(
        folder / "transformer", low_cpu_mem_usage=False
    )
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    text = Text(tuple(json.loads((folder / "text" / "vocab.json").read_text())))
    text.load_state_dict(load_file(folder / "text" / "embedding.safetensors"))
    return Demo(
        transformer.to(device).eval().requires_grad_(False),
        scheduler,
        text.to(device).eval().requires_grad_(False),
    )


def load_transformer() -> LatteTransformer3DModel:
    """Returns the trained transformer, on the CPU in eval mode."""
    return load().transformer


def _check_files(folder: Path) -> None:
    wanted = (
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text/vocab.json",
        "text/embedding.safetensors",
    )
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"weights: expected {', '.join(missing)} in {folder}, found none; "
            "reinstall pabc, or train the model with bench/train_demo.py"
        )
