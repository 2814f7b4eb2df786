"""Writes and reads constant tensors as plain bytes."""

from __future__ import annotations

from typing import Any

import torch

from pabc.artifact.errors import ArtifactError
from pabc.artifact.values import Json, decode, encode


class TensorWriter:
    """Collects tensors by name.

    Attributes:
        table: name -> shape, strides, dtype, device and number of bytes, as JSON.
    """

    def __init__(self) -> None:
        self.table: dict[str, Json] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._parts: list[bytes] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor under a name, unless it is there already."""
        if name in self._tensors:
            assert self._tensors[name] is tensor, name
            return
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            found = f"a {type(tensor).__name__}, {tensor.layout}"
            raise ArtifactError(f"constant {name}: expected a strided tensor, found {found}")
        self._tensors[name] = tensor
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        layout = [list(tensor.shape), list(tensor.stride()), tensor.dtype, tensor.device]
        self.table[name] = [*map(encode, layout), len(data)]
        self._parts.append(data)

    @property
    def data(self) -> bytes:
        """The bytes of all tensors, in the order of the table."""
        return b"".join(self._parts)


def read_tensors(table: dict[str, Json], data: bytes) -> dict[str, torch.Tensor]:
    """Returns the tensors that a :class:`TensorWriter` collected."""
    found, start = {}, 0
    for name, (*layout, size) in table.items():
        found[name] = _read_tensor(data[start : start + size], *map(decode, layout))
        start += size
    return found


def _read_tensor(data: bytes, shape: Any, strides: Any, dtype: Any, device: Any) -> torch.Tensor:
    if data:
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    else:
        flat = torch.empty(0, dtype=dtype)
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return tensor.copy_(flat.reshape(shape))
