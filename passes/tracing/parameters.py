"""parameters: keeps the classes and attributes of a module's parameters during a trace.

A tracer puts tensors of its own in their place, without the class and the attributes of a user's
parameter, such as the format of quantized bytes, and without a way to move or cast them with their
module. During a traced forward, both work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from pabc.internals import pytree
from pabc.internals.dispatch import disabled_torch_function, is_traceable_wrapper_subclass
from pabc.internals.modules import APPLY, apply, buffers_of, parameters_of
from pabc.internals.tensors import Make, make_wrapper, replacing_make_subclass

_PLAIN = (torch.Tensor, nn.Parameter)
_PLAIN_FUNCTIONS = (disabled_torch_function, torch.Tensor.__torch_function__)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Parameters:
    """The parameters and buffers of a model that are more than plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals = [
            (tensors, name, tensor)
            for tensors in _registers(model)
            for name, tensor in tensors.items()
            if tensor is not None and is_more_than_a_tensor(tensor)
        ]

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """While active, they have their classes and attributes, and modules can be cast."""
        modules = list(self._model.modules())
        held = [(tensors, dict(tensors)) for tensors in _registers(self._model)]
        for tensors, name, original in self._originals:
            traced = tensors[name]
            if traced is not original:
                tensors[name] = _dress(traced, original)
        for module in modules:
            vars(module)[APPLY] = partial(_apply, module)
        try:
            with _making_stand_ins() if self._originals else nullcontext():
                yield
        finally:
            for module in modules:
                vars(module).pop(APPLY, None)
            for tensors, before in held:
                if any(tensors.get(name) is not tensor for name, tensor in before.items()):
                    tensors.update(before)


def _registers(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the dictionaries in which modules hold parameters and buffers."""
    return [held for module in model.modules() for held in _registers_of(module)]


def _registers_of(module: nn.Module) -> list[dict[str, Any]]:
    found: list[Any] = [parameters_of(module), buffers_of(module)]
    return [held for held in found if held]


def is_more_than_a_tensor(tensor: torch.Tensor) -> bool:
    """Returns True if Python code can tell a tensor from a plain one.

    Returns False for one that is made of several tensors: it is traced as those.
    """
    if is_traceable_wrapper_subclass(tensor):
        return False
    return type(tensor) not in _PLAIN or any(not name.startswith("_is_") for name in vars(tensor))


def has_functions_of_its_own(tensor: torch.Tensor) -> bool:
    """Returns True if PyTorch's functions are overridden for the class of a tensor."""
    function = type(tensor).__torch_function__
    return type(tensor) not in _PLAIN and function not in _PLAIN_FUNCTIONS


def _apply(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """:meth:`torch.nn.Module._apply` for tensors that are traced, which cannot be written to."""
    if recurse:
        for child in module.children():
            apply(child)(function)
    for tensors in _registers_of(module):
        for name, tensor in tensors.items():
            if tensor is not None:
                tensors[name] = function(tensor)
    return module


def _dress(traced: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns the traced tensor with the class and the attributes of the user's own."""
    attributes = {name: x for name, x in vars(original).items() if not name.startswith("_is_")}
    if type(original) in _PLAIN:
        vars(traced).update((n, x) for n, x in attributes.items() if n not in vars(traced))
        return traced
    dressed = _stand_in(type(original), traced)
    vars(dressed).update(attributes)
    return dressed


class _StandIn:
    """A base, before a tensor's class, of objects whose values are those of a traced tensor.

    PyTorch's functions get the traced tensor; a class that overrides them gets their result.
    """

    _kind: type[torch.Tensor]
    _traced: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.as_subclass:
            return _as(args[1], args[0])
        if func == _DATA:
            func = torch.Tensor.detach  # a tracer loses sight of what the other gives
        args_of, kwargs_of = pytree.tree_map(_traced, (args, kwargs or {}))
        result = func(*args_of, **kwargs_of)
        own = getattr(cls._kind.__torch_function__, "__func__", None)
        if own is None or own is torch.Tensor.__torch_function__.__func__:  # type: ignore[attr-defined]
            return result
        return own(cls, lambda *_, **__: result, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map(_traced, (args, kwargs or {}))
        return func(*args, **kwargs)


@cache
def _class_of(kind: type[torch.Tensor]) -> Any:
    make: Any = type(kind)
    return make(kind.__name__, (_StandIn, kind), {"_kind": kind, "__module__": __name__})


def _stand_in(kind: type[torch.Tensor], traced: torch.Tensor) -> Any:
    made = make_wrapper(
        _class_of(kind),
        traced.shape,
        strides=traced.stride(),
        dtype=traced.dtype,
        device=traced.device,
    )
    made._traced = traced
    return made


def _traced(value: Any) -> Any:
    return value._traced if isinstance(value, _StandIn) else value


def _as(kind: type[torch.Tensor], value: Any) -> Any:
    """Returns a stand-in's values as a tensor of another class."""
    kind = getattr(kind, "_kind", kind)
    return _traced(value) if kind is torch.Tensor else _stand_in(kind, _traced(value))


@contextmanager
def _making_stand_ins() -> Iterator[None]:
    """While active, subclasses that are made of stand-ins are stand-ins."""

    def change(make: Make) -> Make:
        def make_subclass(cls: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(data, _StandIn) or issubclass(cls, _StandIn):
                return _as(cls, data)
            return make(cls, data, *args, **kwargs)

        return make_subclass

    with replacing_make_subclass(change):
        yield
