"""hooks: captures the forward hooks of the modules within a model.

A hook that changes values is part of the computation, and is traced. One that only observes, to
keep features or counts, would run during the trace and never again: the graph calls it instead,
with the tensors that the module takes and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pabc.internals.modules import buffers_of, parameters_of

from .opaque import OpaqueCall
from .python_state import Snapshot
from .tensor_call import TensorCall
from .walk import HOOKS, hook_path


@dataclass(slots=True, kw_only=True)
class HookCall(OpaqueCall):
    """One call of a hook by the graph, which contains the hook's module.

    Attributes:
        hook: the hook.
        module: the module that it is registered on.
    """

    hook: Callable[..., Any]
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.path} is called with what its module is given and gives"

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Calls the hook with copies, which it may keep: a graph reuses its tensors' memory."""
        self.call.run(partial(self.hook, self.module), [t.clone() for t in tensors])
        return [_token(tensors)]

    def fake(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns a fake result of :meth:`run`."""
        return [_token(tensors)]


def _token(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Returns a tensor for a trace to return, so that the call is not dead code."""
    return tensors[0].new_empty(0) if tensors else torch.empty(0)


class HookTracer:
    """Calls the hooks of inner modules while a forward runs.

    Attributes:
        calls: the calls of hooks that the graph must make, in order.
        refused: error messages about hooks that cannot be captured.
    """

    def __init__(self, model: nn.Module, tokens: list[torch.Tensor]) -> None:
        """Takes a list that gains the results of these calls, for the trace to return."""
        self.calls: list[HookCall] = []
        self.refused: list[str] = []
        self._model, self._tokens = model, tokens

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, hooks are called by this object."""
        replaced: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for path, module in self._model.named_modules():
            for name in HOOKS:
                hooks: dict[int, Any] = vars(module)[name]
                if path and hooks:
                    replaced.append((hooks, dict(hooks)))
                    hooks.update(
                        (key, partial(self._call, path, hook)) for key, hook in hooks.items()
                    )
        try:
            yield
        finally:
            for hooks, own in replaced:
                hooks.update(own)

    def _call(self, path: str, hook: Callable[..., Any], module: nn.Module, *given: Any) -> Any:
        attributes = _attributes(module)
        name = hook_path(path, hook)
        snapshot = Snapshot([(name, None, hook)])
        with _WriteWatch() as watch:
            result = hook(module, *given)
        sets_attributes = any(v is not attributes.get(k) for k, v in _attributes(module).items())
        if result is not None or watch.seen or sets_attributes:
            changes = [c for c in snapshot.changes() if c.holder.path.startswith(name)]
            if changes:
                self.refused.append(
                    f"{name}: expected a hook that changes values or one that keeps something, "
                    f"found one that does both, and changes {changes[0].name}; make two of it"
                )
                snapshot.restore()
            return result
        snapshot.restore()
        if torch.compiler.is_exporting():
            self._record(name, hook, module, given)
        return None

    def _record(
        self, name: str, hook: Callable[..., Any], module: nn.Module, given: tuple[Any, ...]
    ) -> None:
        call, tensors = TensorCall.of(given, {})
        results, _ = TensorCall.of((), {})
        made = HookCall(
            model=self._model,
            path=name,
            reason="",
            num_attentions=0,
            call=call,
            layouts=(),
            results=results,
            keeps=True,
            hook=hook,
            module=module,
        )
        made.register()
        self.calls.append(made)
        self._tokens += made.op(list(tensors))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **parameters_of(module), **buffers_of(module)}


class _WriteWatch(TorchFunctionMode):
    """Sets `seen` when a function writes to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_method = name.endswith("_") and not name.endswith("__")
        is_operator = name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)
        self.seen = self.seen or is_method or is_operator or "out" in (kwargs or {})
        return func(*args, **(kwargs or {}))


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)
