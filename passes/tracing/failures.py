"""failures: finds all modules that stop a trace in a single trace.

Where a module's own code raises, its call returns empty tensors like those of the recorded run, and
the trace goes on, from then on only to find the next such module.
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
from .call_sites import OWN_FOLDERS
from .patch import patched
from .reads import ReadReplayer
from .records import Read
from .tensor_call import ResultLayout, TensorCall

_PLAIN = (bool, int, float, complex, str, bytes, type(None), dict, list, tuple, set, frozenset)


class FoundError(Exception):
    """Raised at the end of a trace in which modules were found that stop it."""


@dataclass(slots=True)
class _ModuleCall:
    """One call of a module in the recorded run.

    Attributes:
        path: the module's qualified name.
        end: the number of calls made by its end, those within it included.
        num_reads: the number of values read from data by its end.
        results: its result; None if it raised.
        layouts: the layouts of the tensors in the result.
    """

    path: str
    end: int = 0
    num_reads: int = 0
    results: TensorCall | None = None
    layouts: tuple[ResultLayout, ...] = ()


class CallRecorder:
    """Records every call of a module in the model, in order, in `calls`."""

    def __init__(self, model: nn.Module, reads: Sequence[Read], opaque: Collection[str]) -> None:
        """Takes the list of reads, which grows while the model runs, and modules to leave out."""
        self.calls: list[_ModuleCall] = []
        self._model, self._reads, self._opaque = model, reads, opaque

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, calls are recorded."""
        with _around(self._model, self._opaque, self._run):
            yield

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _ModuleCall(path)
        self.calls.append(call)
        result = forward(*args, **kwargs)
        call.results, tensors = TensorCall.of((result,), {})
        call.layouts = tuple(map(ResultLayout.of, tensors))
        call.end, call.num_reads = len(self.calls), len(self._reads)
        return result


class FailureFinder:
    """Continues a trace past modules that stop it, and collects them in `found` with the reason."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[_ModuleCall],
        replayer: ReadReplayer,
        opaque: Collection[str],
    ) -> None:
        self.found: dict[str, str] = {}
        self.reason: Exception | None = None
        self._model, self._calls, self._replayer = model, calls, replayer
        self._opaque, self._next = opaque, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, calls that raise return empty tensors."""
        with _around(self._model, self._opaque, self._run):
            yield

    def stop_if_found(self) -> None:
        """Raises :class:`FoundError` if modules were found: the trace is of no further use."""
        if self.found:
            raise FoundError

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, num_checked = self._advance(path), len(self._replayer.checked)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            # The cause may be a number that the trace keeps as a value of the graph.
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

    def _advance(self, path: str) -> _ModuleCall | None:
        """Returns the record of this call, past those of modules that did not run again."""
        for i in range(self._next, len(self._calls)):
            if self._calls[i].path == path:
                self._next = i + 1
                return self._calls[i]
        return None


@contextmanager
def _around(model: nn.Module, opaque: Collection[str], run: Callable[..., Any]) -> Iterator[None]:
    """While active, each forward but the model's own is a call of `run(path, forward, ...)`."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path and path not in opaque and not isinstance(module, torch.jit.ScriptModule):
                stack.enter_context(patched(module, partial(run, path, module.forward)))
        yield


def stopped_with(error: BaseException | None) -> str:
    """Returns, as text, why a module is opaque."""
    return f"torch.export stopped in it with {one_line(error)}"


def one_line(error: BaseException | None) -> str:
    """Returns the class of an error and the beginning of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {shorten(first, 160, placeholder=' ...')}"


def find_alike(model: nn.Module, path: str) -> set[str]:
    """Returns the modules that run the same code as the one at `path`, and so stop a trace too."""
    code = _code_of(model.get_submodule(path))
    return {name for name, module in model.named_modules() if name and _code_of(module) == code}


def _code_of(module: nn.Module) -> tuple[Any, ...]:
    """Returns the classes of a module and of the objects in it, such as a processor."""
    held = {
        name: type(value)
        for name, value in vars(module).items()
        if not isinstance(value, (*_PLAIN, torch.Tensor))
    }
    return type(module), held


def find_failing_module(model: nn.Module, error: BaseException) -> str:
    """Returns the name of the innermost module whose code raised; empty for the model itself.

    Where a traced graph was run, that is the module that the node comes from.
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
    """Returns the module of the node that an interpreter's frame is at."""
    node = frame.f_locals.get("n", frame.f_locals.get("node"))
    is_interpreter = isinstance(frame.f_locals.get("self"), fx.Interpreter)
    return module_path(node) or None if is_interpreter and isinstance(node, fx.Node) else None
