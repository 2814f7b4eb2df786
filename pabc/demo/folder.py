"""Writes and reads models in diffusers' folder layout, with a folder `text/` for the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from pabc.demo.text import PAD, Text

FILES = (
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "text/vocab.json",
    "text/embedding.safetensors",
)


def save(folder: Path, transformer: Any, scheduler: Any, text: Text) -> None:
    """Writes a model to `folder`."""
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "text" / "vocab.json").write_text(json.dumps(list(text.vocab), indent=1) + "\n")
    save_file(text.state_dict(), folder / "text" / "embedding.safetensors")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def check_files(folder: Path, script: str) -> None:
    """Raises FileNotFoundError, naming the `script` that trains the model, if files are missing."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"weights: expected {', '.join(missing)} in {folder}, found none; "
            f"reinstall pabc, or train the model with {script}"
        )


def load_text(folder: Path, **options: Any) -> Text:
    """Returns the text embedding in `folder`; `options` are those of `Text`."""
    pad, *words = json.loads((folder / "text" / "vocab.json").read_text())
    assert pad == PAD
    text = Text(tuple(words), **options)
    state = load_file(folder / "text" / "embedding.safetensors")
    text.load_state_dict(state)
    return text
