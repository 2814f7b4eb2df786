"""Ops that change the layout of a tensor, by what they do to it."""

from __future__ import annotations

from ..ir import aten

STRICT_VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Ops that take other sizes in row-major order, and refuse memory that does not allow it."""
VIEWS = (*STRICT_VIEWS, aten.reshape.default)
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
ALIASES = (aten.alias.default, aten.detach.default)
COPIES = (aten.clone.default, aten.contiguous.default)
CASTS = (aten._to_copy.default,)
RELAYOUTS = frozenset(
    {
        *VIEWS,
        *SQUEEZES,
        *ALIASES,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
    }
)
"""Ops whose result is the operand's memory, or a copy where there is no such view, in another
shape."""
LAYOUTS = RELAYOUTS | {*COPIES, *CASTS}
"""Ops whose result has every element of the operand once, cast at most."""
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
"""Ops whose results are the parts of a tensor along one dimension."""
