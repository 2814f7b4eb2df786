"""export: gets a model through torch.export, with values from data recorded where that takes them.

A module that stops the trace is left outside of the graph, and the trace is tried again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..ir import is_tensor, module_path
from .calls import Call
from .composites import decompose_unknown_composites
from .indexing import check_copies_are_not_written_to
from .known_sizes import tell_sizes, with_static_sizes
from .lean import lean_tracing, quiet_tracing
from .numbers import RecordNumbers
from .outside import OutsideCall, OutsideRecorder, patched, replayed_outside
from .reads import OWN_FOLDERS, Read, ReadRecorder, ReadReplayer
from .untouched import untouched


def export(
    model: nn.Module, call: Call, outside: dict[str, str]
) -> tuple[torch.export.ExportedProgram, ReadReplayer | None, Sequence[OutsideCall]]:
    """Traces as it is where possible, else with values recorded from data."""
    plain: torch.export.ExportedProgram | None = None
    reason: Exception | None = None
    if not outside:
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
        return _trace_recorded(model, call, outside, reason)
    except ValueError:
        if plain is None:
            raise
        return plain, None, ()  # on the meta device: there are numbers, but none to record


def export_any_sizes(model: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Traces with every dimension of every tensor as free as the model leaves it."""

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
        raise ValueError(f"torch.export stopped with {_one_line(error)}") from error
    if unknown := with_static_sizes(program.graph):
        raise ValueError(f"the size of {unknown[0].name} follows from data")
    return program


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *modes: AbstractContextManager,
    sizes: dict[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """`sizes`: which dimensions are free, as torch.export wants it; None: they are constants."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(untouched(model))
        stack.enter_context(lean_tracing())
        stack.enter_context(quiet_tracing())
        for mode in modes:
            stack.enter_context(mode)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        check_copies_are_not_written_to(program.graph)
        return decompose_unknown_composites(program)


def _trace_recorded(
    model: nn.Module,
    call: Call,
    outside: dict[str, str],
    reason: Exception | None,
) -> tuple[torch.export.ExportedProgram, ReadReplayer, Sequence[OutsideCall]]:
    """Traces with recorded values; modules that cannot be traced join `outside` one after another.

    `reason`: why the model cannot be traced without.
    """
    watch = True
    args, kwargs = call.args, call.kwargs
    while True:
        reads, calls = _record(model, call, outside, reason, watch=watch)
        replayer = ReadReplayer(model, reads, watch=watch)
        forward: Any = partial(_with_tensors, model.forward, replayer)
        forward.__signature__ = inspect.signature(model.forward)
        replayed = replayed_outside(model, calls, call.tokens)
        modes = (replayed, patched(model, forward))
        try:
            program = _export(model, args, kwargs, *modes)
        except Exception as error:
            if replayer.watches:
                watch = False  # a number was used as none of a graph can be
                continue
            failing, reason = _failing_module(model, error), error
            why = f"torch.export stopped in it with {_one_line(error)}"
        else:
            arrays = [c.read for c in replayer.checked if c.read.is_float_array and c.read.path]
            unknown = with_static_sizes(program.graph)
            if unknown and replayer.watches:
                watch = False
                continue
            if not arrays and not unknown:
                tell_sizes(program.graph)
                return program, replayer, calls
            failing = arrays[0].path if arrays else module_path(unknown[0])
            why = str(arrays[0]) if arrays else f"the size of {unknown[0].name} follows from data"
            reason = ValueError(why)
        if not failing or failing in outside:
            raise ValueError(
                f"pabc could not capture {type(model).__name__}: torch.export stopped in its own "
                f"forward with {_one_line(reason)}"
            ) from reason
        outside.update(dict.fromkeys(_alike(model, failing), why))


def _record(
    model: nn.Module,
    call: Call,
    outside: dict[str, str],
    reason: Exception | None,
    *,
    watch: bool,
) -> tuple[list[Read], list[OutsideCall]]:
    """Runs the model once: the values that it reads from data, the calls of modules outside."""
    args, kwargs = call.args, call.kwargs
    reads, calls = ReadRecorder(model), OutsideRecorder(model, outside, call.keeping)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors if t.is_cuda}
    try:
        with (
            torch.no_grad(),
            untouched(model, runs=True),
            torch.random.fork_rng(devices),
            calls.active(),
            reads,
        ):
            model.forward(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"pabc could not capture {type(model).__name__}: torch.export stopped with "
            f"{_one_line(reason)}; running the model to see which values it reads from data "
            f"stopped with {_one_line(error)}"
        ) from reason
    return reads.reads, calls.calls


def _with_tensors(
    forward: Callable[..., Any], replayer: ReadReplayer, *args: Any, **kwargs: Any
) -> tuple[Any, list[torch.Tensor]]:
    """The model's result, and the tensors from which values were read.

    The modes come after torch.export's own, which reads the numbers in an index.
    """
    with replayer, RecordNumbers():
        result = forward(*args, **kwargs)
    return result, [t for checked in replayer.checked for t in checked.tensors]


def _one_line(error: BaseException | None) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _alike(model: nn.Module, path: str) -> set[str]:
    """The modules that run the same code as one: where it cannot be traced, nor can they."""
    kind = type(model.get_submodule(path))
    return {name for name, module in model.named_modules() if name and type(module) is kind}


def _failing_module(model: nn.Module, error: BaseException) -> str:
    """The qualified name of the innermost module whose own code raised; empty: the model itself."""
    paths = {id(module): name for name, module in model.named_modules()}
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for raised in reversed(chain):
        found = None
        trace = raised.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if not frame.f_code.co_filename.startswith(OWN_FOLDERS):
                found = paths.get(id(frame.f_locals.get("self")), found)
            trace = trace.tb_next
        if found is not None:
            return found
    return ""
