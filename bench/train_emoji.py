"""Trains the demo's emoji model on one CPU or GPU, and exports its weights.

The pictures that it learns, and their names, are package data. The random numbers of a step depend
on (seed, step) only, so that a resumed run continues as the original would have. With `--steps` the
learning rate depends on the step and the run is reproducible; with `--minutes` it depends on the
time spent.

    python bench/train_emoji.py --out runs/emoji --minutes 95
    python bench/train_emoji.py --out runs/emoji --export pabc/demo/weights/emoji
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import nn

from pabc.demo import emoji, sd3
from pabc.demo.text import Text

NULL_CAPTION = 0.1
SHIFT = 2.0
"""The shift of the distribution of noise levels; sampling uses 3."""


@dataclass(slots=True)
class Progress:
    """The progress of a run."""

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0


class Trainee(nn.Module):
    """The transformer and its text embedding, trained together to predict the velocity."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer = sd3.build_transformer()
        self.text = sd3.build_text(words)

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Returns the velocity (N, 3, 32, 32) of `noisy`."""
        embedded, pooled = self.text(tokens)
        return self.transformer(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=embedded,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class Batch(NamedTuple):
    """The batch of one step: N pictures, L tokens."""

    pictures: torch.Tensor  # (N, 3, 32, 32) in [-1, 1]
    noise: torch.Tensor  # (N, 3, 32, 32)
    sigmas: torch.Tensor  # (N,) in [0, 1]
    tokens: torch.Tensor  # (N, L)


def draw_batch(pictures: emoji.Pictures, text: Text, size: int, seed: int) -> Batch:
    """Draws captions, their pictures and noise; noise levels are stratified."""
    captions, words = draw_captions(pictures, size, seed)
    generator = torch.Generator().manual_seed(seed)
    return add_noise(pictures.render(captions), text.tokenize(words), generator)


def draw_captions(
    pictures: emoji.Pictures, size: int, seed: int
) -> tuple[list[emoji.Caption], list[str]]:
    """Draws captions, and their words, of which some are left out."""
    rng = random.Random(seed)
    captions = [pictures.draw_caption(rng) for _ in range(size)]
    words = [
        "" if rng.random() < NULL_CAPTION else pictures.phrase(caption, rng) for caption in captions
    ]
    return captions, words


def add_noise(clean: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> Batch:
    """Returns the batch of pictures and tokens; noise and its levels are of the generator."""
    size, new = len(clean), {"generator": generator, "device": clean.device}
    noise = torch.randn(clean.shape, **new)  # type: ignore[call-overload]
    strata = torch.arange(size, device=clean.device) + torch.rand(size, **new)  # type: ignore[call-overload]
    strata = strata / size
    sigmas = SHIFT * strata / (1 + (SHIFT - 1) * strata)
    return Batch(clean, noise, sigmas, tokens)


def compute_loss(step_fn: Callable, batch: Batch, autocast: bool) -> torch.Tensor:
    """Returns the mean squared error of the velocity noise - picture.

    Source: Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis",
    2024.
    """
    sigma = batch.sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch.pictures + sigma * batch.noise
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=autocast):
        velocity = step_fn(noisy, batch.sigmas * 1000, batch.tokens)
    return F.mse_loss(velocity.float(), batch.noise - batch.pictures)


class Run(training.Run):
    """One training run."""

    progress: Progress
    trainee: Trainee

    def done(self) -> float:
        """The progress in [0, 1], by the steps or minutes."""
        if self.args.steps is not None:
            return min(1.0, self.progress.steps / max(1, self.args.steps))
        return min(1.0, self.progress.seconds / max(1e-9, 60 * self.args.minutes))


def train(args: argparse.Namespace) -> None:
    """Runs the training, from the checkpoint in `args.out` if there is one."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pictures = emoji.Pictures.load()
    trainee = Trainee(pictures.words).to(args.device)
    ema = copy.deepcopy(trainee).requires_grad_(False)
    optimizers = training.build_optimizers(trainee, args.muon_lr, args.adamw_lr)
    run = Run(args, trainee, ema, optimizers, Progress())
    run.resume()

    def draw(seed: int) -> Batch:
        drawn = draw_batch(pictures, trainee.text, args.batch, seed)
        return Batch(*(part.to(args.device) for part in drawn))

    for progress, loss in train_steps(run, draw):
        report(progress, loss)
    run.save()


def train_steps(run: Run, draw: Callable[[int], Batch]) -> Iterator[tuple[Progress, float]]:
    """Runs the steps that are left, saving a checkpoint every few minutes.

    `draw` returns the batch of a seed. Yields the progress and the mean loss, every few steps.
    """
    args, progress = run.args, run.progress
    step_fn = torch.compile(run.trainee, dynamic=False) if args.compile else run.trainee
    saved = clock = time.perf_counter()
    losses: list[torch.Tensor] = []
    while (done := run.done()) < 1:
        batch = draw(args.seed * 10_000_000 + progress.steps)
        loss = compute_loss(step_fn, batch, args.autocast)
        factor = training.learning_rate_factor(done, progress.steps)
        training.take_step(run.trainee, run.optimizers, loss, factor)
        training.update_ema(run.ema, run.trainee, progress.steps)
        losses.append(loss.detach())  # to read it would wait for a GPU
        now = time.perf_counter()
        progress.seconds += now - clock
        progress.steps += 1
        progress.samples += args.batch
        clock = now
        if progress.steps % args.log_every == 0:
            yield progress, float(torch.stack(losses).mean())
            losses.clear()
        if now - saved > 60 * args.save_minutes:
            run.save()
            saved = now


def report(progress: Progress, loss: float) -> None:
    """Prints the steps, minutes, recent loss and mean speed."""
    start = f"step {progress.steps} {progress.seconds / 60:.1f} min"
    print(f"{start} loss {loss:.4f} {progress.samples / progress.seconds:.0f}/s", flush=True)


def export(checkpoint: Path, weights: Path) -> None:
    """Writes the averaged weights of a checkpoint as the demo's package data, in float16."""
    state = training.read_checkpoint(checkpoint)
    known = emoji.Pictures.load()
    trainee = Trainee(known.words)
    trainee.load_state_dict(state["ema"])
    model = sd3.Emoji(trainee.transformer.half(), sd3.build_scheduler(), trainee.text, known)
    model.save(weights)
    print(f"exported {state['progress']} to {weights}")


def main() -> None:
    """Trains, or exports with --export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    training.add_arguments(add, Path("runs/emoji"))
    add("--autocast", action=argparse.BooleanOptionalAction, default=True, help="to bfloat16")
    add("--minutes", type=float, default=95.0)
    add("--steps", type=int, help="instead of minutes")
    add("--batch", type=int, default=128)
    args = parser.parse_args()
    export(args.out / "checkpoint.pt", args.export) if args.export else train(args)


if __name__ == "__main__":
    main()
