"""Ranks simulated in one process: their graphs run in turns, from one collective to the next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pabc.passes.ir import attribute

OPS = torch.ops._c10d_functional
GROUP = "simulated"


@dataclass(frozen=True)
class Sent:
    """What one rank gives a collective."""

    op: Any
    x: Tensor
    rows: tuple[int, ...] | int

    @property
    def told(self) -> tuple[Any, ...]:
        """What all ranks must agree on, or processes would wait for one another."""
        return self.op, self.x.shape, self.x.dtype, self.rows


Steps = Generator[Sent, Tensor, Any]


def run_ranks(graphs: Sequence[GraphModule], inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """What each rank's graph returns of its inputs."""
    with torch.no_grad():
        runs = [_run(gm, gm.graph, given) for gm, given in zip(graphs, inputs, strict=True)]
        results: list[Any] = [None] * len(runs)
        received: Sequence[Any] = [None] * len(runs)
        while True:
            sent, ended = [], []
            for rank, run in enumerate(runs):
                try:
                    sent.append(run.send(received[rank]))
                except StopIteration as stop:
                    results[rank] = stop.value
                    ended.append(rank)
            if len(ended) == len(runs):
                return results
            assert not ended, f"ranks {ended} have returned, others have not: {sent[0]}"
            received = exchange(sent)


def exchange(sent: Sequence[Sent]) -> list[Tensor]:
    """What each rank receives."""
    assert len({each.told for each in sent}) == 1, [each.told for each in sent]
    if sent[0].op is OPS.all_gather_into_tensor.default:
        assert sent[0].rows == len(sent)
        return [torch.cat([each.x for each in sent])] * len(sent)
    assert sent[0].rows == (1,) * len(sent) == (1,) * len(sent[0].x)
    return [torch.stack([each.x[rank] for each in sent]) for rank in range(len(sent))]


def _run(gm: GraphModule, graph: Graph, inputs: Sequence[Any]) -> Steps:
    given = iter(inputs)
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "get_attr":
            known[node] = attribute(gm, node.target)
        elif node.op == "output":
            return args[0]
        else:
            known[node] = yield from _call(node, args, kwargs)
    raise AssertionError("no output")


def _call(node: Node, args: Any, kwargs: Any) -> Steps:
    assert node.op == "call_function", node.op
    if node.target is OPS.wait_tensor.default:
        return args[0]
    if getattr(node.target, "namespace", "") != OPS.name:
        return node.target(*args, **kwargs)
    *_, group = args
    assert group == GROUP and args[0].is_contiguous()
    if node.target is OPS.all_to_all_single.default:
        assert args[1] == args[2]
        return (yield Sent(node.target, args[0], tuple(args[1])))
    return (yield Sent(node.target, args[0], args[1]))
