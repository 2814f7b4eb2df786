"""failures: which modules stop a trace, all of them in one trace.

Where a module's own code raises, its call gives empty tensors like those that it gave when the
model was run, and the trace goes on. What is traced from then on serves to find the next one only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import fx, nn

from ..ir import module_path
from .outside import ResultLayout, TensorCall, patched
from .reads import OWN_FOLDERS, ReadReplayer
from .records import Read

_PLAIN = (bool, int, float, complex, str, bytes, type(None), dict, list, tuple, set, frozenset)


class FoundError(Exception):
    """Modules were found that stop the trace."""


@dataclass(slots=True)
class _Call:
    """One call of a module in the run that is recorded.

    Attributes:
        path: its qualified name.
        end: how many calls had been made when it ended, those within it included.
        num_reads: how many values had been read from data by then.
        results, layouts: what it gave; None if it raised.
    """

    path: str
    end: int = 0
    num_reads: int = 0
    results: TensorCall | None = None
    layouts: tuple[ResultLayout, ...] = ()


class CallRecorder:
    """Notes every call of a module in the model, in order, in `calls`."""

    def __init__(self, model: nn.Module, reads: Sequence[Read], outside: Collection[str]) -> None:
        """`reads` grows while the model runs; `outside`: paths of modules to leave out."""
        self.calls: list[_Call] = []
        self._model, self._reads, self._outside = model, reads, outside

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, calls are noted."""
        with _around(self._model, self._outside, self._run):
            yield

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call(path)
        self.calls.append(call)
        result = forward(*args, **kwargs)
        call.results, tensors = TensorCall.of((result,), {})
        call.layouts = tuple(map(ResultLayout.of, tensors))
        call.end, call.num_reads = len(self.calls), len(self._reads)
        return result


class FailureFinder:
    """Goes on where a module stops the trace; `found` has those modules, and why they do."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[_Call],
        replayer: ReadReplayer,
        outside: Collection[str],
    ) -> None:
        self.found: dict[str, str] = {}
        self.reason: Exception | None = None
        self._model, self._calls, self._replayer = model, calls, replayer
        self._outside, self._next = outside, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, calls that raise give empty tensors."""
        with _around(self._model, self._outside, self._run):
            yield

    def stop_if_found(self) -> None:
        """Raises :class:`FoundError` where what was traced is of no further use."""
        if self.found:
            raise FoundError

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, num_checked = self._advance(path), len(self._replayer.checked)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            # A number that the trace keeps as a value of the graph may be what it stops at.
            if call is None or call.results is None or self._replayer.watches:
                raise
            if find_failing_module(self._model, error) != path:
                raise
            self.found.setdefault(path, stopped_with(error))
            self.reason = error
        self._next = call.end
        self._replayer.skip(call.num_reads, num_checked)
        (result,), _ = call.results.fill([layout.empty() for layout in call.layouts])
        return result

    def _advance(self, path: str) -> _Call | None:
        """The record of this call; those before it were of modules that did not run again."""
        for i in range(self._next, len(self._calls)):
            if self._calls[i].path == path:
                self._next = i + 1
                return self._calls[i]
        return None


@contextmanager
def _around(model: nn.Module, outside: Collection[str], run: Callable[..., Any]) -> Iterator[None]:
    """Has `run(path, forward, ...)` called in the place of each forward but the model's own."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path and path not in outside and not isinstance(module, torch.jit.ScriptModule):
                stack.enter_context(patched(module, partial(run, path, module.forward)))
        yield


def stopped_with(error: BaseException | None) -> str:
    """Why a module does not become part of the graph."""
    return f"torch.export stopped in it with {one_line(error)}"


def one_line(error: BaseException | None) -> str:
    """The class of an error, and the beginning of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {shorten(first, 160, placeholder=' ...')}"


def find_alike(model: nn.Module, path: str) -> set[str]:
    """The modules that run the same code as one: where it cannot be traced, nor can they."""
    code = _code_of(model.get_submodule(path))
    return {name for name, module in model.named_modules() if name and _code_of(module) == code}


def _code_of(module: nn.Module) -> tuple[Any, ...]:
    """The classes of a module and of the objects that it holds, an attention's processor, say."""
    held = {
        name: type(value)
        for name, value in vars(module).items()
        if not isinstance(value, (*_PLAIN, torch.Tensor))
    }
    return type(module), held


def find_failing_module(model: nn.Module, error: BaseException) -> str:
    """The qualified name of the innermost module whose own code raised; empty: the model itself.

    Where a traced graph was run, that is the module that its node comes from.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    for raised in reversed(_chain(error)):
        for find in (partial(_by_frame, paths), _by_node):
            found = None
            trace = raised.__traceback__
            while trace is not None:
                found = find(trace.tb_frame) or found
                trace = trace.tb_next
            if found is not None:
                return found
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _by_frame(paths: dict[int, str], frame: Any) -> str | None:
    if frame.f_code.co_filename.startswith(OWN_FOLDERS):
        return None
    return paths.get(id(frame.f_locals.get("self")))


def _by_node(frame: Any) -> str | None:
    """Of a frame of an interpreter, the module of the node that it is at."""
    node = frame.f_locals.get("n", frame.f_locals.get("node"))
    is_interpreter = isinstance(frame.f_locals.get("self"), fx.Interpreter)
    return module_path(node) or None if is_interpreter and isinstance(node, fx.Node) else None
