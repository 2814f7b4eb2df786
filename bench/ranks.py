"""Starts the processes of a sharded model for a benchmark, and counts what each of them sends.

A benchmark that needs processes runs itself by torchrun with `--worker FILE` (:func:`launch`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import FRACTION, Workload, denoise, draw, no_context, timesteps

import pabc
from pabc.schedule import Schedule

OPS = torch.ops._c10d_functional


def launch(script: str, ranks: int, task: Mapping[str, Any]) -> Any:
    """Runs `script --worker FILE` in processes of one thread; returns what the first one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command, script, "--worker", file], check=True,
                       env=environment)  # fmt: skip
        return json.loads(file.with_suffix(".out").read_text())


def work(file: Path, run: Callable[[DeviceMesh, Any], Any]) -> None:
    """Runs `run` in a process that :func:`launch` started; the first writes what it returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = run(mesh, json.loads(file.read_text()))
    if dist.get_rank() == 0:
        file.with_suffix(".out").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def make_schedules(workload: Workload, num_steps: int) -> dict[str, Schedule]:
    """Returns the schedules without reuse, and of 2/4/6 in the middle 70 % of the steps."""
    steps = timesteps(workload, num_steps)
    preset = Schedule.pyramid(steps, **workload.ranges, fraction=FRACTION)
    return {"no reuse": Schedule.none(steps), "2/4/6": preset}


def make_skips(workload: Workload, num_steps: int) -> dict[str, Schedule]:
    """Returns the schedules that compute a half and a third of the calls, and skip the others."""
    steps = timesteps(workload, num_steps)
    return {f"skip {n}x": Schedule.skip(steps, -(-num_steps // n)) for n in (2, 3)}


class CountSent(TorchDispatchMode):
    """A mode that counts what this process sends: collectives, and bytes to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        is_fake = bool(args) and isinstance(args[0], torch._subclasses.FakeTensor)
        if func in (OPS.all_to_all_single.default, OPS.all_gather_into_tensor.default):
            num_others = dist.get_world_size() - 1
            share = len(args[1]) if func is OPS.all_to_all_single.default else 1
            if not is_fake:
                self.calls += 1
                self.nbytes += args[0].nbytes * num_others // share
        return func(*args, **(kwargs or {}))


def generate(
    workload: Workload,
    model: Callable[..., Any],
    num_steps: int,
    on_step: Callable[[int, torch.Tensor], Any] = no_context,
) -> list[torch.Tensor]:
    """Returns the model's result at each step of a generation."""
    outputs: list[torch.Tensor] = []

    def record(**call: Any) -> Any:
        output = model(**call)
        outputs.append(output[0] if isinstance(output, tuple) else output)
        return output

    denoise(workload, record, draw(workload, 0), num_steps, on_step)
    return outputs


def compile_for(
    model: torch.nn.Module,
    schedule: Schedule,
    mesh: DeviceMesh,
    backend: Any,
    shard: int | None = None,
) -> pabc.CompiledModel:
    """Compiles the model for the mesh; for a mesh of one process, without it."""
    options: dict[str, Any] = {"mesh": mesh, "shard": shard} if mesh.size() > 1 else {}
    return pabc.compile(model, schedule, backend=backend, **options)


@contextmanager
def together(mesh: DeviceMesh) -> Iterator[None]:
    """Synchronizes all ranks at the start and at the end of the context."""
    dist.barrier(mesh.get_group())
    yield
    dist.barrier(mesh.get_group())
