"""Builds models from the configuration files that are published with their checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

# Keys that libraries write when they save a configuration; no model reads them.
_BOOKKEEPING = frozenset({"architectures", "model_type", "torch_dtype", "dtype"})

Model = TypeVar("Model", bound="Configurable")


class Configurable(nn.Module):
    """A model whose keyword arguments are the configuration keys of its original.

    Attributes:
        ignored: keys that concern training or the choice of a kernel, and are skipped.
        fixed: key -> its implemented values, for keys that are not arguments.
    """

    ignored: ClassVar[Collection[str]] = ()
    fixed: ClassVar[Mapping[str, Collection[object]]] = {}

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any], **changes: Any) -> Model:
        """Builds the model, with random weights, from the original's configuration.

        Args:
            config: the original's configuration keys and values; keys that concern training,
                kernels or bookkeeping are skipped.
            changes: arguments of this class that replace or add to those in `config`.

        Raises:
            ValueError: a key is unknown or missing, or its value is not implemented.
        """
        known = dict(inspect.signature(cls).parameters)
        chosen = {}
        for key, value in {**config, **changes}.items():
            if key in known:
                chosen[key] = value
            elif key in cls.fixed:
                _check_value(cls.__name__, key, value, cls.fixed[key])
            elif key not in cls.ignored and not _is_bookkeeping(key):
                allowed = sorted({*known, *cls.fixed, *cls.ignored})
                raise ValueError(
                    f"{cls.__name__}: expected keys among {', '.join(allowed)}, found {key!r}"
                )
        missing = [
            key for key, p in known.items() if p.default is p.empty and chosen.get(key) is None
        ]
        if missing:
            raise ValueError(
                f"{cls.__name__}: expected a value for {', '.join(missing)}, found none"
            )
        return cls(**chosen)


def check_positive(where: str, **values: int) -> None:
    """Raises ValueError, naming the argument, unless all values are positive integers."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}.{name}: expected a positive integer, found {value!r}")


def _check_value(where: str, key: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"{where}.{key}: expected {listed}, found {value!r}")


def _is_bookkeeping(key: str) -> bool:
    return key.startswith("_") or key.endswith("_version") or key in _BOOKKEEPING
