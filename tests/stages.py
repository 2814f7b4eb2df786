"""Graphs after a stage of the pipeline, and what they yield when they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from pabc import passes
from pabc.options import Options
from pabc.passes import Denoised, Facts, Guarded, ModelCall, PrologueGraph, Region, Regions
from pabc.passes.ir import copy_into, make_module
from pabc.pipeline import GUARDING, NAMING, collect_guarded
from pabc.runtime.chain import BlockChain
from pabc.stages import Compilation, run_stages

_FACTS: WeakKeyDictionary[GraphModule, Facts] = WeakKeyDictionary()
"""What is known of the graphs that these functions return, so that tests pass graphs alone."""


def capture_call(model: nn.Module, call: Mapping[str, Any], **options: Any) -> GraphModule:
    gm, captured = passes.capture(model.eval(), (), dict(call), **options)
    known = ModelCall(model=model, args=(), kwargs=dict(call))
    return with_facts(gm, Facts([known, captured]))


def with_facts(gm: GraphModule, facts: Facts) -> GraphModule:
    """Returns the graph, of which this is known from now on."""
    _FACTS[gm] = facts
    return gm


def facts_of(gm: GraphModule) -> Facts:
    """Returns what is known of a graph."""
    return _FACTS.get(gm, Facts())


def copy_graph(gm: GraphModule) -> GraphModule:
    graph = Graph()
    copy_into(graph, gm.graph.nodes, {})
    return with_facts(make_module(gm, graph), facts_of(gm))


def run_to(gm: GraphModule, last: str, **options: Any) -> GraphModule:
    """Runs the pipeline on a captured graph up to and including the stage named `last`."""
    stages = [*NAMING[1:], *GUARDING]
    names = [stage.name for stage in stages]
    start = Compilation(gm, facts_of(gm))
    made = run_stages(stages[: names.index(last) + 1], start, Options(**options))
    return with_facts(made.graph, made.facts)


def regions_of(gm: GraphModule) -> tuple[Region, ...]:
    """Returns the regions of a graph, a slot each."""
    return facts_of(gm)[Regions].all


def prologue_of(gm: GraphModule) -> GraphModule | None:
    """Returns the graph of what is hoisted, or None before anything is."""
    prologue = facts_of(gm).get(PrologueGraph)
    return None if prologue is None else prologue.graph


def guarded_of(gm: GraphModule) -> Guarded:
    """Returns a guarded graph with all that is known of it."""
    return collect_guarded(Compilation(gm, facts_of(gm)))


def latents_of(gm: GraphModule) -> str:
    """Returns the name of the latents."""
    return facts_of(gm)[Denoised].latents


def apply(run: Callable[..., Any], gm: GraphModule, *kinds: type, **options: Any) -> Any:
    """Calls a pass, or its check, with what is known of these types."""
    return run(gm, *(facts_of(gm)[kind] for kind in kinds), **options)


def with_hoisted(gm: GraphModule, call: Mapping[str, Any]) -> list[Any]:
    """Returns the call's arguments, then what the graph's prologue computes from them, if any."""
    with torch.no_grad():
        prologue = prologue_of(gm)
        hoisted = () if prologue is None else prologue(*call.values())
    return [*call.values(), *hoisted]


def run_graph(gm: GraphModule, call: Mapping[str, Any], *state: Any) -> torch.Tensor:
    """Returns the first output of a graph whose inputs are `state`, the call's arguments and what
    is hoisted."""
    with torch.no_grad():
        outputs = gm(*state, *with_hoisted(gm, call))
    return outputs[0]


def compile_flat(flat: GraphModule) -> Callable[..., list[torch.Tensor]]:
    """Compiles a flat graph block by block with Inductor."""
    chain, blocks = BlockChain.of(*passes.split_blocks_pass(flat))
    code = passes.compile_blocks([block.graph for block in blocks])
    run = chain.link([block.run for block in code])
    return lambda *inputs: run([*inputs])
