"""Regions that contain others, on several ranks: simulated ranks that reuse one give what a single
process does, slots hold shards, and what is skipped sends nothing."""

import pytest
import torch
from models import MODELS, Case
from phases import inline, specialize
from sharded.simulator import GROUP, run_ranks
from stages import apply, facts_of, regions_of, run_to, with_facts, with_hoisted

from pabc.base.kinds import COARSE
from pabc.options import Options
from pabc.passes import Denoised, Ranks, Shards, find_collectives, shard_tokens
from pabc.pipeline import GUARDING
from pabc.stages import Compilation, run_stages

NAMES = [stage.name for stage in GUARDING]
CASES = [c for c in MODELS if c.name in ("Factorized", "JointImage", "LongSkip", "Refined")]


def guard(gm, like):
    """Runs the stages after sharding on a graph of which the same is known as of `like`."""
    stages = GUARDING[NAMES.index("hoist") : NAMES.index("cache") + 1]
    facts = facts_of(like).adding(Shards())
    made = run_stages(stages, Compilation(gm, facts), Options())
    return with_facts(made.graph, made.facts)


def coarse(gm):
    return [slot for slot, region in enumerate(regions_of(gm)) if region.kind in COARSE]


def store(graphs, call):
    """Returns, for each rank, what its coarse slots hold after a step."""
    phases = [inline(specialize(gm, stored=coarse(gm))) for gm in graphs]
    results = run_ranks(phases, [with_hoisted(gm, call) for gm in graphs])
    kept = []
    for gm, (_, stored) in zip(graphs, results, strict=True):
        rest = iter(stored)
        kept.append({s: [next(rest) for _ in regions_of(gm)[s].cuts] for s in coarse(gm)})
    return kept


def reuse(graphs, call, slot, kept):
    """Returns the outputs of each rank, and the number of its collectives."""
    phases = [inline(specialize(gm, reused=[slot])) for gm in graphs]
    inputs = [[*with_hoisted(gm, call), *each[slot]] for gm, each in zip(graphs, kept, strict=True)]
    outputs = [result[0] for result, _ in run_ranks(phases, inputs)]
    return outputs, len(find_collectives(phases[0].graph))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_reuse_a_coarser_region_give_what_one_gives(case: Case, captured):
    gm = run_to(captured(case)[1], "regions")
    ranks = [
        guard(apply(shard_tokens, gm, Denoised, ranks=Ranks(2, rank, GROUP))[0], gm)
        for rank in range(2)
    ]
    whole = guard(run_to(captured(case)[1], "regions"), gm)
    assert [r.name for r in regions_of(ranks[0])] == [r.name for r in regions_of(whole)]
    held, alone = store(ranks, case.call(0)), store([whole], case.call(0))
    for slot in coarse(whole):
        (expected,), _ = reuse([whole], case.call(1), slot, alone)
        outputs, num_sent = reuse(ranks, case.call(1), slot, held)
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        kind = regions_of(whole)[slot].kind
        if kind != "block":
            assert num_sent == (kind == "stack"), "the output is gathered"
        sizes = [sum(t.numel() for t in each[slot]) for each in (held[0], alone[0])]
        assert sizes[0] == sizes[1] if kind == "model" else sizes[0] < sizes[1]
