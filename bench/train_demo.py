"""Trains the demo's video model on one CPU or GPU, in two stages, and exports its weights.

Stage 1 trains the spatial blocks on single frames; stage 2 trains all blocks on clips of 8 frames.
The random numbers of a step depend on (seed, stage, step) only, so that a resumed run continues as
the original would have. With `--stage-steps` the learning rate depends on the step and the run is
reproducible; with `--stage-minutes` it depends on the time spent.

    python bench/train_demo.py --out runs/demo --stage-minutes 30 60
    python bench/train_demo.py --out runs/demo --export pabc/demo/weights
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import nn

from pabc.demo import digits, latte
from pabc.demo.text import Text

NULL_CAPTION = 0.12
TEMPORAL_OUTPUTS = ("attn1.to_out.0", "ff.net.2")


@dataclass(slots=True)
class Progress:
    """The progress of a run: its stage (0 or 1), and the steps, seconds and samples of each."""

    stage: int = 0
    steps: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    samples: list[int] = field(default_factory=lambda: [0, 0])


class Trainee(nn.Module):
    """The transformer and its text embedding, trained together to predict the velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = latte.build_transformer()
        self.text = latte.build_text()

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor, frame: torch.Tensor
    ) -> torch.Tensor:
        """Returns the velocity (N, 1, F, 16, 16) of `noisy`.

        With F = 1, temporal blocks are skipped, and `frame` (N,) is the index of each frame in its
        clip, so that spatial blocks see the same positions as in whole clips.
        """
        text = self.text.embedding(tokens)
        if noisy.shape[2] > 1:
            return self.transformer(noisy, timestep, text, return_dict=False)[0]
        position = self.transformer.temp_pos_embed[0, frame][:, None]
        first = self.transformer.transformer_blocks[0]
        with first.register_forward_hook(lambda _module, _args, output: output + position):
            return self.transformer(
                noisy, timestep, text, enable_temporal_attentions=False, return_dict=False
            )[0]


def zero_temporal_outputs(trainee: Trainee) -> None:
    """Makes each temporal block the identity, so that stage 2 starts from stage 1's function."""
    for block in trainee.transformer.temporal_transformer_blocks:
        for name in TEMPORAL_OUTPUTS:
            for parameter in block.get_submodule(name).parameters():
                nn.init.zeros_(parameter)


class Batch(NamedTuple):
    """The batch of one step: N clips, F frames (1 in stage 1), L tokens."""

    clips: torch.Tensor  # (N, 1, F, 16, 16) in [-1, 1]
    noise: torch.Tensor  # (N, 1, F, 16, 16)
    timesteps: torch.Tensor  # (N,)
    tokens: torch.Tensor  # (N, L)
    frame: torch.Tensor  # (N,) the index of each frame in its clip, in stage 1


def draw_batch(
    data: tuple[torch.Tensor, torch.Tensor], text: Text, size: int, stage: int, seed: int
) -> Batch:
    """Draws digits, motions, captions and noise; timesteps are stratified over the schedule."""
    images, labels = data
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    picks = torch.randint(len(images), (size,), generator=generator)
    frame = torch.randint(digits.FRAMES, (size,), generator=generator)
    captions = digits.random_captions(labels[picks], rng)
    only = frame if stage == 0 else None
    clips = digits.render_captions(images[picks], captions, generator, only)[:, None] * 2 - 1
    words = [
        "" if rng.random() < NULL_CAPTION else digits.rephrase(caption, rng) for caption in captions
    ]
    noise = torch.randn(clips.shape, generator=generator)
    strata = torch.arange(size) + torch.rand(size, generator=generator)
    return Batch(clips, noise, (strata * (1000 / size)).long(), text.tokenize(words), frame)


