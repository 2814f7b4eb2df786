"""Phases as chains of blocks, whose compiled code is called one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pabc import passes
from pabc.passes import (
    output_node,
    user_inputs,
)


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a block: its index, the places of its inputs, and how many results it has."""

    block: int
    inputs: tuple[int, ...]
    num_results: int


@dataclass(frozen=True, slots=True)
class BlockChain:
    """A flat function as a sequence of calls of blocks.

    Every value has a place, an index: first come the `num_inputs` inputs, then the results of each
    call in turn. `outputs` are the places of what the function returns.
    """

    num_inputs: int
    calls: tuple[BlockCall, ...]
    outputs: tuple[int, ...]

    def split(self, alone: Collection[int]) -> tuple[ChainPiece, ...]:
        """Splits the chain into consecutive pieces: each call of a block in `alone` is one, and so
        are the calls between two of them."""
        groups: list[tuple[list[BlockCall], list[int]]] = []
        count = self.num_inputs
        for i, call in enumerate(self.calls):
            if not i or not {call.block, self.calls[i - 1].block}.isdisjoint(alone):
                groups.append(([], []))
            groups[-1][0].append(call)
            groups[-1][1].extend(range(count, count + call.num_results))
            count += call.num_results
        pieces: list[ChainPiece] = []
        taken = set(self.outputs)
        for calls, made in reversed(groups):
            used = dict.fromkeys(place for call in calls for place in call.inputs)
            inputs = tuple(place for place in used if place not in made)
            results = tuple(place for place in made if place in taken)
            local = {place: i for i, place in enumerate((*inputs, *made))}
            renumbered = tuple(
                replace(call, inputs=tuple(map(local.__getitem__, call.inputs))) for call in calls
            )
            chain = BlockChain(len(inputs), renumbered, tuple(map(local.__getitem__, results)))
            pieces.append(ChainPiece(chain, inputs, results, calls[0].block in alone))
            taken.update(inputs)
        return tuple(reversed(pieces))

    @classmethod
    def of(
        cls, gm: GraphModule, split: passes.Blocks
    ) -> tuple[BlockChain, tuple[passes.Block, ...]]:
        """Returns the chain of a split graph (:func:`split_blocks_pass`), and its blocks."""
        places: dict[Node, int] = {}
        names: dict[str, int] = {}
        calls = []
        inputs = user_inputs(gm.graph)
        places.update({node: place for place, node in enumerate(inputs)})
        count = len(inputs)
        for node in gm.graph.nodes:
            if node.op == "call_module":
                block = names.setdefault(str(node.target), len(names))
                places.update({item: count + int(item.args[1]) for item in node.users})
                calls.append(BlockCall(block, tuple(places[n] for n in node.args), len(node.users)))
                count += len(node.users)
        outputs = tuple(places[n] for n in output_node(gm.graph).args[0])
        blocks = tuple(split.by_name[name] for name in names)
        return cls(len(inputs), tuple(calls), outputs), blocks

    def link(
        self, code: Sequence[passes.BlockFunction]
    ) -> Callable[[list[Any]], list[torch.Tensor]]:
        """Returns a function from a list of the inputs, which it empties, to the outputs.

        A value is released before the last call that takes it, or at once if there is none.
        """
        last = {place: i for i, call in enumerate(self.calls) for place in call.inputs}
        kept = set(self.outputs)
        steps = []
        count = self.num_inputs
        for i, call in enumerate(self.calls):
            results = range(count, count + call.num_results)
            count += call.num_results
            over = tuple(p for p in call.inputs if last[p] == i and p not in kept)
            unused = tuple(p for p in results if p not in last and p not in kept)
            steps.append((code[call.block], _gather(call.inputs), over, unused))
        outputs = _gather(self.outputs)

        def run(values: list[Any]) -> list[torch.Tensor]:
            for block, inputs, over, unused in steps:
                given = inputs(values)
                for place in over:
                    values[place] = None
                values.extend(block(given))
                for place in unused:
                    values[place] = None
            results = outputs(values)
            values.clear()
            return results

        return run


@dataclass(frozen=True, slots=True)
class ChainPiece:
    """A piece of a chain, as a chain of its own.

    `inputs` and `results` are the places that its inputs and results have in the whole chain.
    """

    chain: BlockChain
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    is_alone: bool


def _gather(places: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
    """Returns a function that takes the values at these places from a list."""
    if len(places) < 2:
        return lambda values: [values[place] for place in places]
    getter = itemgetter(*places)
    return lambda values: list(getter(values))


class BlockCode:
    """The code of each distinct block, compiled once."""

    def __init__(self) -> None:
        self._code: dict[Hashable, passes.CompiledBlock] = {}

    def __len__(self) -> int:
        return len(self._code)

    def compile(self, blocks: Iterable[passes.Block], *, op_by_op: bool = False) -> None:
        """Compiles the blocks that are unlike all earlier ones: with Inductor, or to be run op by
        op."""
        fresh: dict[Hashable, None] = {}

        def find_fresh() -> Iterator[GraphModule]:
            for block in blocks:
                if block.key not in self._code and block.key not in fresh:
                    fresh[block.key] = None
                    yield block.graph

        code = (passes.run_blocks if op_by_op else passes.compile_blocks)(find_fresh())
        self._code.update(zip(fresh, code, strict=True))

    def get(self, block: passes.Block) -> passes.CompiledBlock:
        """Returns the code of a block."""
        return self._code[block.key]
