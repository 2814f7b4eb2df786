"""How a kernel becomes an op of PyTorch: one name for its launcher and for its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arithmetic import INTERPRETED

NAMESPACE = "pabc"


def register(
    name: str,
    schema: str,
    *,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    allocate: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Registers `pabc::name`: `launch` on a GPU, `reference` on a CPU, `allocate` (outputs of the
    right layout, not computed) where only shapes are followed.

    In Triton's interpreter, the kernel is what runs on a CPU too.
    """
    on_cpu = launch if INTERPRETED else reference
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", on_cpu, mutates_args=(), schema=schema)
    op.register_kernel("cuda")(launch)
    op.register_fake(allocate)
    found: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


def check(op: str, argument: str, expected: str, found: object, is_right: bool) -> None:
    """Raises ValueError where an argument is not as a kernel needs it."""
    if not is_right:
        raise ValueError(f"{op}: {argument}: expected {expected}, found {found}")
