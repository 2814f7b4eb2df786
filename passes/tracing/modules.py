"""modules: what a graph takes for granted of the model's modules besides their tensors' values.

A trace sees which modules there are, and the Python values that they hold, at one time: a LoRA
adapter's scale, whether it is enabled, a processor. What changed since is another model.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

_HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
_BOOKKEEPING = frozenset(vars(nn.Module())) - _HOOKS - {"training"}
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset)
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_DEPTH = 4


class _Same:
    """An object that equals itself alone; it stays alive, so that no other takes its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Modules:
    """The modules of a model as they were when it was captured.

    Seen: which modules there are and where, their classes, the names of their parameters and
    buffers, forward hooks, and Python values: numbers, strings and the like, in containers too;
    other objects by identity. Not seen: what is within such objects, and, where a module runs
    outside of the graph, what is within it.
    """

    def __init__(self, model: nn.Module, outside: Collection[str] = ()) -> None:
        """`outside`: qualified names of modules that run as they are."""
        self._outside = frozenset(outside)
        self._state = dict(self._describe(model))
        children = [m._modules for _, m in self._walk(model) if m._modules]
        self._children, self._as_captured = tuple(children), gc.get_referents(*children)

    def same_children(self) -> bool:
        """Whether every module is at its place: a quick look, without Python code per module.

        A dictionary refers to its values, in their order: names are looked at by
        :meth:`difference`.
        """
        return gc.get_referents(*self._children) == self._as_captured

    def difference(self, model: nn.Module) -> str | None:
        """What is not as it was, in words; None: nothing. Takes milliseconds."""
        now = dict(self._describe(model))
        for path in (*now, *self._state):
            old, new = self._state.get(path), now.get(path)
            if old is None or new is None:
                return f"{path or 'the model'} is {'new' if old is None else 'gone'}"
            for name in {**old, **new}:
                if name not in old and _is_unread(name, new):
                    continue
                if name not in old or name not in new or old[name] != new[name]:
                    return f"{name} of {path or 'the model'} changed"
        return None

    def _describe(self, model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, module in self._walk(model):
            state = {
                "the class": _Same(type(module)),
                "what is a module": [(name, _Same(m)) for name, m in module._modules.items()],
                "what is a parameter": {n for n, p in module._parameters.items() if p is not None},
                "what is a buffer": {n for n, b in module._buffers.items() if b is not None},
            }
            for name, value in vars(module).items():
                if name not in _BOOKKEEPING:
                    # Which tensor it is, and how it lies, is looked at where a graph reads it.
                    is_tensor = isinstance(value, torch.Tensor)
                    state[name] = torch.Tensor if is_tensor else _freeze(value)
            yield path, state

    def _walk(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Every module once, but for what is in modules outside of the graph."""
        seen: set[int] = set()
        stack = [("", model)]
        while stack:
            path, module = stack.pop()
            if id(module) in seen or path in self._outside:
                continue
            seen.add(id(module))
            yield path, module
            children = [(n, m) for n, m in module._modules.items() if m is not None]
            stack.extend((f"{path}.{n}" if path else n, m) for n, m in reversed(children))


def _is_unread(name: str, state: dict[str, Any]) -> bool:
    """Whether an attribute that is new is an object that a trace without it cannot have met: it
    hides nothing of the class. Libraries note things of their own on modules in this way."""
    return isinstance(state[name], _Same) and not hasattr(state["the class"].value, name)


def _freeze(value: Any, depth: int = 0) -> Any:
    """Something that equals what this function gives for the same value later on."""
    if isinstance(value, _VALUES):
        return type(value), value
    if type(value) not in _CONTAINERS or depth == _DEPTH:
        return _Same(value)
    if isinstance(value, dict):
        items = ((_freeze(k, _DEPTH), _freeze(v, depth + 1)) for k, v in value.items())
        return type(value), tuple(items)
    inner = (_freeze(v, depth + 1) for v in value)
    return type(value), frozenset(inner) if isinstance(value, (set, frozenset)) else tuple(inner)
