"""Writes and reads the code of a program's phases.

What the process compiled for itself is written where it can be: the code of blocks on CPUs. Blocks
of other devices are compiled once more, ahead of time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch

from pabc.artifact.listings import load_listing, reduce_listing
from pabc.artifact.packages import compile_package, load_package
from pabc.artifact.values import Json, decode, encode
from pabc.internals.dynamo import compile_lock
from pabc.passes import CompiledBlock, Lifted, Listing, Package, PhaseSlots, ResultIndex, is_opaque
from pabc.runtime.chain import BlockCall, BlockChain
from pabc.runtime.executables import CompiledPhase, LoweredPhase, PhaseChain

logger = logging.getLogger(__name__)


def write_phases(phases: Iterable[CompiledPhase], folder: str) -> tuple[Json, dict[str, bytes]]:
    """Returns compiled phases as JSON, and the members that it refers to, named within `folder`.

    Phases with opaque modules are left out, and compiled by the process that loads the file: they
    call the op of an opaque module by a name that is valid in this process only.
    """
    members: dict[str, bytes] = {}
    blocks: dict[CompiledBlock, Json] = {}
    written = []
    for phase in phases:
        if not isinstance(phase, PhaseChain) or _calls_modules(phase):
            continue
        _compile_missing(phase)
        for block in phase.code:
            if block not in blocks:
                blocks[block] = _write_block(block, f"{folder}/code{len(blocks)}", folder, members)
        called = [list(blocks).index(block) for block in phase.code]
        slots = encode((phase.slots.reused, phase.slots.stored, phase.slots.depths))
        written.append([slots, _write_lowered(phase.lowered), called])
    return {"blocks": list(blocks.values()), "phases": written}, members


def read_phases(
    content: Json, members: Mapping[str, bytes], device: torch.device
) -> Iterator[tuple[PhaseSlots, LoweredPhase, list[CompiledBlock]]]:
    """Yields the phases that :func:`write_phases` wrote; their packages run on `device`."""
    code = [_read_block(block, members, device) for block in content["blocks"]]
    for slots, lowered, called in content["phases"]:
        yield PhaseSlots(*decode(slots)), _read_lowered(lowered), [code[i] for i in called]


def _calls_modules(phase: PhaseChain) -> bool:
    nodes = (node for block in phase.lowered.blocks for node in block.graph.graph.nodes)
    return any(map(is_opaque, nodes))


def _compile_missing(phase: PhaseChain) -> None:
    """Compiles the blocks whose code is known in no form for other processes."""
    for block, code in zip(phase.lowered.blocks, phase.code, strict=False):
        if code.portable is None:
            start = perf_counter()
            with compile_lock():
                code.portable = compile_package(block.graph)
            logger.info("compiled a block for a file, in %.1f s", perf_counter() - start)


def _write_block(
    block: CompiledBlock, name: str, folder: str, members: dict[str, bytes]
) -> dict[str, Json]:
    """Adds the code of a block to `members`; returns what refers to it."""
    code = block.portable
    assert code is not None
    if isinstance(code, Package):
        members[f"{name}.pt2"] = code.data
        return {"package": f"{name}.pt2", "used": list(code.used)}
    code = reduce_listing(code)
    members[f"{name}.py"] = code.source.encode()
    kernels = {}
    for kernel, data in code.libraries.items():
        kernels[kernel] = f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}.so"
        members[kernels[kernel]] = data
    return {"listing": f"{name}.py", "kernels": kernels}


def _read_block(content: Json, members: Mapping[str, bytes], device: torch.device) -> CompiledBlock:
    if "package" in content:
        return load_package(Package(members[content["package"]], tuple(content["used"])), device)
    kernels = {name: members[member] for name, member in content["kernels"].items()}
    return load_listing(Listing(members[content["listing"]].decode(), kernels))


def _write_lowered(lowered: LoweredPhase) -> Json:
    chain = lowered.chain
    return {
        "inputs": chain.num_inputs,
        "calls": [[call.block, list(call.inputs), call.num_results] for call in chain.calls],
        "results": list(chain.outputs),
        "weights": list(lowered.lifted.weights),
        "outputs": [_write_output(output) for output in lowered.lifted.outputs],
    }


def _read_lowered(content: Json) -> LoweredPhase:
    calls = [BlockCall(block, tuple(inputs), num) for block, inputs, num in content["calls"]]
    chain = BlockChain(content["inputs"], tuple(calls), tuple(content["results"]))
    lifted = Lifted(tuple(content["weights"]), _read_outputs(content["outputs"]))
    return LoweredPhase(chain, (), lifted)


def _write_output(output: Any) -> Json:
    return output.index if isinstance(output, ResultIndex) else {"constant": encode(output)}


def _read_outputs(contents: list[Json]) -> tuple[Any, ...]:
    return tuple(ResultIndex(c) if isinstance(c, int) else decode(c["constant"]) for c in contents)
