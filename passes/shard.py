"""shard: shards the tokens of a model over processes, with communication inside the regions.

One token axis of the latents is sharded over all ranks, from the first region on. Ops that treat
positions independently run on shards. A region whose attention mixes the axis runs on shards of
another axis, with an all-to-all at its entry and one at its exit (Dynamic Sequence Parallel), or,
if it mixes all axes, on shards of its heads (Ulysses). Both lie in the region: a step that reuses
it sends nothing. If no rule covers an op (:mod:`pabc.passes.sharding.rules`), its operands are
gathered, and every rank computes it whole.

The batch can be sharded as well, from the inputs on, by the same rules: nothing mixes samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from .facts import Captured, Denoised, Marked, ShardedAxis, Shards
from .ir import Axis, Factor, user_inputs
from .regions import verify_marks
from .sharding.moves import find_collective
from .sharding.places import Ranks
from .sharding.sharder import Output, Sharder, attentions_by_region, mix
from .tracing.hooks import HookCall

Weigh = Callable[[Sequence[str]], Sequence[float]]
"""Kinds of regions -> the share of steps that compute each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The sharding of a model over processes; see :func:`pabc.compile`.

    Attributes:
        tokens: the ranks that share the tokens of a sample.
        batch: the ranks that share the samples of a batch; None: the batch is not sharded.
        dim: the dimension of the latents to shard; None: the one for which they send least.
        output: whether every rank returns the whole outputs, or its own positions.
        weigh: kinds of regions -> the share of steps that compute each; None: every step does.
    """

    tokens: Ranks
    batch: Ranks | None = None
    dim: int | None = None
    output: Output = "full"
    weigh: Weigh | None = None


def shard_pass(
    gm: GraphModule,
    captured: Captured,
    denoised: Denoised,
    marked: Marked,
    *,
    sharding: Sharding,
) -> tuple[GraphModule, Shards]:
    """Shards the batch and one token axis: each rank computes its own samples and positions.

    Requires: marks (:func:`mark_regions_pass`); fixed shapes.
    Ensures: outputs equal those of one rank up to the order of sums; collectives of a region are
    marked as its own; cuts are shards.
    Raises: ValueError for what would see only a shard (a hook that keeps what it is given, an input
    that the model writes to), and if no axis can be sharded.

        # before                                # after, T sharded
        %n = layer_norm(%x)                     %s = all_to_all(%x: T -> S)       region 0
        %o = sdpa(...)  # over T                %n = layer_norm(%s)               region 0
        %p = linear(%o)                         %o = sdpa(...)                    region 0
        %y = add(%x, %p)                        %p = linear(%o)                   region 0
                                                %c = all_to_all(%p: S -> T)       region 0
                                                %y = add(%x, %c)
    """
    _refuse_effects(captured)
    digest = _digest(gm, sharding)
    axes: list[ShardedAxis] = []
    if sharding.batch is not None:
        gm, batch = shard_batch(gm, denoised, sharding.batch, output=sharding.output)
        axes += [batch] if batch is not None else []
    kinds = [kind for kind, _ in marked.branches]
    weights = () if sharding.weigh is None else sharding.weigh(kinds)
    gm, tokens = shard_tokens(
        gm, denoised, sharding.tokens, axis=sharding.dim, weights=weights, output=sharding.output
    )
    axes += [tokens] if tokens is not None else []
    names = [str(each.axis) for each in axes]
    return gm, Shards(tuple(axes), hashlib.sha256(f"{digest} {names}".encode()).hexdigest())


def _refuse_effects(captured: Captured) -> None:
    hook = next((call for call in captured.calls if isinstance(call, HookCall)), None)
    if hook is not None:
        raise ValueError(f"mesh: expected no hooks that keep what they see, found {hook.path}")
    if captured.writes:
        written = [captured.signature.inputs[i] for i in captured.writes]
        raise ValueError(f"mesh: expected no writes to inputs, found that of {written}")


def _digest(gm: GraphModule, sharding: Sharding) -> str:
    """Returns the SHA-256, as hex, of what is sharded and how: the same on all ranks."""
    lines = [str([each and each.size for each in (sharding.batch, sharding.tokens)])]
    lines.append(f"{sharding.dim} {sharding.output}")
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        layout = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ""
        lines.append(f"{node.format_node()} {layout} {node.meta.get('region')}")
    text = re.sub(r"\b(cuda|xpu|mps):\d+", r"\1", "\n".join(lines))  # each rank has its own
    return hashlib.sha256(text.encode()).hexdigest()


def shard_tokens(
    gm: GraphModule,
    denoised: Denoised,
    ranks: Ranks,
    *,
    axis: int | None = None,
    weights: Sequence[float] = (),
    output: Output = "full",
) -> tuple[GraphModule, ShardedAxis | None]:
    """Shards one token axis: each rank computes its own positions.

    Args:
        gm: a marked graph of fixed shapes.
        denoised: which of its inputs are denoised.
        ranks: the ranks that share the axis; for a single one, the graph is returned unchanged.
        axis: the dimension of the latents to shard; by default, the one for which a rank sends the
            fewest bytes, and among those that the same regions mix, the one that is padded least.
        weights: per region, the share of steps that compute it; by default 1.
        output: whether every rank returns the whole outputs, or its own positions.
    """
    sizes = find_token_axes(gm, denoised.latents)
    if not sizes:
        raise ValueError(
            "mesh: expected a model with attention along axes of its latents, found none whose "
            "positions can be told apart"
        )
    axes = sorted(sizes, key=lambda each: ranks.share(sizes[each]) / sizes[each])
    chosen = [each for each in axes if axis in (None, each.dim)]
    if not chosen:
        dims = [each.dim for each in sizes]
        raise ValueError(f"shard: expected a token dimension of the latents, {dims}, found {axis}")
    if ranks.size == 1:
        return gm, None
    streams = denoised.streams
    made = [_shard(gm, streams, ranks, axes, each, output) for each in _one_of_alike(gm, chosen)]
    return min(made, key=lambda sharded: _weigh(sharded[0], weights))


def shard_batch(
    gm: GraphModule, denoised: Denoised, ranks: Ranks, *, output: Output = "full"
) -> tuple[GraphModule, ShardedAxis | None]:
    """Shards the batch: each rank computes its own samples (guidance branches, or videos).

    No region sends anything. Arguments as for :func:`shard_tokens`.
    """
    if ranks.size == 1:
        return gm, None
    latents = next(n for n in user_inputs(gm.graph) if n.name == denoised.latents)
    (batch,) = latents.meta["axes"][0]
    return _shard(gm, denoised.streams, ranks, [batch.axis], batch.axis, output, early=True)


def verify_shard(gm: GraphModule, marked: Marked) -> None:
    """Checks that regions are still regions, with their collectives."""
    verify_marks(gm, marked)


def find_token_axes(gm: GraphModule, source: str) -> dict[Axis, int]:
    """Returns the token axes of the latents of more than one position, and how many each has.

    These are the axes along which attention has its queries; where the order of positions is lost,
    an axis counts as one position. `source` names the latents.
    """
    found: dict[Axis, int] = {}
    for node in gm.graph.nodes:
        if "attention" in node.meta:
            for factor in node.meta["attention"].query:
                for each in _leaves(factor):
                    if each.axis is not None and each.axis.source == source:
                        found[each.axis] = max(each.size, found.get(each.axis, 0))
    return {axis: found[axis] for axis in sorted(found, key=lambda x: x.dim) if found[axis] > 1}


def _leaves(factor: Factor) -> Iterator[Factor]:
    if not factor.parts:
        yield factor
    for part in factor.parts:
        for each in part:
            yield from _leaves(each)


def _one_of_alike(gm: GraphModule, axes: Sequence[Axis]) -> list[Axis]:
    """Returns one axis, the first, of each set that the same regions mix: these send alike."""
    found: dict[tuple[bool, ...], Axis] = {}
    groups = attentions_by_region(gm).values()
    for axis in axes:
        found.setdefault(tuple(mix(attentions, axis) for attentions in groups), axis)
    return list(found.values())


def _shard(
    gm: GraphModule,
    streams: Collection[str],
    ranks: Ranks,
    axes: Sequence[Axis],
    axis: Axis,
    output: Output,
    *,
    early: bool = False,
) -> tuple[GraphModule, ShardedAxis]:
    sharder = Sharder(gm, streams, ranks, axes, axis, output, early=early)
    result = sharder.run()
    return result, ShardedAxis(axis, ranks.size, tuple(sorted(sharder.gathered)))


def _weigh(gm: GraphModule, weights: Sequence[float]) -> float:
    """Returns the bytes that a rank sends per step, on average."""
    total = 0.0
    for node in gm.graph.nodes:
        sent = find_collective(node)
        if sent is not None:
            region = node.meta.get("region")
            total += sent.nbytes * (weights[region] if weights and region is not None else 1.0)
    return total
