"""Runs rows' pipelines on the ranks of this process group, and prints the cells that come of it.

    torchrun --standalone --nproc-per-node 2 tests/matrix/run_ranks.py ROW...

A row that raises ends the run: other ranks may wait for the one that did.
"""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import pabc
from matrix.ranks import MARK
from matrix.rows import find_row
from matrix.trial import describe

KINDS = ("full", "joint", "spatial", "temporal", "cross", "mlp")


def reuse_all(timesteps: Any) -> pabc.Schedule:
    return pabc.Schedule.pyramid(timesteps, **dict.fromkeys(KINDS, 2))


def compare(name: str, mesh: DeviceMesh) -> str:
    """Returns the cell: this rank's latents against those of one process."""
    row, found, sharded = find_row(name), [], []
    for options in ({}, {"mesh": mesh}):
        with pabc.compile_pipeline(row.make(), reuse_all, backend="eager", **options) as fast:
            found.append(row.run(fast))
            sharded = [model.explain().communication for model in fast.models.values()]
    if not all(sharded):
        return "no: nothing is sharded"
    error = float((found[1] - found[0]).abs().max())
    return "yes" if error <= 1e-4 * float(found[0].abs().max()) else f"no: differs by {error:.1e}"


def main(*names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        try:
            cell = compare(name, mesh)
        except Exception as error:
            print(f"{MARK}{name}\tno: {describe(error)}", flush=True)
            raise
        cells: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(cells, cell)
        if dist.get_rank() == 0:
            print(f"{MARK}{name}\t{next((c for c in cells if c != 'yes'), 'yes')}", flush=True)
    dist.barrier()  # a rank that leaves closes its connections to the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
