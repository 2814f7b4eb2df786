"""export: traces a model with torch.export.

Where the model reads values from data, they are recorded first and replayed. A module that stops
the trace becomes opaque, and the trace is tried again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from pabc.internals import pytree

from ..ir import is_tensor, module_path
from .calls import TracedCall
from .composites import decompose_unknown_composites
from .failures import (
    CallRecorder,
    FailureFinder,
    find_alike,
    find_failing_module,
    one_line,
    stopped_with,
)
from .indexing import check_copies_are_not_written_to
from .known_sizes import tell_sizes, with_static_sizes
from .lean import lean_tracing, quiet_tracing
from .number_mode import NumberMode
from .opaque import OpaqueCall, OpaqueRecorder, replaying_opaque
from .patch import patched
from .reads import ReadRecorder, ReadReplayer
from .records import Read
from .untouched import untouched


def export(
    model: nn.Module, call: TracedCall, opaque: dict[str, str]
) -> tuple[torch.export.ExportedProgram, ReadReplayer | None, Sequence[OpaqueCall]]:
    """Traces the model as it is where possible, else with values recorded from data.

    `opaque` gains the modules that stop the trace, with the reason.
    """
    plain: torch.export.ExportedProgram | None = None
    reason: Exception | None = None
    if not opaque:
        try:
            plain = _export(model, call.args, call.kwargs)
        except Exception as error:
            reason = error
        else:
            unknown = with_static_sizes(plain.graph)
            if not unknown:
                return plain, None, ()
            reason = ValueError(f"the value of {unknown[0].name} follows from data")
            plain = None if any(map(is_tensor, unknown)) else plain
    try:
        return _trace_recorded(model, call, opaque, reason)
    except ValueError:
        if plain is None:
            raise
        return plain, None, ()  # on the meta device: there are numbers, but none to record


def export_any_sizes(model: nn.Module, call: TracedCall) -> torch.export.ExportedProgram:
    """Traces the model with dynamic shapes: every dimension is as free as the model allows."""

    def free(leaf: Any) -> Any:
        automatic = torch.export.Dim.AUTO
        is_tensor = isinstance(leaf, torch.Tensor)
        return dict.fromkeys(range(leaf.ndim), automatic) if is_tensor else None

    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    try:
        program = _export(
            model, call.args, call.kwargs, sizes=pytree.tree_map(free, dict(bound.arguments))
        )
    except Exception as error:
        raise ValueError(f"torch.export stopped with {one_line(error)}") from error
    if unknown := with_static_sizes(program.graph):
        raise ValueError(f"the size of {unknown[0].name} follows from data")
    return program


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *modes: AbstractContextManager,
    sizes: dict[str, Any] | None = None,
    check: Callable[[], None] | None = None,
) -> torch.export.ExportedProgram:
    """Runs torch.export within `modes`.

    `sizes` are its `dynamic_shapes`; `check` is called once the model is traced.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(untouched(model))
        stack.enter_context(lean_tracing())
        stack.enter_context(quiet_tracing())
        for mode in modes:
            stack.enter_context(mode)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        if check is not None:
            check()
        check_copies_are_not_written_to(program.graph)
        return decompose_unknown_composites(program)


def _trace_recorded(
    model: nn.Module,
    call: TracedCall,
    opaque: dict[str, str],
    reason: Exception | None,
) -> tuple[torch.export.ExportedProgram, ReadReplayer, Sequence[OpaqueCall]]:
    """Traces with recorded values; modules that stop the trace join `opaque` until none does.

    `reason` is the error that stopped a trace without them.
    """
    watch = True
    while True:
        reads, calls, noted = _record(model, call, opaque, reason, watch=watch)
        if arrays := {r.path: str(r) for r in reads if r.is_float_array and r.path}:
            if not arrays.keys().isdisjoint(opaque):
                raise ValueError(f"pabc could not capture {type(model).__name__}: {arrays}")
            _join(opaque, model, arrays)
            continue
        replayer = ReadReplayer(model, reads, watch=watch)
        finder = FailureFinder(model, noted, replayer, opaque)
        forward: Any = partial(_with_tensors, model.forward, replayer)
        forward.__signature__ = inspect.signature(model.forward)
        replayed = replaying_opaque(model, calls, call.tokens)
        modes = (finder.active(), replayed, patched(model, forward))
        try:
            program = _export(model, call.args, call.kwargs, *modes, check=finder.stop_if_found)
        except Exception as error:
            found, reason = finder.found, finder.reason or error
            if not found and not replayer.watches:
                found = {find_failing_module(model, error): stopped_with(error)}
        else:
            unknown = with_static_sizes(program.graph)
            if not unknown:
                tell_sizes(program.graph)
                return program, replayer, calls
            found = {}
            if not replayer.watches:
                found = {module_path(n): f"the size of {n.name} follows from data" for n in unknown}
                reason = ValueError(next(iter(found.values())))
        if not found:
            watch = False  # a number was used in a way that a value of a graph cannot be
            continue
        if "" in found or not found.keys().isdisjoint(opaque):
            raise ValueError(
                f"pabc could not capture {type(model).__name__}: torch.export stopped in its own "
                f"forward with {one_line(reason)}"
            ) from reason
        _join(opaque, model, found)
        watch = True


def _join(opaque: dict[str, str], model: nn.Module, found: Mapping[str, str]) -> None:
    """Adds modules, and those that run the same code, to `opaque`, each with the reason."""
    for path, why in found.items():
        opaque.update(dict.fromkeys(find_alike(model, path) - opaque.keys(), why))


def _record(
    model: nn.Module,
    call: TracedCall,
    opaque: dict[str, str],
    reason: Exception | None,
    *,
    watch: bool,
) -> tuple[list[Read], list[OpaqueCall], Sequence[Any]]:
    """Runs the model once; returns its reads from data, calls of opaque modules, and all calls."""
    args, kwargs = call.args, call.kwargs
    reads = ReadRecorder(model, watch=watch)
    calls = OpaqueRecorder(model, opaque, call.keeping)
    noted = CallRecorder(model, reads.reads, opaque)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors if t.is_cuda}
    try:
        with (
            torch.no_grad(),
            untouched(model, runs=True),
            torch.random.fork_rng(devices),
            noted.active(),
            calls.active(),
            torch.compiler.set_stance("force_eager"),  # modes would be compiled with it
            reads,
        ):
            model.forward(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"pabc could not capture {type(model).__name__}: torch.export stopped with "
            f"{one_line(reason)}; running the model to see which values it reads from data "
            f"stopped with {one_line(error)}"
        ) from reason
    return reads.reads, calls.calls, noted.calls


def _with_tensors(
    forward: Callable[..., Any], replayer: ReadReplayer, *args: Any, **kwargs: Any
) -> tuple[Any, list[torch.Tensor]]:
    """Returns the model's result, and the tensors from which values were read.

    The modes are entered after torch.export's own mode, which reads the numbers in an index.
    """
    with replayer, NumberMode():
        result = forward(*args, **kwargs)
    return result, [t for checked in replayer.checked for t in checked.tensors]
