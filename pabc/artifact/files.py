"""Writes a compiled model to a file, and reads it for a model of the same structure."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pabc.artifact.container import read_container, write_container
from pabc.artifact.errors import ArtifactError
from pabc.artifact.facts import (
    check_table,
    describe_hardware,
    describe_model,
    describe_versions,
)
from pabc.artifact.programs import read_key, read_program, write_key, write_program
from pabc.artifact.values import Json, decode, encode
from pabc.options import Options
from pabc.plan import Plan
from pabc.runtime.program import Program
from pabc.runtime.programs import Programs
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

FORMAT = 2
Path = str | os.PathLike[str]


def write_artifact(
    path: Path,
    model: nn.Module,
    schedule: Schedule,
    programs: Programs,
    *,
    last: Program,
) -> None:
    """Writes all that :func:`read_artifact` needs, as :meth:`pabc.CompiledModel.save` does.

    `last`: the program that ran last, which is the one that `plan` and `explain` tell of.

    Raises: :class:`ArtifactError` for what cannot be saved; it names the node, the argument or the
    option.
    """
    if programs.options.sharding is not None:
        raise ArtifactError("mesh: expected None, found a mesh: what ranks share is not saved")
    fitting = [(key, p) for key, p in programs.items() if p.keeps_up(model, at_start=True)]
    if not fitting:
        raise ArtifactError("the model has changed since it was captured: call it once")
    found = sorted(fitting, key=lambda item: item[1] is last)
    members: dict[str, bytes] = {}
    for i, (_, program) in enumerate(found):
        members |= write_program(program, program.bind(schedule), f"program{i}")
    manifest = {
        "pabc": "artifact",
        "format": FORMAT,
        "versions": describe_versions(),
        "hardware": describe_hardware(_devices(model)),
        "model": describe_model(model),
        "options": _write_options(programs.options),
        "schedule": schedule.to_json(),
        "keys": [write_key(key) for key, _ in found],
        "lifted scalars": encode(programs.scalars.state()),
    }
    write_container(path, {"manifest.json": json.dumps(manifest).encode(), **members})


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What an artifact holds, for one model: all that a compiled model is made of."""

    schedule: Schedule
    options: Options
    programs: Programs


def read_artifact(path: Path, model: nn.Module) -> SavedModel:
    """Returns what :func:`write_artifact` wrote, over the tensors of `model`.

    Raises: see :func:`pabc.load`.
    """
    members = read_container(path)
    try:
        manifest = json.loads(members["manifest.json"])
        if manifest["pabc"] != "artifact" or manifest["format"] != FORMAT:
            raise ArtifactError(f"expected an artifact of format {FORMAT}")
        check_table("other versions", manifest["versions"], describe_versions())
        check_table("a model of another structure", manifest["model"], describe_model(model))
        devices = _devices(model)
        check_table("other hardware", manifest["hardware"], describe_hardware(devices))
        return _read_model(manifest, members, model)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{path}: not as pabc writes it: {error!r}") from error


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
            raise ArtifactError("the schedule gives another plan than it gave when saved")
        programs.add(read_key(key), program)
    return SavedModel(schedule=schedule, options=options, programs=programs)


def _write_options(options: Options) -> Json:
    names = [field.name for field in fields(Options) if field.name != "sharding"]
    values = {name: getattr(options, name) for name in names} | {"kinds": dict(options.kinds)}
    return {name: encode(value) for name, value in values.items()}


def _devices(model: nn.Module) -> Collection[torch.device]:
    tensors: Iterable[Any] = (*model.parameters(), *model.buffers())
    return {tensor.device for tensor in tensors}
