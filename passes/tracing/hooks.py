"""hooks: forward hooks of the modules within a model, while its forward is traced.

A hook that changes values is part of what is computed: it is traced. One that only looks on, and
keeps features or counts, say, would run at the trace and never again: the graph calls it instead,
at its place, with the tensors that the module was given and gave.
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

from .outside import OutsideCall, TensorCall
from .python_state import Snapshot
from .walk import HOOKS, hook_path


@dataclass(slots=True, kw_only=True)
class HookCall(OutsideCall):
    """One call of a hook by the graph; its module runs in the graph."""

    hook: Callable[..., Any]
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.path} is called with what its module is given and gives"

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Calls the hook, with tensors that it may keep: a graph may use their memory again."""
        self.call.run(partial(self.hook, self.module), [t.clone() for t in tensors])
        return [_token(tensors)]

    def fake(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What :meth:`run` returns."""
        return [_token(tensors)]


def _token(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Something for a trace to return, so that the call is not taken for dead code."""
    return tensors[0].new_empty(0) if tensors else torch.empty(0)


class HookTracer:
    """Calls the hooks of inner modules while a forward runs.

    Attributes:
        calls: the calls of hooks that the graph is to make, in order.
        refused: what cannot be captured, and why.
    """

    def __init__(self, model: nn.Module, tokens: list[torch.Tensor]) -> None:
        """`tokens`: gains the results of these calls, for the trace to return."""
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
    return {**vars(module), **module._parameters, **module._buffers}


class _WriteWatch(TorchFunctionMode):
    """Notices functions that write to a tensor."""

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
