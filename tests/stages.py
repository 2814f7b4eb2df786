"""Graphs after a stage of the pipeline, and what they yield when they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from pabc import passes
from pabc.options import Options
from pabc.passes import Region
from pabc.passes.ir import copy_into, derived
from pabc.pipeline import ANALYSIS, run_stages
from pabc.runtime.chain import Chain


def capture_call(model: nn.Module, call: Mapping[str, Any]) -> GraphModule:
    return passes.capture(model.eval(), (), dict(call))


def copy_graph(gm: GraphModule) -> GraphModule:
    graph = Graph()
    copy_into(graph, gm.graph.nodes, {})
    return derived(gm, graph)


def run_to(gm: GraphModule, last: str, **config: Any) -> GraphModule:
    """Runs the pipeline on a captured graph up to and including the stage named `last`."""
    names = [stage.name for stage in ANALYSIS]
    return run_stages(ANALYSIS[: names.index(last) + 1], gm, Options(**config))[0]


def regions_of(gm: GraphModule) -> tuple[Region, ...]:
    """Returns the regions of a graph, a slot each."""
    return gm.meta["regions"]


def prologue_of(gm: GraphModule) -> GraphModule | None:
    """Returns the graph of what is hoisted, or None before anything is."""
    return gm.meta.get("prologue")


def with_hoisted(gm: GraphModule, call: Mapping[str, Any]) -> list[Any]:
    """The call's arguments, and what the graph's prologue makes of them, where it has one."""
    with torch.no_grad():
        prologue = prologue_of(gm)
        hoisted = () if prologue is None else prologue(*call.values())
    return [*call.values(), *hoisted]


def run_graph(gm: GraphModule, call: Mapping[str, Any], *state: Any) -> torch.Tensor:
    """The first output of a graph that takes `state`, the call's arguments and what is hoisted."""
    with torch.no_grad():
        outputs = gm(*state, *with_hoisted(gm, call))
    return outputs[0]


def compile_flat(flat: GraphModule) -> Callable[..., list[torch.Tensor]]:
    """A flat graph, block by block, with Inductor."""
    chain, blocks = Chain.of(passes.split_blocks_pass(flat))
    run = chain.link(passes.compile_blocks(blocks))
    return lambda *inputs: run([*inputs])
