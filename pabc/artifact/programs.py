"""Writes and reads programs: the guarded graph of one kind of call, and the code of its phases."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pabc.artifact.analysis import read_guarded, write_guarded
from pabc.artifact.code import compile_code, load_code, used_inputs
from pabc.artifact.errors import ArtifactError
from pabc.artifact.values import Json, decode, encode
from pabc.base.arguments import leaf_key
from pabc.internals.dynamo import compile_lock
from pabc.options import Options
from pabc.passes import Lifted, PhaseSlots, ResultIndex, is_opaque, user_inputs
from pabc.pipeline import STAGES
from pabc.runtime.bindings import Binding
from pabc.runtime.chain import BlockCall, BlockChain
from pabc.runtime.executables import LoweredPhase
from pabc.runtime.lifted_scalars import CallKey
from pabc.runtime.program import Program
from pabc.runtime.stats import Recorder
from pabc.stages import StageRecord

logger = logging.getLogger(__name__)
_NUMBERS = {"int": int, "float": float}


@dataclass(frozen=True, slots=True)
class Package:
    """The compiled code of a block.

    Attributes:
        data: the package, for :func:`load_code`.
        used: the positions of the block's inputs that the code takes.
    """

    data: bytes
    used: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packages:
    """The compiled code of a program's phases.

    Attributes:
        blocks: the code of each distinct block, by the block's key.
        phases: each phase as a chain of blocks, with the keys of these blocks.
    """

    blocks: dict[Hashable, Package] = field(default_factory=dict)
    phases: dict[PhaseSlots, tuple[LoweredPhase, tuple[Hashable, ...]]] = field(
        default_factory=dict
    )


_PACKAGES: WeakKeyDictionary[Program, Packages] = WeakKeyDictionary()
"""The code that was compiled for a file, or loaded from one, so that no save compiles it again."""


def write_program(program: Program, binding: Binding, folder: str) -> dict[str, bytes]:
    """Returns the members for one program, named within `folder`; compiles missing code.

    Raises: :class:`ArtifactError` naming the node or value that cannot be saved.
    """
    if program.inputs.has_dynamic_shapes:
        raise ArtifactError("dynamic: expected False for a model to be saved, found True")
    analysis, constants = write_guarded(program.guarded)
    members = {f"{folder}/constants": constants}
    blocks, phases = [], []
    if program.phases.backend == "inductor":
        packages = _packages(program, binding)
        for i, package in enumerate(packages.blocks.values()):
            members[f"{folder}/code{i}"] = package.data
            blocks.append(list(package.used))
        numbers = {key: i for i, key in enumerate(packages.blocks)}
        for phase, (lowered, keys) in packages.phases.items():
            called = [numbers[key] for key in keys]
            phases.append(
                [
                    encode((phase.reused, phase.stored, phase.depths)),
                    _write_lowered(lowered),
                    called,
                ]
            )
    content = {
        "analysis": analysis,
        "blocks": blocks,
        "phases": phases,
        "lifted": sorted(program.inputs.lifted),
        "plan": binding.plan.to_json(),
        "stages": [_write_record(record) for record in program.records],
    }
    members[f"{folder}/program.json"] = json.dumps(content).encode()
    return members


def read_program(
    members: Mapping[str, bytes],
    folder: str,
    model: nn.Module,
    *,
    options: Options,
    recorder: Recorder,
) -> tuple[Program, str]:
    """Returns the program that :func:`write_program` wrote, and its plan as JSON."""
    content = json.loads(members[f"{folder}/program.json"])
    guarded = read_guarded(content["analysis"], members[f"{folder}/constants"], model)
    program = Program(
        guarded,
        lifted=content["lifted"],
        records=tuple(map(_read_record, content["stages"])),
        options=options,
        recorder=recorder,
    )
    device = _device(program)
    packages = _PACKAGES.setdefault(program, Packages())
    code = []
    for i, used in enumerate(content["blocks"]):
        packages.blocks[i] = package = Package(members[f"{folder}/code{i}"], tuple(used))
        code.append(load_code(package.data, package.used, device))
    for written, chain, called in content["phases"]:
        phase, lowered = PhaseSlots(*decode(written)), _read_lowered(chain)
        packages.phases[phase] = lowered, tuple(called)
        program.phases.add_code(phase, lowered, [code[i] for i in called])
    return program, content["plan"]


def _write_record(record: StageRecord) -> Json:
    return [record.name, record.is_on, record.seconds, list(record.num_nodes)]


def _read_record(content: Json) -> StageRecord:
    name, is_on, seconds, num_nodes = content
    return StageRecord(STAGES[name], is_on, seconds, tuple(num_nodes))


def _packages(program: Program, binding: Binding) -> Packages:
    """Returns the code of the phases that are planned or ran; compiles missing code."""
    known = _PACKAGES.setdefault(program, Packages())
    for phase in dict.fromkeys((*binding.phases, binding.whole, *program.phases.compiled)):
        if phase not in known.phases and not program.phases.runs_op_by_op(phase):
            start = perf_counter()
            with compile_lock(), torch.no_grad():
                _compile(program, phase, known)
            logger.info("code of phase %s: %.1f s", phase, perf_counter() - start)
    return known


def _compile(program: Program, phase: PhaseSlots, known: Packages) -> None:
    """Compiles the blocks of a phase, and adds their code to `known`.

    Phases with opaque modules are left out, and compiled by the process that loads the file: a
    library would call the op of an opaque module by a name that is valid in this process only.
    """
    lowered = program.phases.lower(phase)
    if any(is_opaque(node) for block in lowered.blocks for node in block.graph.graph.nodes):
        return
    for block in lowered.blocks:
        if block.key not in known.blocks:
            package = Package(compile_code(block.graph), tuple(used_inputs(block.graph)))
            known.blocks[block.key] = package
    keys = tuple(block.key for block in lowered.blocks)
    known.phases[phase] = replace(lowered, blocks=()), keys


def _device(program: Program) -> torch.device:
    """Returns the device that the code runs on: that of the first input not on a CPU, if any."""
    vals = [n.meta.get("val") for n in user_inputs(program.guarded.graph.graph)]
    devices = [val.device for val in vals if isinstance(val, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


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


def write_key(key: CallKey) -> Json:
    """Returns the key of a program as JSON. Raises: :class:`ArtifactError`."""
    form, *leaves = key
    return [encode(form), [_write_leaf(leaf) for leaf in leaves]]


def read_key(content: Json) -> CallKey:
    """Returns the key that :func:`write_key` wrote."""
    form, leaves = content
    return decode(form), *map(_read_leaf, leaves)


def _write_leaf(leaf: Any) -> Json:
    if isinstance(leaf, type):
        if _NUMBERS.get(leaf.__name__) is not leaf:
            raise ArtifactError(f"arguments: expected an int or a float, found {leaf.__qualname__}")
        return {"number": leaf.__name__}
    if isinstance(leaf[0], torch.Size):
        return {"tensor": encode(leaf)}
    try:
        return {"constant": encode(leaf[1])}
    except ArtifactError as error:
        raise ArtifactError(f"arguments: {error}") from error


def _read_leaf(content: Json) -> Any:
    ((kind, inner),) = content.items()
    if kind == "number":
        return _NUMBERS[inner]
    return decode(inner) if kind == "tensor" else leaf_key(decode(inner))
