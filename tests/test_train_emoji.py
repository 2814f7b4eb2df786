"""The training of the emoji model: a few steps, stopped and resumed, and the export."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from pabc.demo import sd3
from pabc.demo.emoji import Pictures

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import train_emoji
    return train_emoji


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    usual = ["--no-compile", "--no-autocast", "--batch", "2", "--threads", "1", "--seed", "3"]
    argv = ["train_emoji.py", "--out", str(out), *usual, *options]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    script.main()


def read(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_a_resumed_run_continues_as_the_original_would_have(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A constant rate: `--steps` would make it depend on the number of steps of each run.
    monkeypatch.setattr(script.training, "learning_rate_factor", lambda done, step: 1.0)
    run(script, monkeypatch, tmp_path / "whole", "--steps", "2")
    run(script, monkeypatch, tmp_path / "parts", "--steps", "1")
    first = read(tmp_path / "parts")
    run(script, monkeypatch, tmp_path / "parts", "--steps", "2")
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert whole["progress"]["steps"] == parts["progress"]["steps"] == 2
    assert whole["progress"]["samples"] == parts["progress"]["samples"] == 4
    for part in ("trainee", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(whole["trainee"][name], first["trainee"][name])


def test_the_export_has_the_averaged_weights(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(script, monkeypatch, tmp_path, "--steps", "1")
    run(script, monkeypatch, tmp_path, "--export", str(tmp_path / "weights"))
    model, ema = sd3.load(tmp_path / "weights"), read(tmp_path)["ema"]
    for name, value in model.transformer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, ema[f"transformer.{name}"].half().float())
    assert torch.equal(model.text.embedding.weight, ema["text.embedding.weight"])
    size = sum(file.stat().st_size for file in (tmp_path / "weights").rglob("*.safetensors"))
    assert size < 16e6


def test_a_batch_depends_on_its_seed_and_covers_all_noise_levels(script: ModuleType) -> None:
    known = Pictures.load()
    text = sd3.build_text(known.words)
    first, again, other = (script.draw_batch(known, text, 64, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.pictures, other.pictures)
    assert first.sigmas[0] < 0.05 and first.sigmas[-1] > 0.98
    assert (first.sigmas.diff() > 0).all()


def test_captions_are_dropped_now_and_then(script: ModuleType) -> None:
    known = Pictures.load()
    text = sd3.build_text(known.words)
    tokens = script.draw_batch(known, text, 400, 0).tokens
    assert 20 < (tokens == 0).all(1).sum() < 60
    rng = random.Random(0)
    drawn = [known.draw_caption(rng) for _ in range(400)]
    assert 160 < sum(not each.mirrored and each.place == "center" for each in drawn) < 260


def test_the_loss_is_that_of_the_velocity(script: ModuleType) -> None:
    known = Pictures.load()
    batch = script.draw_batch(known, sd3.build_text(known.words), 3, 0)

    def exact(noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert torch.equal(timestep, batch.sigmas * 1000)
        # x = (1 - s) picture + s noise, so that x - picture = s (noise - picture).
        return (noisy - batch.pictures) / batch.sigmas.view(-1, 1, 1, 1)

    assert script.compute_loss(exact, batch, autocast=False) < 1e-6
