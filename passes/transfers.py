"""transfers: defines the ops that copy cuts between a device and host memory.

This module has their schemas and fake implementations, which graphs need.
:mod:`pabc.runtime.transfers` registers the implementations.
"""

from __future__ import annotations

import torch

torch.library.define("pabc::stash", "(Tensor cut) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    "pabc::fetch",
    "(Tensor kept, Device device, Tensor? upcoming=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
stash = torch.ops.pabc.stash.default
"""Returns a copy of a cut in host memory."""
fetch = torch.ops.pabc.fetch.default
"""Returns a copy of a stashed cut on a device; `upcoming` is the cut to fetch after it."""


@torch.library.register_fake("pabc::stash")
def _(cut: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cut, device="cpu")


@torch.library.register_fake("pabc::fetch")
def _(
    kept: torch.Tensor, device: torch.device, upcoming: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.empty_like(kept, device=device)
