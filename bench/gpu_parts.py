"""Lists what bench/gpu.py runs: its parts, and the tasks of each, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import gpu_checks
import gpu_kernels
import gpu_loops
import gpu_plans
import gpu_skips
import gpu_timing
import gpu_training
from gpu_processes import Task


@dataclass(frozen=True, slots=True)
class Part:
    """A list of tasks, which one command runs.

    Attributes:
        seconds: of the whole part.
        jobs: the most tasks that run at a time; 1 where times are measured.
    """

    tasks: tuple[Task, ...]
    seconds: float
    jobs: int = 1


def _prepare(name: str, which: str, seconds: float) -> Task:
    run = partial(gpu_loops.prepare_loops, name, which)
    return Task(f"{name} at full size, {which}", run, seconds)


CHECKS = (
    *(Task(name, partial(gpu_checks.check_model, name), 100) for name in gpu_checks.MODELS),
    Task("tests of kernels", partial(gpu_kernels.run_tests, "kernels"), 170),
    Task("CUDA graphs", partial(gpu_timing.compare_graphs, is_timed=False), 70),
    Task("kernels in models", gpu_kernels.check_lowered, 100),
    Task("skips", gpu_skips.check_skips, 100),
    Task("plans that make themselves", gpu_plans.check_auto, 70),
    _prepare("latte", "pabc", 130),
    _prepare("latte", "torch.compile", 150),
    Task("timestep guard", gpu_checks.check_guard, 30),
    Task("memory options", gpu_checks.check_memory, 70),
    Task("results of skips", gpu_skips.check_results, 60),
    Task("CUDA graphs of skips", gpu_skips.check_graphs, 70),
    Task("artifact", gpu_checks.check_artifact, 90),
    _prepare("opensora", "pabc", 130),
    _prepare("opensora", "torch.compile", 150),
    Task("tests of lowering", partial(gpu_kernels.run_tests, "lowering"), 120),
)


def _time(kernel: str, seconds: float) -> Task:
    run = partial(gpu_kernels.time_kernel, kernel)
    return Task(f"{gpu_kernels.TIMES} {kernel}", run, seconds)


TIMES = (
    Task("ceilings", gpu_timing.measure_ceilings, 20),
    _time("attention", 30),
    _time("residual_norm", 35),
    _time("short_attention", 20),
    _time("text_attention", 20),
    _time("joint_norm", 20),
    Task("latte", partial(gpu_loops.time_loops, "latte"), 170),
    Task("opensora", partial(gpu_loops.time_loops, "opensora"), 150),
    Task("CUDA graphs", partial(gpu_timing.compare_graphs, is_timed=True), 40),
    Task("skips", gpu_skips.time_skips, 40),
    _time("encode_rows", 20),
    _time("permute_copy", 30),
    Task("memory", gpu_timing.measure_memory, 60),
    Task("cogvideox", partial(gpu_loops.time_loops, "cogvideox"), 150),
)
PARTS = {
    "checks": Part(CHECKS, 230, jobs=4),
    "times": Part(TIMES, 320),
    "train": Part((Task("emoji", gpu_training.train, 190),), 190),
}
