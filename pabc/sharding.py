"""Translates the user's mesh or ranks into a sharding, as passes take it."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from pabc import passes
from pabc.plan import SlotSpec
from pabc.schedule import Schedule


def shard_over(mesh: DeviceMesh, *, dim: int | None, output: passes.Output) -> passes.Sharding:
    """Returns the sharding over a mesh: (tokens,), or (samples, tokens)."""
    if mesh.ndim not in (1, 2):
        names = f", {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
        raise ValueError(
            "mesh: expected one dimension (tokens) or two (samples, tokens), found "
            f"{mesh.ndim}{names}"
        )
    ranks = [
        passes.Ranks(mesh.size(i), mesh.get_local_rank(i), mesh.get_group(i).group_name)
        for i in range(mesh.ndim)
    ]
    batch = ranks[0] if len(ranks) == 2 else None
    return passes.Sharding(tokens=ranks[-1], batch=batch, dim=dim, output=output)


def shard_for(
    sizes: Sequence[int], *, dim: int | None, weigh: passes.Weigh | None = None
) -> passes.Sharding:
    """Returns the sharding over a mesh of these sizes, without any processes.

    Graphs that are sharded this way can be explained, but not run. For `weigh`, see
    :attr:`pabc.passes.Sharding.weigh`.
    """
    *batch, tokens = (passes.Ranks(size, 0, "none") for size in sizes)
    first = batch[0] if batch else None
    return passes.Sharding(tokens=tokens, batch=first, dim=dim, weigh=weigh)


def shares_computed(schedule: Schedule, kinds: Sequence[str]) -> list[float]:
    """Returns, for regions of these kinds, the share of the steps that compute each of them."""
    if not kinds:
        return []
    slots = [SlotSpec(str(i), kind, kinds[:i].count(kind)) for i, kind in enumerate(kinds)]
    reuse = schedule.plan(slots).reuse
    return [1.0 - float(share) for share in reuse.mean(axis=0)]
