"""Measures how many of a trained model's samples show what their captions say.

`python -m pabc.demo.accuracy --model emoji --samples 96` does so for the weights of the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pabc.demo.model import Model
from pabc.demo.models import MODELS, load


def measure(
    model: Model,
    *,
    count: int,
    batch: int,
    num_steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Samples `count` captions in random order; returns the shares that are right, by name."""
    prompts = model.prompts(seed, count)
    noise = model.noise(seed, count)
    parts = [
        model.generate(
            None,
            prompts[first : first + batch],
            noise[first : first + batch],
            num_steps=num_steps,
            guidance=guidance,
        )
        for first in range(0, count, batch)
    ]
    return model.judge(torch.cat(parts), prompts)


def main() -> None:
    """Prints the number of samples and the shares that are right."""
    parser = argparse.ArgumentParser(description="Measure one of the demo's models.")
    parser.add_argument("--model", choices=tuple(MODELS), default="digits")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, help="default: the model's usual number")
    parser.add_argument("--guidance", type=float, help="default: the model's usual scale")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = measure(
        load(args.model, args.weights),
        count=args.samples,
        batch=args.batch,
        num_steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )
    print({"samples": args.samples, **found})


if __name__ == "__main__":
    main()
