"""tensors: what `torch.Tensor` does not show.

- `version_of` (`_version`): tells that values were written to; PyTorch's notes on autograd describe
  it. Since 2.6.
- `storage_address` (`_cdata`): tells views of one memory, on the meta device too. Since 2.6.
- `make_wrapper` (`_make_wrapper_subclass`): a tensor of a class, laid out as another. Since 2.6.
- `replacing_make_subclass` (`_make_subclass`): what parameters of a user's class are made with.
  Since 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

from .release import expecting

Make = Callable[..., Any]
"""What `_make_subclass` is: a class, a tensor and options -> a tensor of that class."""

with expecting("tensors"):
    make_wrapper: Make = torch.Tensor._make_wrapper_subclass
    torch.Tensor._make_subclass, torch.Tensor._version  # noqa: B018
    torch.UntypedStorage._cdata  # noqa: B018

__all__ = ["Make", "make_wrapper", "replacing_make_subclass", "storage_address", "version_of"]

version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
"""Returns a number that a write to a tensor, or to a view of it, changes. Inference tensors have
none: it raises RuntimeError for them."""


def storage_address(tensor: torch.Tensor) -> int:
    """Returns the address of the object that stands for the memory of a tensor."""
    return tensor.untyped_storage()._cdata


@contextmanager
def replacing_make_subclass(change: Callable[[Make], Make]) -> Iterator[None]:
    """Replaces `torch.Tensor._make_subclass` within the context by `change` of it."""
    before = vars(torch.Tensor).get("_make_subclass")
    changed = staticmethod(change(torch.Tensor._make_subclass))
    torch.Tensor._make_subclass = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del torch.Tensor._make_subclass
        else:
            torch.Tensor._make_subclass = before  # type: ignore[method-assign]
