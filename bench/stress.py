"""Runs many generations at once, in trajectories that change threads; some raise exceptions.

Trajectories wait in a queue; each thread takes one, runs one step in it and puts it back. Each
output is compared with that of the same generation run alone. Some generations end in an exception,
raised by the model's call or between calls. Memory is measured during the run.

    python bench/stress.py --out bench/results/stress.json
"""

from __future__ import annotations

import argparse
import gc
import json
import queue
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import torch
from diffusers import LatteTransformer3DModel

import pabc

TIMESTEPS = tuple(range(950, 0, -100))
SEEDS = 6


def make_model() -> torch.nn.Module:
    """Returns a Latte of two spatial and two temporal blocks, with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "caption_channels": 10,
        "video_length": 3,
    }
    return LatteTransformer3DModel(**sizes).eval()


def make_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns latents (2, 4, 3, 8, 8), and text of a length that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
    return latents, torch.randn(2, 5 + seed % 2, 10, generator=generator)


@dataclass
class Generation:
    """A trajectory, the inputs of one seed, and its next step."""

    run: pabc.Trajectory
    seed: int
    fails_at: int | None
    latents: torch.Tensor = field(init=False)
    text: torch.Tensor = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.latents, self.text = make_inputs(self.seed)

    def advance(self, fast: pabc.CompiledModel) -> torch.Tensor:
        """Runs the next step; returns its result."""
        when = torch.full((2,), TIMESTEPS[self.step])
        with self.run:
            if self.step == self.fails_at:
                if self.seed % 2:
                    raise RuntimeError("beside the model")
                fast(self.latents, when, nonsense=1)
            found = fast(self.latents, when, self.text, return_dict=False)[0]
        self.latents = self.latents - 0.1 * found
        self.step += 1
        return found


class Stress:
    """The queue, the expected outputs of each generation, and the observations."""

    def __init__(self, fast: pabc.CompiledModel, options: argparse.Namespace) -> None:
        self.fast, self.options = fast, options
        self.random = random.Random(0)
        self.alone = [self.run_alone(seed) for seed in range(SEEDS)]
        self.waiting: queue.Queue[Generation | None] = queue.Queue()
        self.lock = threading.Lock()
        self.started = self.ended = self.steps = self.mismatches = self.failures = 0
        self.errors: list[str] = []
        self.memory: list[dict[str, int]] = []

    def run_alone(self, seed: int) -> list[torch.Tensor]:
        """Returns the outputs of a whole generation that runs alone."""
        generation = Generation(self.fast.trajectory(), seed, None)
        return [generation.advance(self.fast) for _ in TIMESTEPS]

    def start(self, run: pabc.Trajectory) -> None:
        """Starts another generation in a trajectory; after the last one, ends a thread."""
        if self.started < self.options.generations:
            self.started += 1
            fails = self.random.random() < self.options.failing
            fails_at = self.random.randrange(len(TIMESTEPS)) if fails else None
            self.waiting.put(Generation(run, self.random.randrange(SEEDS), fails_at))

    def work(self) -> None:
        """Runs steps of trajectories from the queue until there are no more generations."""
        torch.set_num_threads(1)  # else the first matrix product of a thread is split by OpenMP
        while (generation := self.waiting.get()) is not None:
            try:
                found = generation.advance(self.fast)
            except (RuntimeError, TypeError) as error:
                with self.lock:
                    self.failures += 1
                    if generation.step != generation.fails_at:
                        self.errors.append(repr(error))
                is_over = True
            else:
                is_equal = torch.equal(found, self.alone[generation.seed][generation.step - 1])
                with self.lock:
                    self.steps += 1
                    self.mismatches += not is_equal
                is_over = generation.step == len(TIMESTEPS)
            with self.lock:
                if not is_over:
                    self.waiting.put(generation)
                    continue
                self.ended += 1
                self.start(generation.run)
                if self.ended % self.options.every == 0:
                    self.memory.append({"generations": self.ended, "rss_bytes": read_rss()})
                if self.ended == self.options.generations:
                    for _ in range(self.options.threads):
                        self.waiting.put(None)

    def run(self) -> dict[str, Any]:
        """Runs all generations; returns the observations."""
        gc.collect()
        tensors = count_tensors()
        start = time.perf_counter()
        for _ in range(self.options.trajectories):
            self.start(self.fast.trajectory())
        threads = [threading.Thread(target=self.work) for _ in range(self.options.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        stats = self.fast.stats
        return {
            "seconds": round(time.perf_counter() - start, 1),
            "generations": self.ended,
            "steps": self.steps,
            "mismatches": self.mismatches,
            "exceptions": self.failures,
            "unexpected": self.errors,
            "slot_bytes_left": stats.nbytes,
            "slot_bytes_peak": stats.peak_nbytes,
            "tensors_before": tensors,
            "tensors_after": count_tensors(),
            "fallbacks": dict(stats.fallbacks),
            "memory": self.memory,
        }


def count_tensors() -> int:
    """Returns the number of live tensors."""
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def read_rss() -> int:
    """Returns the resident bytes of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> int:
    """Runs the test; returns 0 if there was no mismatch, unexpected error or leak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--failing", type=float, default=0.2, help="share that raises")
    parser.add_argument("--every", type=int, default=20, help="generations between readings")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager", "oracle"))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = pabc.Schedule.pyramid(TIMESTEPS, spatial=2, temporal=3, cross=4, mlp=2)
    fast = pabc.compile(make_model(), schedule, backend=options.backend)
    result = Stress(fast, options).run()
    about = {
        **report.describe_run(),
        "backend": options.backend,
        "trajectories": options.trajectories,
        "threads": options.threads,
    }
    content = {**about, **result}
    print(json.dumps(content, indent=1))
    if options.out:
        report.write_json(options.out, content)
    is_clean = not (result["mismatches"] or result["unexpected"] or result["slot_bytes_left"])
    return 0 if is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
