"""Skips calls of models that users sharded themselves, in two processes.

    torchrun --standalone --nproc-per-node 2 tests/run_original_ranks.py

Each rank compares what it gets with a model that one process has for itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from skipping import TIMESTEPS, ForecastByHand, generate, skip_calls
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pabc

COMPUTED = (0, 1, 3, 6)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * t.view(-1, 1, 1) / 1000


class Summing(Mlp):
    """A collective of its own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = super().forward(x, t)
        dist.all_reduce(y)
        return y / dist.get_world_size()


def shard_tensors(model: nn.Module) -> nn.Module:
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def shard_fully(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(model: nn.Module, prepare: Callable[[nn.Module], nn.Module], seed: int) -> None:
    plain = Mlp().eval()
    fast = skip_calls(prepare(model.eval()), pabc.Schedule.skip(TIMESTEPS, COMPUTED))
    for _ in range(2):
        expected = generate(ForecastByHand(plain, COMPUTED, 2), seed=seed)
        for mine, theirs in zip(generate(fast, seed=seed), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    stats = fast.stats
    assert stats.reused == 6 and not stats.fallbacks, stats


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    check(Mlp(), copy.copy, seed=rank)  # data parallel: each has calls of its own
    check(Summing(), copy.copy, seed=0)
    check(Mlp(), shard_tensors, seed=0)
    check(Mlp(), shard_fully, seed=rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # DTensor keeps the group, so that gloo's threads live on. One that frees a tensor while the
    # interpreter is finalized cannot have the GIL, and aborts the process.
    os._exit(0)
