"""Which processes share a model's work, and what each gets of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule

from pabc import passes
from pabc.plan import SlotSpec
from pabc.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How a model is divided among processes; see :func:`pabc.compile`.

    Attributes:
        tokens: the processes that share the tokens of a sample.
        batch: those that share the samples of a batch, where there are some.
        dim: which dimension of the latents is divided; None: that for which they send least.
        output: whether each gets the whole of the outputs, or its part.
        schedule: what decides how often each region is computed, and so what is sent.
    """

    tokens: passes.Ranks
    batch: passes.Ranks | None = None
    dim: int | None = None
    output: passes.Output = "full"
    schedule: Schedule | None = None

    @classmethod
    def over(cls, mesh: DeviceMesh, *, dim: int | None, output: passes.Output) -> Sharding:
        """Over a mesh of one dimension, tokens, or of two, samples and tokens."""
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
        return cls(tokens=ranks[-1], batch=batch, dim=dim, output=output)

    @classmethod
    def imagined(
        cls, sizes: Sequence[int], *, dim: int | None, schedule: Schedule | None
    ) -> Sharding:
        """Over a mesh of such sizes, whose processes need not be there: graphs cannot be run."""
        *batch, tokens = (passes.Ranks(size, 0, "none") for size in sizes)
        return cls(tokens=tokens, batch=batch[0] if batch else None, dim=dim, schedule=schedule)

    def apply(self, gm: GraphModule) -> GraphModule:
        """This process's part of a marked graph; `gm.meta["digest"]` tells of which.

        Raises: ValueError for what would see a part alone: a hook that keeps what it is given, an
        input that the model writes to.
        """
        hook = next((call for call in gm.meta["calls"] if isinstance(call, passes.HookCall)), None)
        if hook is not None:
            raise ValueError(f"mesh: expected no hooks that keep what they see, found {hook.path}")
        if gm.meta["writes"]:
            written = [gm.meta["signature"].inputs[i] for i in gm.meta["writes"]]
            raise ValueError(f"mesh: expected no writes to inputs, found that of {written}")
        digest = self._digest(gm)
        if self.batch is not None:
            gm = passes.shard_batch_pass(gm, self.batch, output=self.output)
        weights = self._shares_computed(gm)
        gm = passes.shard_pass(gm, self.tokens, axis=self.dim, weights=weights, output=self.output)
        axes = [str(each.axis) for each in gm.meta.get("sharded", ())]
        gm.meta["digest"] = hashlib.sha256(f"{digest} {axes}".encode()).hexdigest()
        return gm

    def _digest(self, gm: GraphModule) -> str:
        """SHA-256, as hex, of what is divided and how: the same on all ranks."""
        lines = [str([each and each.size for each in (self.batch, self.tokens)])]
        lines.append(f"{self.dim} {self.output}")
        for node in gm.graph.nodes:
            val = node.meta.get("val")
            said = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ""
            lines.append(f"{node.format_node()} {said} {node.meta.get('region')}")
        text = re.sub(r"\b(cuda|xpu|mps):\d+", r"\1", "\n".join(lines))  # each has its own
        return hashlib.sha256(text.encode()).hexdigest()

    def _shares_computed(self, gm: GraphModule) -> list[float]:
        """For each marked region, the share of steps that compute it."""
        kinds = [kind for kind, _ in gm.meta["branches"]]
        if self.schedule is None or not kinds:
            return [1.0] * len(kinds)
        slots = [SlotSpec(str(i), kind, kinds[:i].count(kind)) for i, kind in enumerate(kinds)]
        reuse = self.schedule.plan(slots).reuse
        return [1.0 - float(share) for share in reuse.mean(axis=0)]
