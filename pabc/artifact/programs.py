"""Programs in an artifact: what was found for one kind of call, and the code of its phases."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pabc.artifact.analysis import read_analysis, write_analysis
from pabc.artifact.code import compile_code, load_code, used_inputs
from pabc.artifact.errors import ArtifactError
from pabc.artifact.values import Json, decode, encode
from pabc.passes import Place
from pabc.passes.capture import leaf_key
from pabc.passes.ir import is_outside
from pabc.runtime.branch import Binding
from pabc.runtime.phases import Backend, compiling
from pabc.runtime.program import Program
from pabc.runtime.promotion import Key
from pabc.runtime.stats import Recorder

logger = logging.getLogger(__name__)
_NUMBERS = {"int": int, "float": float}
Phase = tuple[tuple[int, ...], tuple[int, ...]]
"""The slots that it reuses, and those whose cuts it gives out."""


@dataclass(frozen=True, slots=True)
class Package:
    """The code of a phase.

    Attributes:
        data: what :func:`load_code` takes.
        used: which inputs of the phase's flat graph it takes.
        weights: names of the first inputs of the flat graph.
        outputs: per output of the model, its place among the results, or the constant it is.
    """

    data: bytes
    used: tuple[int, ...]
    weights: tuple[str, ...]
    outputs: tuple[Any, ...]


_PACKAGES: WeakKeyDictionary[Program, dict[Phase, Package]] = WeakKeyDictionary()
"""What was compiled, or loaded, so far: another save has no need to compile it again."""


def write_program(program: Program, binding: Binding, folder: str) -> dict[str, bytes]:
    """The members for one program, their names in `folder`; compiles what is not yet compiled.

    Raises: :class:`ArtifactError` naming what cannot be saved.
    """
    if program.of_any_size:
        raise ArtifactError("a graph for any sizes cannot be saved: compile with dynamic=False")
    analysis, constants = write_analysis(program.guarded)
    members = {f"{folder}/constants": constants}
    table = []
    if program.backend == "inductor":
        for i, (phase, package) in enumerate(_packages(program, binding).items()):
            members[f"{folder}/code{i}"] = package.data
            outputs = [_write_output(output) for output in package.outputs]
            table.append([encode(phase), list(package.used), list(package.weights), outputs])
    content = {
        "analysis": analysis,
        "phases": table,
        "promoted": sorted(program.promoted),
        "plan": binding.plan.to_json(),
    }
    members[f"{folder}/program.json"] = json.dumps(content).encode()
    return members


def read_program(
    members: Mapping[str, bytes],
    folder: str,
    model: nn.Module,
    *,
    backend: Backend,
    memory_budget: int | None,
    recorder: Recorder,
) -> tuple[Program, str]:
    """The program that :func:`write_program` wrote, and its plan as JSON."""
    content = json.loads(members[f"{folder}/program.json"])
    guarded = read_analysis(content["analysis"], members[f"{folder}/constants"], model)
    program = Program(
        guarded,
        backend=backend,
        promoted=content["promoted"],
        memory_budget=memory_budget,
        recorder=recorder,
    )
    device = _device(program)
    packages = _PACKAGES.setdefault(program, {})
    for i, (phase, used, weights, outputs) in enumerate(content["phases"]):
        reused, stored = decode(phase)
        package = Package(
            members[f"{folder}/code{i}"], tuple(used), tuple(weights), _read_outputs(outputs)
        )
        packages[reused, stored] = package
        code = load_code(package.data, package.used, device)
        program.phases.add_code(reused, stored, code, package.weights, package.outputs)
    return program, content["plan"]


def _packages(program: Program, binding: Binding) -> dict[Phase, Package]:
    """The code of every phase of the plan, and of those that were run so far."""
    phases = [(reused, stored) for reused, stored in binding.stored.items()]
    known = _PACKAGES.setdefault(program, {})
    for phase in dict.fromkeys((*phases, *program.phases.compiled)):
        if phase not in known:
            start = perf_counter()
            package = _compile(program, phase)
            if package is not None:
                known[phase] = package
                logger.info("code of phase %s: %.1f s", phase, perf_counter() - start)
    return known


def _compile(program: Program, phase: Phase) -> Package | None:
    """None for a phase that calls modules of the model: what is called by name from a library
    would be those of one model alone. Whoever loads the file compiles it."""
    with compiling(), torch.no_grad():
        lowered = program.phases.lower(*phase)
        if any(map(is_outside, lowered.graph.graph.nodes)):
            return None
        used = tuple(used_inputs(lowered.graph))
        data = compile_code(lowered.graph, lowered.examples)
    return Package(data, used, lowered.weights, lowered.outputs)


def _device(program: Program) -> torch.device:
    """The device that code runs on: that of the inputs that is no CPU, if there is one."""
    vals = [n.meta.get("val") for n in program.guarded.graph.nodes if n.op == "placeholder"]
    devices = [val.device for val in vals if isinstance(val, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _write_output(output: Any) -> Json:
    return output.index if isinstance(output, Place) else {"constant": encode(output)}


def _read_outputs(contents: list[Json]) -> tuple[Any, ...]:
    return tuple(Place(c) if isinstance(c, int) else decode(c["constant"]) for c in contents)


def write_key(key: Key) -> Json:
    """What the calls that a program serves have in common. Raises: :class:`ArtifactError`."""
    form, *leaves = key
    return [encode(form), [_write_leaf(leaf) for leaf in leaves]]


def read_key(content: Json) -> Key:
    """The inverse of :func:`write_key`."""
    form, leaves = content
    return decode(form), *map(_read_leaf, leaves)


def _write_leaf(leaf: Any) -> Json:
    if isinstance(leaf, type):
        if _NUMBERS.get(leaf.__name__) is not leaf:
            raise ArtifactError(f"a number of type {leaf.__qualname__} cannot be saved")
        return {"number": leaf.__name__}
    if isinstance(leaf[0], torch.Size):
        return {"tensor": encode(leaf)}
    try:
        return {"constant": encode(leaf[1])}
    except ArtifactError as error:
        raise ArtifactError(f"among the arguments, {error}") from error


def _read_leaf(content: Json) -> Any:
    ((kind, inner),) = content.items()
    if kind == "number":
        return _NUMBERS[inner]
    return decode(inner) if kind == "tensor" else leaf_key(decode(inner))
