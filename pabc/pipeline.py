"""The compiler as a list: which pass follows which, and what must hold after each.

    capture -> canonicalize -> axes (-> enlarge) -> tag -> regions -> shard -> hoist -> repeats
    -> outline -> cache -> encode -> offload                 once per signature
    specialize -> inline -> lift -> rewrites -> onednn -> lower -> blocks    once per phase
    Inductor                                                 once per distinct block

Passes neither print, time nor check themselves: :func:`run_stages` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from pabc import passes
from pabc.options import Options

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A pass with its name, its arguments taken from :class:`Options`, and its postcondition.

    `annotates`: the pass only writes facts on nodes, so that the code of the graph stays. Of a
    graph with dynamic shapes, it sees the sizes of the captured call.
    """

    name: str
    run: Callable[[GraphModule, Options], GraphModule]
    verify: Callable[[GraphModule], None] | None = None
    annotates: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What the runner saw of one stage: seconds, nodes after it, the graph's code after it."""

    name: str
    seconds: float
    num_nodes: int
    code: str


ANALYSIS: tuple[Stage, ...] = (
    Stage("canonicalize", lambda gm, o: passes.canonicalize_pass(gm)),
    Stage(
        "axes",
        lambda gm, o: passes.name_axes_pass(gm, latents=o.latents),
        passes.verify_axes,
        annotates=True,
    ),
    Stage(
        "tag",
        lambda gm, o: passes.tag_attention_pass(gm, kinds=o.kinds),
        passes.verify_tags,
        annotates=True,
    ),
    Stage(
        "regions",
        lambda gm, o: passes.mark_regions_pass(gm, cut=o.cut),
        passes.verify_marks,
        annotates=True,
    ),
    Stage(
        "shard",
        lambda gm, o: o.sharding.apply(gm) if o.sharding else gm,
        lambda gm: passes.verify_shard(gm) if gm.meta.get("sharded") else None,
    ),
    Stage("hoist", lambda gm, o: passes.hoist_invariants_pass(gm), passes.verify_hoist),
    Stage("repeats", lambda gm, o: passes.keep_unrepeated_pass(gm), passes.verify_repeats),
    Stage("outline", lambda gm, o: passes.outline_regions_pass(gm), passes.verify_outline),
    Stage("cache", lambda gm, o: passes.insert_cache_pass(gm), passes.verify_cache),
    Stage(
        "encode",
        lambda gm, o: passes.encode_cuts_pass(gm, cache_dtype=o.cache_dtype),
        passes.verify_cache,
    ),
    Stage(
        "offload",
        lambda gm, o: passes.offload_cuts_pass(gm) if o.offload else gm,
        passes.verify_cache,
    ),
)
"""The stages between capture and specialization, in order."""
NUM_NAMING = 2
"""How many of these it takes to know which input is denoised."""


def analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    lifted: Collection[int] = (),
) -> tuple[GraphModule, tuple[Record, ...]]:
    """Captures the model for these arguments: its guarded graph, and how it came about.

    Modules that read Python values from what follows from the latents would need a capture a step:
    the graph calls them, and they run as they are. `lifted`: positions among the flattened
    arguments of numbers that become inputs. The model and the arguments may be fake tensors, of
    whatever modes.
    """
    with unset_fake_temporarily():
        args, kwargs = passes.share_fake_mode((args, kwargs))
        return _analyze(model, args, kwargs, options, lifted)


def _analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    lifted: Collection[int],
) -> tuple[GraphModule, tuple[Record, ...]]:
    """:func:`analyze`, outside of any fake mode."""
    opaque: dict[str, str] = {}
    while True:
        start = perf_counter()
        gm = passes.capture(
            model, args, kwargs, opaque=opaque, lifted=lifted, dynamic=options.dynamic
        )
        first = _record("capture", start, gm)
        gm, named = run_stages(ANALYSIS[:NUM_NAMING], gm, options)
        moving = gm.meta["reads"].follow(gm.meta["denoised"])
        if not moving:
            gm.meta["larger"] = capture_larger(model, args, kwargs, gm, options, opaque)
            gm, others = run_stages(ANALYSIS[NUM_NAMING:], gm, options)
            return gm, (first, *named, *others)
        opaque.update({call.path: call.reason for call in gm.meta["calls"]}, **moving)


def capture_larger(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gm: GraphModule,
    options: Options,
    opaque: Mapping[str, str],
) -> GraphModule | None:
    """The graph, with axes, of a larger call, where token axes of one position hide kinds."""
    with passes.hinted(gm):
        call = passes.enlarge_call(model, args, kwargs, gm, kinds=options.kinds)
    if call is None:
        return None
    options = replace(options, latents=gm.meta["latents"])
    try:
        larger = passes.capture(model, *call, opaque=opaque)
        return run_stages(ANALYSIS[:NUM_NAMING], larger, options)[0]
    except ValueError as error:  # the kinds may still be stated
        logger.info("the larger call was not captured: %s", error)
        return None


def run_stages(
    stages: tuple[Stage, ...], gm: GraphModule, options: Options
) -> tuple[GraphModule, tuple[Record, ...]]:
    """Runs each stage, lints and recompiles the graph, checks the postcondition, and times it."""
    records = []
    for stage in stages:
        start = perf_counter()
        before = gm
        with passes.hinted(gm) if stage.annotates else nullcontext():
            gm = stage.run(gm, options)
            if stage.verify is not None:
                stage.verify(gm)
        gm.graph.lint()
        if gm is before and not stage.annotates:  # a new module is compiled as it is made
            gm.recompile()
        records.append(_record(stage.name, start, gm))
    return gm, tuple(records)


def _record(name: str, start: float, gm: GraphModule) -> Record:
    record = Record(name, perf_counter() - start, len(gm.graph.nodes), gm.code)
    logger.debug("%s: %.3f s, %d nodes", name, record.seconds, record.num_nodes)
    return record
