"""What this process sends, counted as it sends it: nothing here is taken from pabc."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

OPS = torch.ops._c10d_functional


class CountSent(TorchDispatchMode):
    """Collectives called within, and the bytes that this rank sends to other ranks in them.

    An all-to-all sends each rank its rows of the input, one's own stay; an all-gather sends each
    other rank the whole input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], FakeTensor):  # a compiler at work: nothing is sent
            pass
        elif func is OPS.all_to_all_single.default:
            self._count_all_to_all(*args)
        elif func is OPS.all_gather_into_tensor.default:
            x, size, group = args
            assert dist.get_world_size(_resolve_process_group(group)) == size
            self._add((size - 1) * x.numel() * x.element_size())
        elif func.namespace == OPS.name and func is not OPS.wait_tensor.default:
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _count_all_to_all(
        self, x: Tensor, output_rows: list[int], input_rows: list[int], group: str
    ) -> None:
        rank = dist.get_rank(_resolve_process_group(group))
        assert sum(input_rows) == len(x)
        row = x[0].numel() * x.element_size()
        self._add(row * sum(rows for i, rows in enumerate(input_rows) if i != rank))

    def _add(self, nbytes: int) -> None:
        self.calls += 1
        self.nbytes += nbytes
