"""shard: divides the tokens of a model among processes, with what they send inside the regions.

One token axis of the latents is divided among all ranks, from the first region on. What works on
positions by themselves has its own; a region whose attention mixes the axis runs on shards of
another axis, with an all-to-all at its entry and one at its exit (Dynamic Sequence Parallel), or,
where it mixes all axes, on shards of its heads (Ulysses). Both lie in the region: a step that
reuses it sends nothing. Whatever has no rule (:mod:`pabc.passes.sharding.rules`) is gathered, and
computed by every rank.

The batch can be divided as well, from the inputs on, by the same rules: nothing mixes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from .ir import Axis, Factor, user_inputs
from .regions import verify_marks
from .sharding.moves import find_collective
from .sharding.places import Ranks
from .sharding.sharder import Output, Sharder, attentions_by_region, mix


@dataclass(frozen=True, slots=True)
class Sharded:
    """What a graph is a shard of: an axis of the latents, divided among so many ranks.

    `gathered`: the regions of which every rank computes the whole, since their ops have no rule.
    """

    axis: Axis
    ranks: int
    gathered: tuple[int, ...] = ()


def shard_pass(
    gm: GraphModule,
    ranks: Ranks,
    *,
    axis: int | None = None,
    weights: Sequence[float] = (),
    output: Output = "full",
) -> GraphModule:
    """Has each rank compute its positions of one token axis.

    Args:
        axis: which dimension of the latents to divide; by default, that for which a rank sends the
            fewest bytes; of those that the same regions mix, the one that is padded least.
        weights: of each region, the share of steps that compute it; by default, all do.
        output: whether every rank gets the whole of the model's outputs, or its positions.

    Requires: marks (:func:`mark_regions_pass`) of a graph of one size.
    Ensures: outputs as on one rank, but for the order of sums; collectives of a region are marked
    as its own; cuts are shards. `gm.meta["sharded"]` says what is divided.

        # before                                # after, T divided
        %n = layer_norm(%x)                     %s = all_to_all(%x: T -> S)       region 0
        %o = sdpa(...)  # over T                %n = layer_norm(%s)               region 0
        %p = linear(%o)                         %o = sdpa(...)                    region 0
        %y = add(%x, %p)                        %p = linear(%o)                   region 0
                                                %c = all_to_all(%p: S -> T)       region 0
                                                %y = add(%x, %c)
    """
    sizes = find_token_axes(gm)
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
        return gm
    made = [_shard(gm, ranks, axes, each, output) for each in _one_of_alike(gm, chosen)]
    return min(made, key=lambda sharded: _weigh(sharded, weights))


def shard_batch_pass(gm: GraphModule, ranks: Ranks, *, output: Output = "full") -> GraphModule:
    """Has each rank compute its samples of the batch: its guidance branches, or its videos.

    Requires, Ensures: as :func:`shard_pass`; no region sends anything.
    """
    if ranks.size == 1:
        return gm
    latents = next(n for n in user_inputs(gm.graph) if n.name == gm.meta["latents"])
    (batch,) = latents.meta["axes"][0]
    return _shard(gm, ranks, [batch.axis], batch.axis, output, early=True)


def verify_shard(gm: GraphModule) -> None:
    """Regions are still such, collectives included."""
    verify_marks(gm)


def find_token_axes(gm: GraphModule) -> dict[Axis, int]:
    """The axes of the latents along which some attention has its queries, in their order, and how
    many positions each has: more than one. Of positions that are mixed, each axis is said to have
    one."""
    source = gm.meta["latents"]
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
    """Of axes that the same regions mix, the first: but for padding, they send alike."""
    found: dict[tuple[bool, ...], Axis] = {}
    groups = attentions_by_region(gm).values()
    for axis in axes:
        found.setdefault(tuple(mix(attentions, axis) for attentions in groups), axis)
    return list(found.values())


def _shard(
    gm: GraphModule,
    ranks: Ranks,
    axes: Sequence[Axis],
    axis: Axis,
    output: Output,
    *,
    early: bool = False,
) -> GraphModule:
    sharder = Sharder(gm, ranks, axes, axis, output, early=early)
    result = sharder.run()
    said = Sharded(axis, ranks.size, tuple(sorted(sharder.gathered)))
    result.meta["sharded"] = (*gm.meta.get("sharded", ()), said)
    return result


def _weigh(gm: GraphModule, weights: Sequence[float]) -> float:
    """The bytes that a rank sends at a step, on average."""
    total = 0.0
    for node in gm.graph.nodes:
        sent = find_collective(node)
        if sent is not None:
            region = node.meta.get("region")
            total += sent.nbytes * (weights[region] if weights and region is not None else 1.0)
    return total
