"""The compiler as three lists of stages: the order of the passes, and their postconditions.

NAMING    runs once per call signature, and again each time that a module turns out to be opaque
GUARDING  runs once per call signature
PHASE     runs once per phase of a plan; Inductor then compiles each distinct block once
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from pabc import passes
from pabc.internals.fakes import unset_fake_temporarily
from pabc.options import Options
from pabc.stages import Compilation, Stage, StageRecord, run_stages

logger = logging.getLogger(__name__)


def capture_call(
    gm: GraphModule, call: passes.ModelCall, *, dynamic: bool
) -> tuple[GraphModule, passes.Captured]:
    """Captures the model for a call; `gm` is an empty graph."""
    return passes.capture(
        call.model,
        call.args,
        call.kwargs,
        opaque=call.opaque,
        lifted=call.lifted,
        dynamic=dynamic,
    )


def capture_larger_call(
    gm: GraphModule,
    call: passes.ModelCall,
    captured: passes.Captured,
    denoised: passes.Denoised,
    *,
    kinds: dict[str, str],
) -> tuple[GraphModule, passes.Enlarged]:
    """Captures a larger call, if token axes of size 1 hide the kinds of attentions."""
    larger = passes.enlarge_call(gm, call, captured.signature, denoised, kinds=kinds)
    if larger is None:
        return gm, passes.Enlarged()
    options = Options(latents=denoised.latents)
    try:
        named = run_stages(NAMING, begin_capture(larger), options)
    except ValueError as error:  # not fatal: the user may state the kinds
        logger.info("the larger call was not captured: %s", error)
        return gm, passes.Enlarged()
    return gm, passes.Enlarged(named.graph, named.facts[passes.Denoised])


def split_phase(gm: GraphModule, *, cudagraphs: bool) -> tuple[GraphModule, passes.Blocks]:
    """Splits a phase into blocks; ops that cannot be part of one become blocks by themselves."""
    return passes.split_blocks_pass(gm, apart=_kept_apart(cudagraphs))


def keep_phase_whole(gm: GraphModule, *, cudagraphs: bool) -> tuple[GraphModule, passes.Blocks]:
    """Makes a phase one block, except for ops that cannot be part of one."""
    return passes.split_blocks_pass(gm, apart=_kept_apart(cudagraphs), whole=True)


def _kept_apart(cudagraphs: bool) -> Callable[..., bool]:
    """Returns the predicate of ops that are blocks by themselves."""
    return passes.cannot_be_recorded if cudagraphs else passes.is_effect


def is_compiled(options: Options) -> bool:
    """Returns True if Inductor compiles the blocks."""
    return options.backend == "inductor"


NAMING: tuple[Stage, ...] = (
    Stage(name="capture", run=capture_call),
    Stage(name="canonicalize", run=passes.canonicalize_pass),
    Stage(
        name="axes",
        run=passes.name_axes_pass,
        verify=passes.verify_axes,
        annotates=True,
    ),
)
"""The stages that capture the model and name the axes of its tensors."""

GUARDING: tuple[Stage, ...] = (
    Stage(name="enlarge", run=capture_larger_call, annotates=True),
    Stage(
        name="tag",
        run=passes.tag_attention_pass,
        verify=passes.verify_tags,
        annotates=True,
    ),
    Stage(
        name="regions",
        run=passes.mark_regions_pass,
        verify=passes.verify_marks,
        annotates=True,
    ),
    Stage(
        name="shard",
        run=passes.shard_pass,
        verify=passes.verify_shard,
        when=lambda options: options.sharding is not None,
        instead=lambda gm: (gm, passes.Shards()),
        changes_bits=True,
    ),
    Stage(
        name="hoist",
        run=passes.hoist_invariants_pass,
        verify=passes.verify_hoist,
        instead=passes.hoist_nothing,
        is_optional=True,
    ),
    Stage(
        name="repeats",
        run=passes.keep_unrepeated_pass,
        verify=passes.verify_repeats,
        is_optional=True,
    ),
    Stage(name="outline", run=passes.outline_regions_pass, verify=passes.verify_outline),
    Stage(
        name="nest",
        run=passes.nest_regions_pass,
        verify=passes.verify_nest,
        is_optional=True,
    ),
    Stage(name="cache", run=passes.insert_cache_pass, verify=passes.verify_cache),
    Stage(
        name="encode",
        run=passes.encode_cuts_pass,
        verify=passes.verify_cache,
        when=lambda options: options.cache_dtype != "keep",
        is_optional=True,
        changes_bits=True,
    ),
    Stage(
        name="offload",
        run=passes.offload_cuts_pass,
        verify=passes.verify_cache,
        when=lambda options: options.offload is not None,
        is_optional=True,
    ),
)
"""The stages that make the guarded graph, which reuses and stores as its state tells it to."""

PHASE: tuple[Stage, ...] = (
    Stage(name="specialize", run=passes.specialize_phase_pass, verify=passes.verify_phase),
    Stage(name="inline", run=passes.inline_regions_pass, verify=passes.verify_inline),
    Stage(name="lift", run=passes.lift_weights_pass, verify=passes.verify_lift),
    Stage(name="sizes", run=passes.fold_sizes_pass, verify=passes.verify_sizes),
    Stage(name="held", run=passes.lay_out_held_pass),
    Stage(
        name="formulas",
        run=passes.rewrite_formulas_pass,
        when=is_compiled,
        is_optional=True,
        changes_bits=True,
    ),
    Stage(
        name="onednn",
        run=passes.use_onednn_pass,
        when=is_compiled,
        is_optional=True,
        changes_bits=True,
    ),
    Stage(
        name="lower",
        run=passes.lower_pass,
        when=lambda options: options.kernels != "off",
        instead=lambda gm: (gm, passes.KernelMatches()),
        is_optional=True,
        changes_bits=True,
    ),
    Stage(
        name="blocks",
        run=split_phase,
        verify=passes.verify_blocks,
        instead=keep_phase_whole,
        is_optional=True,
    ),
)
"""The stages that specialize the guarded graph for a phase, and split it into blocks."""
STAGES: dict[str, Stage] = {stage.name: stage for stage in (*NAMING, *GUARDING, *PHASE)}
"""Every stage by its name."""


def analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    lifted: Collection[int] = (),
) -> tuple[passes.Guarded, tuple[StageRecord, ...]]:
    """Captures the model for a call; returns the guarded graph and the records of the stages.

    A module that reads Python values from tensors that depend on the latents would have to be
    recaptured at every step. Such a module is opaque instead: the graph calls it. Parameters and
    arguments may be fake tensors of any modes.

    Args:
        model: the model, in eval mode.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: the user's options.
        lifted: the positions, among the flattened arguments, of numbers that become inputs.
    """
    with unset_fake_temporarily():
        args, kwargs = passes.share_fake_mode((args, kwargs))
        call = passes.ModelCall(model=model, args=args, kwargs=kwargs, lifted=tuple(lifted))
        while True:
            named = run_stages(NAMING, begin_capture(call), options, keeps_code=True)
            captured, denoised = named.facts[passes.Captured], named.facts[passes.Denoised]
            moving = captured.reads.follow(denoised.streams)
            if not moving:
                break
            known = {each.path: each.reason for each in captured.calls}
            call = replace(call, opaque={**call.opaque, **known, **moving})
        made = run_stages(GUARDING, named, options, keeps_code=True)
    return collect_guarded(made), made.records


def begin_capture(call: passes.ModelCall) -> Compilation:
    """Returns an empty graph with the call, for the first stage of :data:`NAMING`."""
    return Compilation(GraphModule({}, Graph()), passes.Facts([call]))


def collect_guarded(made: Compilation) -> passes.Guarded:
    """Returns the graph that :data:`GUARDING` made, with its facts."""
    facts = made.facts
    return passes.Guarded(
        graph=made.graph,
        captured=facts[passes.Captured],
        denoised=facts[passes.Denoised],
        marked=facts[passes.Marked],
        shards=facts[passes.Shards],
        prologue=facts[passes.PrologueGraph],
        regions=facts[passes.Regions].all,
        left_out=facts[passes.Regions].left_out,
    )


def specialize_phase(
    guarded: passes.Guarded,
    slots: passes.PhaseSlots,
    options: Options,
    *,
    keeps_code: bool = False,
) -> Compilation:
    """Runs the first stage of :data:`PHASE`; the resulting graph can be run op by op."""
    facts = passes.Facts([passes.Regions(guarded.regions), slots])
    start = Compilation(guarded.graph, facts)
    return run_stages(PHASE[:1], start, options, keeps_code=keeps_code)


def lower_phase(
    specialized: Compilation,
    sizes: passes.InputSizes,
    options: Options,
    *,
    keeps_code: bool = False,
) -> Compilation:
    """Runs the other stages of :data:`PHASE`; the result is a chain of blocks to compile.

    Args:
        specialized: the result of :func:`specialize_phase`.
        sizes: the sizes to compile for.
        options: the user's options.
        keeps_code: True to record the graph's code after each stage.
    """
    start = replace(specialized, facts=specialized.facts.adding(sizes))
    return run_stages(PHASE[1:], start, options, keeps_code=keeps_code)


def trace_phase(
    guarded: passes.Guarded, options: Options, slots: passes.PhaseSlots | None = None
) -> tuple[StageRecord, ...]:
    """Runs all stages of :data:`PHASE` for the sizes of the captured call; returns their records.

    The records include the graph's code. The default phase reuses and stores nothing.
    """
    slots = slots or passes.PhaseSlots((), ())
    sizes = guarded.captured.sizes
    values = passes.InputSizes({} if sizes is None else sizes.hints)
    made = specialize_phase(guarded, slots, options, keeps_code=True)
    return lower_phase(made, values, options, keeps_code=True).records
