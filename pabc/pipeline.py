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
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from pabc import passes
from pabc.sharding import Sharding

Offload = Literal["cpu"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What the user may decide about graphs; arguments of :func:`pabc.compile`."""

    cut: passes.Cut = "attention"
    kinds: Mapping[str, str] = field(default_factory=dict)
    latents: str | None = None
    dynamic: bool = False
    cache_dtype: passes.CacheDtype = "keep"
    offload: Offload | None = None
    memory_budget: int | None = None
    cudagraphs: bool = False
    kernels: passes.Kernels = "auto"
    sharding: Sharding | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A pass with its name, its configuration taken from :class:`Config`, and its postcondition.

    `annotates`: the pass only writes facts on nodes, so that the code of the graph stays. Of a
    graph for any sizes, it sees those of the captured call.
    """

    name: str
    run: Callable[[GraphModule, Config], GraphModule]
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
    Stage("canonicalize", lambda gm, c: passes.canonicalize_pass(gm)),
    Stage(
        "axes",
        lambda gm, c: passes.name_axes_pass(gm, latents=c.latents),
        passes.verify_axes,
        annotates=True,
    ),
    Stage(
        "tag",
        lambda gm, c: passes.tag_attention_pass(gm, kinds=c.kinds),
        passes.verify_tags,
        annotates=True,
    ),
    Stage(
        "regions",
        lambda gm, c: passes.mark_regions_pass(gm, cut=c.cut),
        passes.verify_marks,
        annotates=True,
    ),
    Stage(
        "shard",
        lambda gm, c: c.sharding.apply(gm) if c.sharding else gm,
        lambda gm: passes.verify_shard(gm) if gm.meta.get("sharded") else None,
    ),
    Stage("hoist", lambda gm, c: passes.hoist_invariants_pass(gm), passes.verify_hoist),
    Stage("repeats", lambda gm, c: passes.keep_unrepeated_pass(gm), passes.verify_repeats),
    Stage("outline", lambda gm, c: passes.outline_regions_pass(gm), passes.verify_outline),
    Stage("cache", lambda gm, c: passes.insert_cache_pass(gm), passes.verify_cache),
    Stage(
        "encode",
        lambda gm, c: passes.encode_cuts_pass(gm, cache_dtype=c.cache_dtype),
        passes.verify_cache,
    ),
    Stage(
        "offload",
        lambda gm, c: passes.offload_cuts_pass(gm) if c.offload else gm,
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
    config: Config,
    promoted: Collection[int] = (),
) -> tuple[GraphModule, tuple[Record, ...]]:
    """Captures the model for these arguments: its guarded graph, and how it came about.

    Modules that read Python values from what follows from the latents would need a capture a step:
    the graph calls them, and they run as they are. `promoted`: positions among the flattened
    arguments of numbers that become inputs. The model and the arguments may be fake tensors, of
    whatever modes.
    """
    with unset_fake_temporarily():
        args, kwargs = passes.share_fake_mode((args, kwargs))
        return _analyze(model, args, kwargs, config, promoted)


def _analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: Config,
    promoted: Collection[int],
) -> tuple[GraphModule, tuple[Record, ...]]:
    """:func:`analyze`, outside of any fake mode."""
    options: dict[str, Any] = {"promoted": promoted, "dynamic": config.dynamic}
    outside: dict[str, str] = {}
    while True:
        start = perf_counter()
        gm = passes.capture(model, args, kwargs, outside=outside, **options)
        first = _record("capture", start, gm)
        gm, named = run_stages(ANALYSIS[:NUM_NAMING], gm, config)
        moving = gm.meta["reads"].follow(gm.meta["denoised"])
        if not moving:
            gm.meta["larger"] = capture_larger(model, args, kwargs, gm, config, outside)
            gm, others = run_stages(ANALYSIS[NUM_NAMING:], gm, config)
            return gm, (first, *named, *others)
        outside.update({call.path: call.reason for call in gm.meta["calls"]}, **moving)


def capture_larger(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gm: GraphModule,
    config: Config,
    outside: Mapping[str, str],
) -> GraphModule | None:
    """The graph, with axes, of a larger call, where token axes of one position hide kinds."""
    with passes.hinted(gm):
        call = passes.enlarge_call(model, args, kwargs, gm, kinds=config.kinds)
    if call is None:
        return None
    config = replace(config, latents=gm.meta["latents"])
    try:
        larger = passes.capture(model, *call, outside=outside)
        return run_stages(ANALYSIS[:NUM_NAMING], larger, config)[0]
    except ValueError as error:  # the kinds may still be stated
        logger.info("the larger call was not captured: %s", error)
        return None


def run_stages(
    stages: tuple[Stage, ...], gm: GraphModule, config: Config
) -> tuple[GraphModule, tuple[Record, ...]]:
    """Runs each stage, lints and recompiles the graph, checks the postcondition, and times it."""
    records = []
    for stage in stages:
        start = perf_counter()
        before = gm
        with passes.hinted(gm) if stage.annotates else nullcontext():
            gm = stage.run(gm, config)
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
