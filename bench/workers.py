"""Runs each variant in a process of its own, unaffected by code, patches or memory of others.

The processes of one model are alive together and take turns: only one computes at a time. They are
forked from a server that has imported all modules, and has computed nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from case import Case, Ready, first_line
from torch import Tensor, nn
from torch._dynamo import utils as dynamo
from torch._inductor.utils import fresh_cache
from variants import VARIANTS
from workloads import FRACTION, FULL, SMALL, TINY, build, denoise, draw, timesteps

import pabc
from pabc.base.kinds import COARSE, KINDS
from pabc.demo import metrics

ATTENTION = ("spatial", "temporal", "full", "joint", "cross")
SIZES = {"small": SMALL, "full": FULL, "tiny": TINY}


@dataclass(frozen=True)
class Task:
    """The work of one worker: a variant, and its settings."""

    size: str
    model: str
    variant: str
    steps: int
    device: str
    threads: int
    seed: int
    computed: int
    log: Path


class Worker:
    """A process that prepares one variant, then generates when asked."""

    def __init__(self, task: Task) -> None:
        context = _get_context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task), daemon=False)
        self._process.start()
        theirs.close()

    def ask(self, command: str, seconds: float) -> dict[str, Any]:
        """Returns the worker's answer to a command; `{"error": ...}` if it fails."""
        try:
            self._pipe.send(command)
            if not self._pipe.poll(seconds):
                return {"error": f"took longer than {seconds:.0f} s"}
            answer: dict[str, Any] = self._pipe.recv()
            return answer
        except (EOFError, OSError):
            self._process.join(10)
            return {"error": f"the process died: exit code {self._process.exitcode}"}

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


@functools.cache
def _get_context() -> ForkServerContext:
    """Returns a context that forks processes from a server that has imported this module."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # which the server starts with
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    return context


def serve(pipe: Connection, task: Task) -> None:
    """Answers the commands `prepare`, `generate` and `finish` in the worker, until `stop`."""
    with task.log.open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        print(f"== {task}", flush=True)
    torch.set_num_threads(task.threads)
    run = Run(task)
    with contextlib.suppress(EOFError), fresh_cache():
        while (command := pipe.recv()) != "stop":
            try:
                pipe.send(getattr(run, command)())
            except Exception as error:
                traceback.print_exc()
                pipe.send({"error": first_line(error)})


class Run:
    """A variant of a model in its worker; its methods are the commands."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.workload = SIZES[task.size][task.model]
        self.dtype = torch.bfloat16 if task.size == "full" else torch.float32
        self.is_cuda = torch.device(task.device).type == "cuda"
        self.ready: Ready
        self.compiles = Compiles()

    def prepare(self) -> dict[str, Any]:
        """Prepares the variant, generates once to warm up, and once to count attentions."""
        task = self.task
        model = build(self.workload, task.device, self.dtype)
        weights = digest(model)
        self.start = draw(self.workload, task.seed, task.device, self.dtype)
        schedule = pabc.Schedule.pyramid(
            timesteps(self.workload, task.steps), **self.workload.ranges, fraction=FRACTION
        )
        case = Case(self.workload, model, self.start, schedule, task.computed)
        begin = time.perf_counter()
        self.ready = VARIANTS[task.variant].prepare(case)
        self._sync()
        prepared = time.perf_counter() - begin
        first = self.generate()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            latents = self._denoise(lambda: None)
        self.warm = self.compiles.counts()
        return {
            "weights": weights,
            "prepare_seconds": prepared,
            "first_seconds": first["seconds"],
            "attentions": count_attentions(profile),
            "note": self.ready.note,
            "latents": latents.float().cpu().numpy(),
            **describe_plan(self.ready.call),
        }

    def generate(self) -> dict[str, Any]:
        """Returns wall-clock and CPU seconds of one generation, and the seconds of its steps."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        marks: list[Any] = []
        self._sync()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        self._denoise(lambda: marks.append(self._mark()))
        self._sync()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        spans = zip(marks[::2], marks[1::2], strict=True)
        peak = torch.cuda.max_memory_allocated() if self.is_cuda else None
        steps = [self._span(*pair) for pair in spans]
        return {"seconds": seconds, "cpu_seconds": cpu, "steps": steps, "peak_bytes": peak}

    def finish(self) -> dict[str, Any]:
        """Returns the counts of compilations: in all, and since the warm-up."""
        counts = self.compiles.counts()
        later = {
            f"{name}_later": counts[name] - self.warm[name] for name in ("graphs", "recompiles")
        }
        return {**counts, **later, **describe_plan(self.ready.call)}

    def _denoise(self, mark: Callable[[], None]) -> Tensor:
        """Runs one generation; `mark` is called before and after each step."""

        @contextlib.contextmanager
        def on_step(index: int, timestep: Tensor) -> Iterator[None]:
            mark()
            with self.ready.on_step(index, timestep):
                yield
            mark()

        steps = self.ready.num_steps or self.task.steps
        latents = denoise(self.workload, self.ready.call, self.start, steps, on_step)
        self.ready.on_end()
        return latents

    def _sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _span(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.is_cuda else end - begin


class Compiles:
    """Counts of Dynamo's graphs, graph breaks, recompiles, and frames that it gave up."""

    def __init__(self) -> None:
        dynamo.set_compilation_metrics_limit(100_000)
        self._given_up = 0
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._see  # type: ignore[method-assign]
        logging.getLogger("torch._dynamo.convert_frame").addHandler(handler)

    def _see(self, record: logging.LogRecord) -> None:
        self._given_up += "hit config." in record.getMessage()

    def counts(self) -> dict[str, int]:
        """Returns the counts so far."""
        ids = [str(m.compile_id) for m in dynamo.get_compilation_metrics()]
        return {
            "graphs": dynamo.counters["stats"]["unique_graphs"],
            "breaks": sum(dynamo.counters["graph_break"].values()),
            "recompiles": sum(map(is_recompile, ids)),
            "limit_hits": self._given_up,
        }


