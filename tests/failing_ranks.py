"""Four processes of which some misbehave; each writes what it saw, a JSON object a case.

    RANK=0 WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/failing_ranks.py OUT

Cases: another plan, version, call, weights, latents, an argument that only one rank refuses, an
error between calls (rank 1, or all) or in mid-step (rank 1), a process that is killed in mid-step
(rank 2; the last case, as nobody restarts it).
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import MODELS
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

import pabc

TIMEOUT = datetime.timedelta(seconds=6)
STEPS = range(4)


class Intruder(TorchDispatchMode):
    """Does something at the first collective of a step."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act = act

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in str(func):
            self.act()
        return func(*args, **(kwargs or {}))


def fail() -> None:
    """As a device does that has no memory left."""
    raise torch.OutOfMemoryError("no memory left")


def die() -> None:
    """As the kernel ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def compile_case(
    *, temporal: int = 2, gain: float = 1.0
) -> tuple[pabc.CompiledModel, dict[str, Any]]:
    """The model on a mesh of its own, whose groups no other case has broken."""
    group = dist.new_group(timeout=TIMEOUT)
    mesh = DeviceMesh.from_group(group, "cpu")
    model = MODELS[0].model().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(gain)
    schedule = pabc.Schedule.pyramid(STEPS, temporal=temporal, spatial=2)

    fast = pabc.compile(model, schedule, backend="eager", mesh=mesh, shard=2)
    return fast, MODELS[0].call(step=0)


def another_plan(rank: int) -> None:
    """Rank 3 reuses at other steps."""
    fast, call = compile_case(temporal=3 if rank == 3 else 2)
    for _ in STEPS:
        fast(**call)


def another_version(rank: int) -> None:
    """Rank 1 has another pabc, as far as it says."""
    version = pabc.__version__
    try:
        pabc.__version__ = "0.0" if rank == 1 else version
        fast, call = compile_case()
    finally:
        pabc.__version__ = version
    fast(**call)


def another_call(rank: int) -> None:
    """Rank 0 gives a larger batch."""
    fast, call = compile_case()
    fast(**{name: torch.cat([x, x]) if rank == 0 else x for name, x in call.items()})


def another_checkpoint(rank: int) -> None:
    """Rank 2 has other weights."""
    fast, call = compile_case(gain=2.0 if rank == 2 else 1.0)
    fast(**call)


def another_noise(rank: int) -> None:
    """Rank 1 begins its second generation with other latents."""
    fast, call = compile_case()
    for _ in STEPS:
        fast(**call)
    fast(**{**call, "x_BCTHW": call["x_BCTHW"].roll(int(rank == 1))})


def refused(rank: int) -> None:
    """Rank 1 gives an argument with gradients; then all go on."""
    fast, call = compile_case()
    fast(**call)
    try:
        fast(**{name: x.clone().requires_grad_(rank == 1) for name, x in call.items()})
    finally:
        for _ in STEPS:
            fast(**call)


def error_in_mid_step(rank: int) -> None:
    """Rank 1 runs out of memory at the first collective of a step, and tries again."""
    fast, call = compile_case()
    fast(**call)
    fast(**call)
    try:
        with Intruder(fail) if rank == 1 else nullcontext():
            fast(**call)
    except torch.OutOfMemoryError:
        fast(**call)


def error_between_calls(rank: int) -> None:
    """Rank 1 fails between two calls, and is late with its next generation; then all go on."""
    fast, call = compile_case()
    try:
        with fast.trajectory():
            fast(**call)
            if rank == 1:
                raise ValueError("no such prompt")
            fast(**call)
    finally:
        time.sleep(2 if rank == 1 else 0)
        for _ in range(2):
            with fast.trajectory():
                for _ in STEPS:
                    fast(**call)


def error_on_all_between_calls(rank: int) -> None:
    """All ranks fail between two calls, and go on: nobody is in the others' way."""
    fast, call = compile_case()
    try:
        with fast.trajectory():
            fast(**call)
            raise ValueError("no such prompt")
    except ValueError:
        for _ in STEPS:
            fast(**call)


def killed(rank: int) -> None:
    """Rank 2 is killed at the first collective of step 2."""
    fast, call = compile_case()
    fast(**call)
    fast(**call)
    if rank == 2:
        with Intruder(die):
            fast(**call)
    fast(**call)


CASES = (
    another_plan,
    another_version,
    another_call,
    another_checkpoint,
    another_noise,
    refused,
    error_between_calls,
    error_on_all_between_calls,
    error_in_mid_step,
    killed,
)


def main(out: Path) -> None:
    """Runs the cases in turn, all ranks together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    with torch.no_grad(), out.open("w") as file:
        for case in CASES:
            start = time.perf_counter()
            found = {"case": case.__name__, "rank": rank, "error": "", "text": ""}
            try:
                case(rank)
            except Exception as error:
                found |= {"error": type(error).__name__, "text": str(error)}
            found["seconds"] = time.perf_counter() - start
            print(json.dumps(found), file=file, flush=True)
            if case is not CASES[-1]:
                dist.barrier()
    os._exit(0)  # without taking down groups, which have a dead member


if __name__ == "__main__":
    main(Path(sys.argv[1]))
