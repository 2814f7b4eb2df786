"""Trains the emoji model at its full size on a GPU: a part of bench/gpu.py.

It is what `bench/train_emoji.py` does, but for what keeps a GPU busy: larger batches, captions
drawn by other processes, and pictures and noise made on the device. The checkpoint is written
beside the rows, in pieces; the weights of the package stay as they are until

    python bench/train_emoji.py --out FOLDER --export pabc/demo/weights/emoji
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator

import torch
import training
from gpu_checks import Target
from rows import Row
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_emoji import Batch, Progress, Run, Trainee, add_noise, draw_captions, train_steps

from pabc.demo import accuracy, sd3
from pabc.demo.emoji import PLACES, Caption, Pictures
from pabc.demo.text import Text

BATCH = 512
SEED = 0
RESERVED = 25.0
"""Seconds of the task's time that are kept for the checkpoint and for what is measured at last."""
PIECE_MIB = 15.0
LOADERS = 8
"""Processes that draw captions, at most."""


class Captions(Dataset[tuple[int, Tensor, Tensor]]):
    """Batches by the number of their step: the step, pictures (N,) and tokens (N, L).

    A picture is an index into the table of :func:`render_all`.
    """

    def __init__(self, pictures: Pictures, text: Text, size: int) -> None:
        self._pictures, self._text, self._size = pictures, text, size

    def __getitem__(self, seed: int) -> tuple[int, Tensor, Tensor]:
        captions, words = draw_captions(self._pictures, self._size, seed)
        places = torch.tensor([find_place(caption) for caption in captions])
        return seed, places, self._text.tokenize(words)


def find_place(caption: Caption) -> int:
    """Returns the index of a caption's picture in the table of all."""
    turned = 2 * caption.picture + caption.mirrored
    return turned * len(PLACES) + PLACES.index(caption.place)


def render_all(pictures: Pictures) -> Tensor:
    """Returns all pictures in all ways to mirror and place them."""
    return pictures.render(
        [
            Caption(picture, mirrored, place)
            for picture in range(len(pictures.images))
            for mirrored in (False, True)
            for place in PLACES
        ]
    )


def make_draw(pictures: Pictures, text: Text, first: int, target: Target) -> Callable[[int], Batch]:
    """Returns what draws the batches of successive seeds, from `first` on."""
    workers = 0 if target.is_smoke else min(LOADERS, max((os.cpu_count() or 1) - 2, 0))
    captions = Captions(pictures, copy.deepcopy(text).cpu(), 8 if target.is_smoke else BATCH)
    drawn = iter(
        DataLoader(
            captions,
            batch_size=None,
            sampler=itertools.count(first),  # type: ignore[arg-type]
            num_workers=workers,
        )
    )
    table = render_all(pictures).to(target.device)

    def draw(seed: int) -> Batch:
        found, places, tokens = next(drawn)
        assert found == seed, (found, seed)
        generator = torch.Generator(target.device).manual_seed(seed)
        return add_noise(table[places.to(table.device)], tokens.to(table.device), generator)

    return draw


def train(target: Target) -> Iterator[tuple[str, Row]]:
    """Trains for the time there is, from the checkpoint if there is one; measures the result."""
    deadline = time.perf_counter() + target.seconds - RESERVED
    run = make_run(target)
    pictures, progress = Pictures.load(), run.progress
    draw = make_draw(pictures, run.trainee.text, SEED * 10_000_000 + progress.steps, target)
    left = max(deadline - time.perf_counter(), 0.0)
    run.args.minutes = (progress.seconds + left) / 60
    for progress, loss in train_steps(run, draw):
        yield "progress", _describe(progress, loss)
        if loss != loss:
            yield "loss", {"error": f"expected a number, found {loss} at step {progress.steps}"}
            return
    run.save()
    yield "trained", _describe(run.progress, None)
    yield "accuracy", measure(run.ema, pictures, target)


def make_run(target: Target) -> Run:
    """Returns the run, as far as its checkpoint is."""
    parser = argparse.ArgumentParser()
    training.add_arguments(parser.add_argument, target.folder)
    options = ["--no-compile", "--device", target.device, "--seed", str(SEED)]
    options += ["--piece-mib", str(PIECE_MIB), "--save-minutes", "0.5"]
    args = parser.parse_args(options)
    args.autocast, args.steps = not target.is_smoke, 4 if target.is_smoke else None
    args.batch, args.log_every = (8, 2) if target.is_smoke else (BATCH, 100)
    torch.manual_seed(args.seed)
    trainee = Trainee(Pictures.load().words).to(target.device)
    ema = copy.deepcopy(trainee).requires_grad_(False)
    optimizers = training.build_optimizers(trainee, args.muon_lr, args.adamw_lr)
    run = Run(args, trainee, ema, optimizers, Progress())
    run.resume()
    return run


def measure(ema: Trainee, pictures: Pictures, target: Target) -> Row:
    """Returns the shares of samples that are right, of as many captions as the model's card has."""
    begin = time.perf_counter()
    model = sd3.Emoji(ema.transformer, sd3.build_scheduler(), ema.text, pictures)
    count, steps = (4, 2) if target.is_smoke else (96, None)
    found = accuracy.measure(model.freeze(target.device), count=count, batch=96, num_steps=steps)
    return {"samples": count, **found, "seconds": time.perf_counter() - begin}


def _describe(progress: Progress, loss: float | None) -> Row:
    pace = progress.samples / max(progress.seconds, 1e-9)
    return {
        "steps": progress.steps,
        "samples": progress.samples,
        "seconds": progress.seconds,
        "samples_per_second": pace,
        "loss": loss,
    }
