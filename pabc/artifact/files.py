"""Writes a compiled model to a file, and reads it into a model of the same structure."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pabc.artifact.compatibility import (
    check_description,
    describe_hardware,
    describe_model,
    describe_versions,
)
from pabc.artifact.container import read_container, write_container
from pabc.artifact.differences import check_state
from pabc.artifact.errors import ArtifactError
from pabc.artifact.programs import read_key, read_program, write_key, write_program
from pabc.artifact.state import describe_state
from pabc.artifact.values import Json, decode, encode
from pabc.options import Options
from pabc.plan import Plan
from pabc.runtime.program import Program
from pabc.runtime.programs import Programs
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

FORMAT = 5
FilePath = str | os.PathLike[str]


def write_artifact(
    path: FilePath,
    model: nn.Module,
    schedule: Schedule,
    programs: Programs,
    *,
    last: Program,
) -> None:
    """Writes a compiled model for :func:`read_artifact`; see :meth:`pabc.CompiledModel.save`.

    Args:
        path: the file.
        model: the model.
        schedule: the schedule whose phases are compiled for the file.
        programs: the programs; those that no longer fit the model are left out.
        last: the program that ran last, which `plan` and `explain` describe.

    Raises: :class:`ArtifactError`, naming the node, the argument or the option that cannot be
    saved.
    """
    if programs.options.sharding is not None:
        raise ArtifactError("mesh: expected None, found a mesh; sharded models cannot be saved")
    fitting = [(key, p) for key, p in programs.items() if p.keeps_up(model, at_start=True)]
    if not fitting:
        raise ArtifactError(
            "model: expected the model as it was captured, found it changed; call it once first"
        )
    ordered = sorted(fitting, key=lambda item: item[1] is last)
    members: dict[str, bytes] = {}
    for i, (_, program) in enumerate(ordered):
        members |= write_program(program, program.bind(schedule), f"program{i}")
    manifest = {
        "pabc": "artifact",
        "format": FORMAT,
        "versions": describe_versions(),
        "hardware": describe_hardware(_devices(model)),
        "model": describe_model(model),
        "state": describe_state(model).table,
        "options": _write_options(programs.options),
        "schedule": schedule.to_json(),
        "keys": [write_key(key) for key, _ in ordered],
        "lifted scalars": encode(programs.scalars.state()),
    }
    write_container(path, {"manifest.json": json.dumps(manifest).encode(), **members})


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The content of an artifact, from which a compiled model is made."""

    schedule: Schedule
    options: Options
    programs: Programs


def read_artifact(path: FilePath, model: nn.Module) -> SavedModel:
    """Returns the content of a file of :func:`write_artifact`, for `model` and its tensors.

    Raises: see :func:`pabc.load`.
    """
    members = read_container(path)
    try:
        manifest = json.loads(members["manifest.json"])
        if manifest["pabc"] != "artifact" or manifest["format"] != FORMAT:
            found = f"{manifest['pabc']} of format {manifest['format']}"
            raise ArtifactError(f"manifest: expected artifact of format {FORMAT}, found {found}")
        check_description("versions", manifest["versions"], describe_versions())
        check_description("model", manifest["model"], describe_model(model))
        devices = _devices(model)
        check_description("hardware", manifest["hardware"], describe_hardware(devices))
        return _read_model(manifest, members, model)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: expected an artifact as pabc writes it, found an error in it: {error!r}"
        ) from error


def _read_model(manifest: Json, members: dict[str, bytes], model: nn.Module) -> SavedModel:
    schedule = Schedule.from_json(manifest["schedule"])
    options = Options(**{name: decode(value) for name, value in manifest["options"].items()})
    programs = Programs(model, options, Recorder())
    programs.scalars.restore(decode(manifest["lifted scalars"]))
    for i, key in enumerate(manifest["keys"]):
        program, plan = read_program(
            members,
            f"program{i}",
            model,
            options=options,
            recorder=programs.recorder,
        )
        if program.bind(schedule).plan != Plan.from_json(plan):
            raise ArtifactError("schedule: expected the plan that was saved, found another")
        programs.add(read_key(key), program)
    states = [program.guarded.captured.modules for _, program in programs.items()]
    check_state(manifest["state"], model, states)
    return SavedModel(schedule=schedule, options=options, programs=programs)


def _write_options(options: Options) -> Json:
    names = [field.name for field in fields(Options) if field.name != "sharding"]
    values = {name: getattr(options, name) for name in names} | {"kinds": dict(options.kinds)}
    return {name: encode(value) for name, value in values.items()}


def _devices(model: nn.Module) -> Collection[torch.device]:
    tensors: Iterable[Any] = (*model.parameters(), *model.buffers())
    return {tensor.device for tensor in tensors}