def compute_loss(step_fn: Callable, batch: Batch, alphas: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error of the velocity sqrt(a) noise - sqrt(1 - a) clip.

    Source: Salimans and Ho, "Progressive distillation for fast sampling of diffusion models", 2022.
    """
    alpha = alphas[batch.timesteps].view(-1, 1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.clips + (1 - alpha).sqrt() * batch.noise
    target = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.clips
    return F.mse_loss(step_fn(noisy, batch.timesteps, batch.tokens, batch.frame), target)


class Run(training.Run):
    """One training run."""

    progress: Progress
    trainee: Trainee

    def stage_done(self) -> float:
        """The progress of the current stage in [0, 1], by its steps or minutes."""
        stage = self.progress.stage
        if self.args.stage_steps:
            return min(1.0, self.progress.steps[stage] / max(1, self.args.stage_steps[stage]))
        limit = 60 * self.args.stage_minutes[stage]
        return min(1.0, self.progress.seconds[stage] / max(1e-9, limit))

    def start_clips(self) -> None:
        """Begins stage 2 from stage 1's averaged weights, with identity temporal blocks."""
        self.trainee.load_state_dict(self.ema.state_dict())
        zero_temporal_outputs(self.trainee)
        self.ema.load_state_dict(self.trainee.state_dict())
        args = self.args
        self.optimizers = training.build_optimizers(self.trainee, args.muon_lr, args.adamw_lr)


def train(args: argparse.Namespace) -> None:
    """Runs both stages, from the checkpoint in `args.out` if there is one."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    trainee = Trainee().to(args.device)
    ema = copy.deepcopy(trainee).requires_grad_(False)
    optimizers = training.build_optimizers(trainee, args.muon_lr, args.adamw_lr)
    run = Run(args, trainee, ema, optimizers, Progress())
    run.resume()
    while run.progress.stage < 2:
        if run.progress.stage == 1 and run.progress.steps[1] == 0:
            run.start_clips()
        train_stage(run)
        run.progress.stage += 1
        run.save()


def train_stage(run: Run) -> None:
    """Runs the current stage to its end, saving a checkpoint every few minutes."""
    args, progress, stage = run.args, run.progress, run.progress.stage
    data = digits.load_digits("train")
    alphas = latte.build_scheduler().alphas_cumprod.to(args.device)
    step_fn = torch.compile(run.trainee, dynamic=False) if args.compile else run.trainee
    saved = clock = time.perf_counter()
    losses: list[float] = []
    while (done := run.stage_done()) < 1:
        step = progress.steps[stage]
        seed = (args.seed * 2 + stage) * 10_000_000 + step
        drawn = draw_batch(data, run.trainee.text, args.batch[stage], stage, seed)
        batch = Batch(*(part.to(args.device) for part in drawn))
        loss = compute_loss(step_fn, batch, alphas)
        factor = training.learning_rate_factor(done, step)
        training.take_step(run.trainee, run.optimizers, loss, factor)
        training.update_ema(run.ema, run.trainee, step)
        losses.append(loss.item())
        now = time.perf_counter()
        progress.seconds[stage] += now - clock
        progress.steps[stage] += 1
        progress.samples[stage] += args.batch[stage]
        clock = now
        if progress.steps[stage] % args.log_every == 0:
            report(progress, sum(losses) / len(losses))
            losses.clear()
        if now - saved > 60 * args.save_minutes:
            run.save()
            saved = now


def report(progress: Progress, loss: float) -> None:
    """Prints the stage, its steps, minutes, recent loss and mean speed."""
    stage = progress.stage
    step, seconds = progress.steps[stage], progress.seconds[stage]
    start = f"stage {stage + 1} step {step} {seconds / 60:.1f} min"
    print(f"{start} loss {loss:.4f} {progress.samples[stage] / seconds:.0f}/s", flush=True)


def export(checkpoint: Path, weights: Path) -> None:
    """Writes the averaged weights of a checkpoint as the demo's package data."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    trainee = Trainee()
    trainee.load_state_dict(state["ema"])
    latte.Digits(trainee.transformer, latte.build_scheduler(), trainee.text).save(weights)
    print(f"exported {state['progress']} to {weights}")


def main() -> None:
    """Trains, or exports with --export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, pair = parser.add_argument, ("FRAMES", "CLIPS")
    training.add_arguments(add, Path("runs/demo"))
    add("--stage-minutes", type=float, nargs=2, default=(30.0, 60.0), metavar=pair)
    add("--stage-steps", type=int, nargs=2, metavar=pair, help="instead of minutes")
    add("--batch", type=int, nargs=2, default=(128, 16), metavar=pair)
    args = parser.parse_args()
    export(args.out / "checkpoint.pt", args.export) if args.export else train(args)


if __name__ == "__main__":
    main()
