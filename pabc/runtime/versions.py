"""Tells whether the tensors that something was computed from have changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch

from pabc.internals.tensors import version_of


@dataclass(frozen=True)
class TensorVersions:
    """Tensors as they were at one time.

    Attributes:
        tensors: the tensors.
        versions: their versions and addresses, which change when their values do; None: that
            cannot be told.
    """

    tensors: Sequence[torch.Tensor]
    versions: tuple[list[int], list[int]] | None

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> TensorVersions:
        """Returns tensors as they are now; of inference tensors, versions are not known."""
        is_known = not any(tensor.is_inference() for tensor in tensors)
        return cls(tensors, _versions_of(tensors) if is_known else None)

    def hold_for(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Returns whether these are the same tensors, unchanged; False if that cannot be told."""
        return (
            self.versions is not None
            and all(map(is_, tensors, self.tensors))
            and self.versions == _versions_of(tensors)
        )

    def changed(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Returns which of these are other tensors, or changed; all, if that cannot be told."""
        if self.versions is None or any(tensor.is_inference() for tensor in tensors):
            return tuple(range(len(tensors)))
        known = zip(self.tensors, *self.versions, strict=True)
        now = zip(tensors, *_versions_of(tensors), strict=True)
        pairs = enumerate(zip(known, now, strict=True))
        return tuple(i for i, (a, b) in pairs if a[0] is not b[0] or a[1:] != b[1:])


def _versions_of(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Returns versions and addresses, without Python code per tensor."""
    return list(map(version_of, tensors)), list(map(torch.Tensor.data_ptr, tensors))
