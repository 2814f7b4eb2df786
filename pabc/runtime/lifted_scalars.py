"""Lifted scalars: numbers among a model's arguments that became inputs of its graph.

At first, a Python number is a constant of the captured graph: it may be a size, or steer control
flow. When a second value is seen, the model is recaptured with the number as an input
(:mod:`pabc.passes.tracing.numbers`), and the graph is compared with the model at both values. Where
they differ, or the capture fails, the number stays a constant, and each value has its own program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pabc.base.arguments import leaf_key
from pabc.base.forward import inner_forward
from pabc.base.numbers import is_number
from pabc.base.structure import Structure, flatten
from pabc.passes import (
    untouched,
)
from pabc.runtime.autocast import active_autocast, without_autocast
from pabc.runtime.program import Program

logger = logging.getLogger(__name__)
CallKey = tuple[Any, ...]


def call_key(structure: Structure, leaves: Sequence[Any], lifted: Collection[int]) -> CallKey:
    """Returns what calls share that one program serves: structure, shapes, dtypes, devices,
    constants, autocast. Strides are no part of it: inputs with other strides are copied.

    `lifted`: positions of the numbers that are inputs, of which only the type is part of it.
    """
    keys = [
        (x.shape, x.dtype, x.device)
        if isinstance(x, torch.Tensor)
        else type(x)
        if i in lifted
        else leaf_key(x)
        for i, x in enumerate(leaves)
    ]
    return ((structure, active_autocast(leaves)), *keys)


def without_sizes(key: CallKey) -> CallKey:
    """Returns what calls share that one program with dynamic shapes may serve."""
    shapes = (isinstance(k, tuple) and isinstance(k[0], torch.Size) for k in key)
    return tuple(
        (len(k[0]), *k[1:]) if is_tensor else k for k, is_tensor in zip(key, shapes, strict=True)
    )


class LiftedScalars:
    """The numbers that are lifted, and those that stay constants, per structure of arguments."""

    def __init__(self) -> None:
        self._values: dict[Structure, dict[int, tuple[Any, Any]]] = {}
        self._constant: dict[Structure, set[int]] = {}

    def state(self) -> tuple[tuple[Structure, dict[int, Any], frozenset[int]], ...]:
        """Returns all that is known: per structure, two values of each lifted number, and which
        numbers stay constants."""
        forms = dict.fromkeys((*self._values, *self._constant))
        return tuple(
            (f, dict(self._values.get(f, {})), frozenset(self._constant.get(f, ()))) for f in forms
        )

    def restore(self, state: Iterable[tuple[Structure, dict[int, Any], frozenset[int]]]) -> None:
        """Restores what :meth:`state` returned."""
        for form, values, constant in state:
            self._values[form] = dict(values)
            self._constant[form] = set(constant)

    def of(self, structure: Structure) -> frozenset[int]:
        """Returns the positions, among the flattened arguments, of the lifted numbers."""
        return frozenset(self._values.get(structure, {}))

    def capture(
        self,
        build: Callable[[Collection[int]], Program],
        model: nn.Module,
        structure: Structure,
        leaves: Sequence[Any],
        changed: Mapping[int, Any],
    ) -> tuple[Program, frozenset[int]] | None:
        """Returns a program with lifted numbers, and their positions; None where none is lifted.

        `changed`: the numbers that differ from an earlier call's, with that call's values.
        """
        constant = self._constant.setdefault(structure, set())
        known = self._values.get(structure, {})
        pairs = {i: _other(leaves[i], pair) for i, pair in known.items()}
        pairs |= {i: value for i, value in changed.items() if i not in constant}
        if not pairs:
            return None
        program = _try(build, model, structure, leaves, pairs)
        if program is None and len(pairs) > 1:
            tried = {i: _try(build, model, structure, leaves, {i: pairs[i]}) for i in pairs}
            pairs = {i: value for i, value in pairs.items() if tried[i] is not None}
            program = _try(build, model, structure, leaves, pairs) if pairs else None
        if program is None:
            constant.update(changed)
            return None
        constant.update(i for i in changed if i not in pairs)
        self._values[structure] = known | {i: (pairs[i], leaves[i]) for i in pairs if i in changed}
        return program, frozenset(pairs)


def changed_numbers(
    keys: Collection[CallKey], key: CallKey, leaves: Sequence[Any]
) -> dict[int, Any]:
    """Returns the numbers that alone tell `key` from an earlier call's key: position -> its value
    then. Empty if all earlier keys differ in something else, too."""
    for other in keys:
        if other[0] != key[0]:
            continue
        pairs = enumerate(zip(key[1:], other[1:], strict=True))
        changed = {i: b for i, (a, b) in pairs if a != b}
        if changed and all(
            is_number(leaves[i]) and isinstance(b, tuple) and b[0] is type(leaves[i])
            for i, b in changed.items()
        ):
            return {i: b[1] for i, b in changed.items()}
    return {}


def superseded(keys: Collection[CallKey], key: CallKey, lifted: Collection[int]) -> list[CallKey]:
    """Returns those of `keys` that differ from `key` in lifted numbers alone."""
    fixed = [i for i in range(1, len(key)) if i - 1 not in lifted]
    return [k for k in keys if k[0] == key[0] and k != key and all(k[i] == key[i] for i in fixed)]


def _other(value: Any, pair: tuple[Any, Any]) -> Any:
    """Returns the one of two values that `value` is not."""
    return pair[0] if value != pair[0] else pair[1]


def _try(
    build: Callable[[Collection[int]], Program],
    model: nn.Module,
    structure: Structure,
    leaves: Sequence[Any],
    others: Mapping[int, Any],
) -> Program | None:
    try:
        program = build(frozenset(others))
    except Exception as error:  # whatever stops it: constants are always there to fall back on
        logger.debug("numbers at %s stay constants: %s", sorted(others), error)
        return None
    earlier = [others.get(i, leaf) for i, leaf in enumerate(leaves)]
    agrees = _follows(program, model, structure, [list(leaves), earlier])
    if not agrees:
        logger.debug("numbers at %s stay constants: the graph differs", sorted(others))
    return program if agrees else None


def _follows(
    program: Program, model: nn.Module, structure: Structure, calls: Sequence[list[Any]]
) -> bool:
    """Returns whether the graph gives the model's results for both calls, and tells them apart."""
    expected, errors = [], []
    for leaves in calls:
        args, kwargs = structure.unflatten(leaves)
        with torch.no_grad(), untouched(model, runs=True):
            wanted, form = flatten(inner_forward(model)(*args, **kwargs))
            with without_autocast(leaves):
                found, form_found = flatten(program.evaluate(leaves))
        if form != form_found or list(map(_kind, wanted)) != list(map(_kind, found)):
            return False
        expected.append(wanted)
        errors.append(_distance(wanted, found))
    change = _distance(*expected)
    scale = _distance(expected[0], [0 * x if _is_floating(x) else x for x in expected[0]])
    precision = max((torch.finfo(x.dtype).eps for x in expected[0] if _is_floating(x)), default=0.0)
    allowed = min(scale * precision**0.7, 0.01 * change)
    return all(error <= allowed for error in errors)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _distance(leaves: Sequence[Any], others: Sequence[Any]) -> float:
    """Returns the largest difference of two results; infinite if any but floats differ."""
    largest = 0.0
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if torch.equal(a, b):
                continue
            if not _is_floating(a) or a.shape != b.shape:
                return float("inf")
            difference = (a.double() - b.double()).abs().max().item()
            largest = max(largest, difference if difference == difference else float("inf"))
        elif a is not b and a != b:
            return float("inf")
    return largest
