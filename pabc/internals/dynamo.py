"""dynamo: parts of torch.compile that pabc shares, though it does not trace with Dynamo.

- `compile_lock`: held while PyTorch traces or compiles. Since 2.6.
- `dict_version`: a number that a write to a dictionary changes. Since 2.8.
- `replacing_in_hop_compile`: is called right before each function under torch.compile. Since 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from .release import expecting

with expecting("Dynamo"):
    from torch._C._dynamo.guards import dict_version
    from torch._higher_order_ops import utils as _utils

    _utils._in_hop_compile  # noqa: B018

__all__ = ["compile_lock", "dict_version", "replacing_in_hop_compile"]


def compile_lock() -> AbstractContextManager[Any]:
    """Returns PyTorch's own lock: it traces and compiles for one thread at a time."""
    with expecting("Dynamo"):
        from torch._dynamo.convert_frame import compile_lock  # imports all of Dynamo, in seconds

    return compile_lock


@contextmanager
def replacing_in_hop_compile(
    change: Callable[[Callable[[], bool]], Callable[[], bool]],
) -> Iterator[None]:
    """Replaces, within the context, what tells whether PyTorch itself compiles, by `change` of it.

    The function that torch.compile returns asks it right before it calls the one beneath.
    """
    own = _utils._in_hop_compile
    _utils._in_hop_compile = change(own)
    try:
        yield
    finally:
        _utils._in_hop_compile = own
