"""ops: operators, as nodes of a graph call them (`torch._ops`).

- `OpOverload`, `OpOverloadPacket`, `HigherOrderOperator`: what a node can call. Since 2.6.
- `schema_of`, `find_schema` (`_schema`): arguments, and which are written to. Since 2.6.
- `split_name` (`_opname`, `_overloadname`): names in saved artifacts. Since 2.6.
- `packet_name` (`_qualified_op_name`): names in messages. Since 2.6.
- `registered` (`_opoverload`): the op of a `torch.library.custom_op`. Since 2.6.
- `run_composite` (`_op_dk`): an op taken apart into those that it consists of. Since 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from .dispatch import COMPOSITE
from .release import expecting

with expecting("operators"):
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

    _known = torch.ops.aten.add
    _known._qualified_op_name, _known.Tensor._opname, _known.Tensor._overloadname  # noqa: B018
    _known.Tensor._schema, _known.Tensor._op_dk  # noqa: B018

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "find_schema",
    "packet_name",
    "registered",
    "run_composite",
    "schema_of",
    "split_name",
]

schema_of: Callable[[Any], torch.FunctionSchema] = attrgetter("_schema")
"""Returns the schema of an :class:`OpOverload`."""
packet_name: Callable[[OpOverloadPacket], str] = attrgetter("_qualified_op_name")
"""Returns the name of all overloads of an op."""
split_name: Callable[[OpOverload], tuple[str, str]] = attrgetter("_opname", "_overloadname")
"""Returns the names of an op and of its overload, without the namespace."""


def find_schema(target: Any) -> torch.FunctionSchema | None:
    """Returns the schema of what a node calls, or None if it has none."""
    return getattr(target, "_schema", None)


def registered(op: Any) -> Any:
    """Returns the op that `torch.library.custom_op` registered, or `op` if it is another object."""
    return getattr(op, "_opoverload", op)


def run_composite(op: OpOverload) -> Callable[..., Any]:
    """Returns a function that calls the ops that a composite op consists of."""
    return partial(op._op_dk, COMPOSITE)