def is_recompile(compile_id: str) -> bool:
    """Returns True if Dynamo's id, frame/compilation, is of a frame compiled before."""
    _, _, compilation = compile_id.partition("/")
    return compilation.split("_")[0] not in ("", "0")


def digest(model: nn.Module) -> float:
    """Returns a number that differs for models with other weights."""
    return sum(float(p.double().abs().sum()) for p in model.parameters())


def count_attentions(profile: torch.profiler.profile) -> int:
    """Counts the softmax attentions that ran, by the names of PyTorch's ops for them."""
    names = ("_flash_attention", "_efficient_attention", "_cudnn_attention", "_attention_math")
    return sum(
        event.count
        for event in profile.key_averages()
        if event.key.startswith("aten::_scaled_dot_product") and any(n in event.key for n in names)
    )


def describe_plan(call: Any) -> dict[str, Any]:
    """Returns the attentions, phases, bytes and shares of the work in pabc's plan."""
    if not isinstance(call, pabc.CompiledModel):
        return {}
    plan, found, stats = call.plan, call.explain(), call.stats
    flops = {kind: n for kind, n in found.flops.items() if kind != "prologue"}
    attention = sum(n for kind, n in flops.items() if kind in ATTENTION)
    held = {kind: [r for r in found.regions if r.kind == kind] for kind in KINDS}
    fine = [j for j, slot in enumerate(plan.slots) if slot.kind not in COARSE]
    counts = [len(held[plan.slots[j].kind][plan.slots[j].layer].attentions) for j in fine]
    skipped = int((~plan.computed[:, fine] @ counts).sum())
    shares = metrics.flop_shares(plan, found)
    return {
        "planned_attentions": len(found.attention) * plan.num_steps - skipped,
        "attentions_per_step": len(found.attention),
        "attention_share": attention / sum(flops.values()),
        "gflops": sum(flops.values()) / 1e9,
        "flop_share": sum(shares) / plan.num_steps,
        "phases": plan.phase_of_step.tolist(),
        "cache_bytes": plan.peak_bytes,
        "captures": stats.captures,
        "compiles": stats.compiles,
        "fallbacks": dict(stats.fallbacks),
    }


def median_steps(generations: list[list[float]]) -> list[float]:
    """Returns the median over generations for each step."""
    return [statistics.median(step) for step in zip(*generations, strict=True)]
