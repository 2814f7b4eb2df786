"""Groups of ops that do the same to dimensions, or are asked for together."""

from __future__ import annotations

import torch

from pabc.internals.onednn import PROJECTIONS

aten = torch.ops.aten

STRICT_VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Ops that regroup dimensions in row-major order, and refuse memory that does not allow it."""
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
"""Ops whose result is the operand's memory in another shape; `reshape` copies if it has to."""
LAYOUTS = RELAYOUTS | {*COPIES, *CASTS}
"""Ops whose result has every element of the operand once, cast at most."""
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
"""Ops whose results are the parts of a tensor along one dimension."""
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
CONVOLUTIONS = (
    aten.convolution.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
)
MATMULS = (aten.mm.default, aten.bmm.default, aten.matmul.default)
MATMULS_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)
CONTRACTIONS = frozenset(
    {
        *MATMULS,
        *MATMULS_WITH_BIAS,
        *CONVOLUTIONS,
        aten.inner.default,
        aten.linear.default,
        aten.tensordot.default,
        *PROJECTIONS,
    }
)
"""Ops that sum over products of two tensors."""
