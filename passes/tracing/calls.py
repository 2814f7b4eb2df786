"""calls: puts a call of a model into a form that a tracer can record.

A tracer accepts tensors, a few kinds of constants, and the containers that PyTorch's pytree knows.
Users pass more: dataclasses, enums, callables, numbers that are to be inputs of the graph. So the
tracer calls the model with stand-ins, and a patched forward turns them back into the user's own
arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pabc.base.arguments import pack
from pabc.base.forward import inner_forward
from pabc.base.structure import Structure, flatten, holds_tensors
from pabc.internals import pytree
from pabc.internals.modules import buffers_of

from . import numbers
from .alone import calling_forward_alone
from .compiled import noting_compiled
from .extremes import exact_extremes
from .holders import Change
from .hooks import HookTracer
from .number_mode import NumberMode
from .parameters import Parameters
from .patch import patched
from .python_state import Snapshot

_TRACED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class ResultForm:
    """The form of the model's result around the graph's outputs.

    Attributes:
        structure: the structure of the result.
        constants: one entry per leaf: `(value,)` for a value that is no tensor, else `()`.
    """

    structure: Structure
    constants: tuple[tuple[Any, ...], ...]

    @property
    def num_outputs(self) -> int:
        """The number of the graph's outputs."""
        return sum(not constant for constant in self.constants)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Returns the model's result around the graph's outputs."""
        rest = iter(outputs)
        leaves = [constant[0] if constant else next(rest) for constant in self.constants]
        return self.structure.unflatten(leaves)


def _alias(leaf: Any) -> Any:
    """Returns another tensor object of the same memory.

    A tracer tells tensors by identity: one tensor passed as two arguments would be one input of the
    graph, and a weight passed as an argument no input at all. It also marks the tensors that it is
    given, for instance with the dimensions to leave free, and the marks outlive the trace.
    """
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class TracedCall:
    """One call of a model, in a form that a tracer can record.

    Attributes:
        inputs: the graph's inputs, one per flattened argument; tensors are aliases of the user's.
        args, kwargs: the inputs in their containers, with which the tracer calls the model.
        structure: the structure of the user's own arguments.
        result: the form of the model's result; known once the model was traced.
        left: the changes of Python state that the last trace made, and that were undone.
        iterators: paths of objects that it met whose state cannot be seen.
        keeping: paths of modules with side effects, each call of which must run.
        tokens: results that stand for side effects of the last trace; they follow the outputs.
        hooks: the calls of hooks that it made.
        compiled: lines about what the model itself compiles.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], lifted: Collection[int] = ()
    ) -> None:
        self._leaves, self.structure = flatten((args, kwargs))
        self._lifted = frozenset(lifted)
        self.inputs = [_alias(leaf) for leaf in pack(self._leaves, lifted)]
        self.args, self.kwargs = self.structure.unflatten_plain(self.inputs)
        self.result: ResultForm | None = None
        self.left: list[Change] = []
        self.iterators: list[str] = []
        self.keeping: set[str] = set()
        self.tokens: list[torch.Tensor] = []
        self.hooks = HookTracer(nn.Module(), self.tokens)
        self.compiled: list[str] = []
        self._given: Any = None
        self._forward: Any = None

    @contextmanager
    def replacing_forward(self, model: nn.Module) -> Iterator[None]:
        """While active, `model` takes the stand-ins and returns a flat tuple of tensors.

        A call then runs the forward alone: what runs around it is not captured.
        """
        forward = self._forward = inner_forward(model)
        parameters = Parameters(model)

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            args, kwargs = self._restore((args, {name: kwargs[name] for name in self.kwargs}))
            mode = NumberMode() if self._lifted else nullcontext()
            self.tokens.clear()
            self.hooks = HookTracer(model, self.tokens)
            with (
                parameters.as_written(),
                _registering_unseen(model),
                self._noting_changes(model, args, kwargs),
                self.hooks.active(),
                exact_extremes(),
                noting_compiled(model) as self.compiled,
                mode,
            ):
                results = self._take_apart(forward(*args, **kwargs))
            return (*results, *self.tokens)

        if not _fits(inspect.signature(forward), self.args, self.kwargs):
            # A decorator takes arguments that the function whose signature it shows does not.
            call.__signature__ = _signature_of(self.args, self.kwargs)  # type: ignore[attr-defined]
        with patched(model, call), calling_forward_alone(model):
            yield

    def run(self, leaves: Sequence[Any]) -> Any:
        """Calls the model's forward with other leaves in the structure of the user's call."""
        args, kwargs = self.structure.unflatten(leaves)
        return self._forward(*args, **kwargs)

    @property
    def leaves(self) -> list[Any]:
        """The user's flattened arguments."""
        return list(self._leaves)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the user's flattened arguments."""
        return [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def path_to(self, container: Any) -> tuple[Any, ...] | None:
        """Returns the keys that lead from `(args, kwargs)` of the last trace to a container, or
        None."""
        return _find_path(self._given, container)

    @contextmanager
    def _noting_changes(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Records in `left` the changes of Python state that are made within, and undoes them."""
        self._given = (args, kwargs)
        names = [*(inspect.signature(self._forward).parameters), *map(str, range(len(args)))]
        named = dict(zip(names, args, strict=False))
        snapshot = Snapshot.of(model, {**named, **kwargs})
        try:
            yield
        finally:
            self.left, self.iterators = snapshot.changes(), snapshot.iterators
            snapshot.restore()

    def _restore(self, arguments: Any) -> Any:
        """Returns the user's arguments with the tracer's tensors in them."""
        leaves: list[Any] = []
        for i, (given, leaf) in enumerate(
            zip(pytree.tree_leaves(arguments), self._leaves, strict=True)
        ):
            if i in self._lifted:
                leaves.append(numbers.lift(leaf, given))
            else:
                leaves.append(given if isinstance(given, _TRACED) else leaf)
        return self.structure.unflatten(leaves)

    def _take_apart(self, result: Any) -> tuple[Any, ...]:
        leaves, structure = flatten(result)
        leaves = [numbers.plain_result(leaf) for leaf in leaves]
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) and holds_tensors(leaf):
                raise ValueError(
                    "expected a result of tensors in containers or dataclasses, found a "
                    f"{type(leaf).__name__} that holds tensors"
                )
        traced = tuple(leaf for leaf in leaves if isinstance(leaf, _TRACED))
        constants = tuple(() if isinstance(leaf, _TRACED) else (leaf,) for leaf in leaves)
        self.result = ResultForm(structure, constants)
        return traced


def _find_path(value: Any, wanted: Any) -> tuple[Any, ...] | None:
    if value is wanted:
        return ()
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    for key, inner in pairs:
        path = _find_path(inner, wanted)
        if path is not None:
            return (key, *path)
    return None


def _fits(signature: inspect.Signature, args: Any, kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _signature_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.Signature:
    """Returns a signature that takes calls of this form alone."""
    positional = [
        inspect.Parameter(f"arg_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(args))
    ]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
    return inspect.Signature([*positional, *named])


@contextmanager
def _registering_unseen(model: nn.Module) -> Iterator[None]:
    """While active, hides new buffers from torch.export, which takes them for writes."""
    register, own = model.register_buffer, vars(model).get("register_buffer")
    fresh: list[str] = []

    def register_unseen(name: str, tensor: Any, persistent: bool = True) -> None:
        if tensor is None or hasattr(model, name):
            register(name, tensor, persistent)
        else:
            buffers_of(model)[name] = tensor
            fresh.append(name)

    vars(model)["register_buffer"] = register_unseen
    try:
        yield
    finally:
        del vars(model)["register_buffer"]
        if own is not None:
            vars(model)["register_buffer"] = own
        for name in fresh:
            buffers_of(model).pop(name, None)
