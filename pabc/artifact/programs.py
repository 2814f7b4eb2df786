"""Writes and reads programs: the guarded graph of one kind of call, and the code of its phases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pabc.artifact.analysis import read_guarded, write_guarded
from pabc.artifact.code import read_phases, write_phases
from pabc.artifact.errors import ArtifactError
from pabc.artifact.values import Json, decode, encode
from pabc.base.arguments import leaf_key
from pabc.options import Options
from pabc.passes import user_inputs
from pabc.pipeline import STAGES
from pabc.runtime.bindings import Binding
from pabc.runtime.lifted_scalars import CallKey
from pabc.runtime.program import Program
from pabc.runtime.stats import Recorder
from pabc.stages import StageRecord

_NUMBERS = {"int": int, "float": float}


def write_program(program: Program, binding: Binding, folder: str) -> dict[str, bytes]:
    """Returns the members for one program, named within `folder`; compiles missing code.

    Raises: :class:`ArtifactError` naming the node or value that cannot be saved.
    """
    if program.inputs.has_dynamic_shapes:
        raise ArtifactError("dynamic: expected False for a model to be saved, found True")
    analysis, constants = write_guarded(program.guarded)
    members = {f"{folder}/constants": constants}
    code: Json = None
    if program.phases.backend == "inductor":
        program.phases.prepare((*binding.phases, binding.whole), ())
        code, files = write_phases(program.phases.compiled, folder)
        members |= files
    content = {
        "analysis": analysis,
        "code": code,
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
    if content["code"] is not None:
        for phase, lowered, code in read_phases(content["code"], members, _device(program)):
            program.phases.add_code(phase, lowered, code)
    return program, content["plan"]


def _write_record(record: StageRecord) -> Json:
    return [record.name, record.is_on, record.seconds, list(record.num_nodes)]


def _read_record(content: Json) -> StageRecord:
    name, is_on, seconds, num_nodes = content
    return StageRecord(STAGES[name], is_on, seconds, tuple(num_nodes))


def _device(program: Program) -> torch.device:
    """Returns the device that the code runs on: that of the first input not on a CPU, if any."""
    vals = [n.meta.get("val") for n in user_inputs(program.guarded.graph.graph)]
    devices = [val.device for val in vals if isinstance(val, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


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
