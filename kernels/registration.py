"""Signatures: a kernel's arguments, stated once, from which its PyTorch op follows.

The fields of a NamedTuple are the arguments; annotations say what tensors must be like.

    class ScaleArguments(NamedTuple):
        x: Annotated[Tensor, TensorSpec("(..., C)", dtypes=FLOATS)]
        weight: Annotated[Tensor | None, TensorSpec("(C,)", dtypes="x")] = None
        eps: float = 1e-6

    SIGNATURE = KernelSignature("scale", ScaleArguments)

    schema of the op:   pabc::scale(Tensor x, Tensor? weight=None, float eps=1e-6) -> Tensor
    an error of it:     scale.weight: expected shape (8,), found (7,)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from types import NoneType
from typing import (
    Annotated,
    Any,
    Generic,
    NoReturn,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

from pabc.internals.ops import OpOverload

from .arithmetic import INTERPRETED

NAMESPACE = "pabc"
Constraint = tuple[str, str, object, bool]
"""An argument, what is expected of it, what was found, and whether that is as expected.

The NamedTuple may have a method `constraints`, which yields what specs can't state.
"""
P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape and the dtype that a tensor argument, or each tensor of a list, must have.

    Attributes:
        shape: names of sizes. The same name is the same size in all arguments; `...` stands for any
            number of leading dimensions, the same in all arguments; `1` is itself.
        dtypes: the dtypes allowed, or the name of the argument whose dtype it must have; by default
            any.
        broadcast: allows every shape that broadcasts to `shape`, fewer dimensions included.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] | str = ()
    broadcast: bool = False

    def resolve(self, sizes: dict[str, Any]) -> list[Any]:
        """Returns the shape as far as `sizes` are known; names stand for those that are not."""
        shape: list[Any] = []
        for name in _parse(self.shape):
            size = sizes.get(name, name)
            shape += size if isinstance(size, tuple) else [size]
        return shape

    def admits(self, shape: torch.Size, sizes: dict[str, Any]) -> bool:
        """Returns True if a shape is as stated, and adds the sizes that it is the first to have."""
        if self.broadcast:
            full = self.resolve(sizes)
            pairs = zip(reversed(shape), reversed(full), strict=False)
            return len(shape) <= len(full) and all(size in (1, most) for size, most in pairs)
        names, found = _parse(self.shape), tuple[Any, ...](shape)
        if names[0] == "...":
            num_leading = max(len(found) - len(names) + 1, 0)
            found = (found[:num_leading], *found[num_leading:])
        return len(names) == len(found) and all(
            sizes.setdefault(name, size) == size for name, size in zip(names, found, strict=True)
        )

    def describe(self, sizes: dict[str, Any]) -> str:
        """Returns the expected shape in words."""
        shape = self.resolve(sizes)
        text = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
        return f"a shape that broadcasts to {text}" if self.broadcast else f"shape {text}"


@cache
def _parse(shape: str) -> tuple[str, ...]:
    return tuple(shape.strip("()").replace(",", " ").split())


class KernelSignature(Generic[P, A]):
    """The name and the arguments of an op.

    Args:
        name: of the op, in the namespace :data:`NAMESPACE`.
        arguments: a NamedTuple.
    """

    def __init__(self, name: str, arguments: Callable[P, A]) -> None:
        self.name = name
        self._arguments = arguments
        self._hints = get_type_hints(arguments, include_extras=True)
        self._specs: dict[str, TensorSpec] = {
            field: hint.__metadata__[0]
            for field, hint in self._hints.items()
            if get_origin(hint) is Annotated
        }

    def checked(self, function: Callable[[A], R]) -> Callable[P, R]:
        """Returns `function` with the fields as its parameters, which are checked at each call."""

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = self._arguments(*args, **kwargs)
            self.check(given)
            return function(given)

        call.__signature__ = inspect.signature(self._arguments)  # type: ignore[attr-defined]
        return call

    def check(self, given: A) -> None:
        """Checks devices, dtypes and shapes of tensors, then the constraints of the NamedTuple.

        Raises:
            ValueError: in the form `op.argument: expected ..., found ...`.
        """
        sizes: dict[str, Any] = {"1": 1}
        device = None
        for name, spec in self._specs.items():
            dtypes = spec.dtypes
            if isinstance(dtypes, str):
                dtypes = (getattr(given, dtypes).dtype,)
            for tensor in _tensors_of(getattr(given, name)):
                device = device or tensor.device
                if tensor.device != device:
                    self.refuse(name, f"device {device}", tensor.device)
                if dtypes and tensor.dtype not in dtypes:
                    self.refuse(name, f"dtype {' or '.join(map(str, dtypes))}", tensor.dtype)
                if not spec.admits(tensor.shape, sizes):
                    self.refuse(name, spec.describe(sizes), tuple(tensor.shape))
        constraints: Callable[[], Iterator[Constraint]] | None = getattr(given, "constraints", None)
        for name, expected, found, holds in constraints() if constraints else ():
            if not holds:
                self.refuse(name, expected, found)

    def refuse(self, argument: str, expected: str, found: object) -> NoReturn:
        """Raises the ValueError that says what was expected of an argument."""
        raise ValueError(f"{self.name}.{argument}: expected {expected}, found {found}")

    def register(
        self,
        *,
        launch: Callable[P, R],
        reference: Callable[P, R],
        allocate: Callable[[A], R],
    ) -> OpOverload:
        """Registers the op and returns it.

        Args:
            launch: runs on a GPU, and in Triton's interpreter on a CPU too.
            reference: else runs on a CPU.
            allocate: makes the results, not computed: what the op is for fake and meta tensors.
        """
        op = torch.library.custom_op(
            f"{NAMESPACE}::{self.name}",
            launch if INTERPRETED else reference,
            mutates_args=(),
            schema=f"{self._spell_parameters()} -> {_spell(get_type_hints(launch)['return'])}",
        )
        op.register_kernel("cuda")(launch)
        op.register_fake(self.checked(allocate))
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    def _spell_parameters(self) -> str:
        spelled = []
        for name, parameter in inspect.signature(self._arguments).parameters.items():
            default, text = parameter.default, f"{_spell(self._hints[name])} {name}"
            if default is not parameter.empty:
                text += f'="{default}"' if isinstance(default, str) else f"={default}"
            spelled.append(text)
        return f"({', '.join(spelled)})"


_SPELLINGS: dict[Any, str] = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}


def _spell(hint: Any) -> str:
    """Returns a type as op schemas write it: `Sequence[Tensor | None]` is `Tensor?[]`."""
    if hint in _SPELLINGS:
        return _SPELLINGS[hint]
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        return f"({', '.join(map(_spell, inner))})"
    if get_origin(hint) is Annotated:
        return _spell(inner[0])
    if NoneType in inner:
        return _spell(inner[inner[0] is NoneType]) + "?"
    return _spell(inner[0]) + "[]"


def _tensors_of(value: Tensor | Iterable[Tensor | None] | None) -> list[Tensor]:
    """Returns the tensors of an argument that is a tensor, a list of them, or None."""
    values = [value] if isinstance(value, Tensor) else value or ()
    return [each for each in values if each is not None]
