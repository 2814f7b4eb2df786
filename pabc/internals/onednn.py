"""onednn: oneDNN's projection as an op (`torch.ops.mkldnn`), and Inductor's code for it.

- `projection`, `PROJECTIONS`: the op, which builds for some CPUs lack. Since 2.6.
- `lowering_onednn`: Inductor's code for it, for weights that are inputs too. Since 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from .release import expecting

projection: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""(x, weight, bias, "none", [], "") -> the projection of x; None in a build without oneDNN."""
PROJECTIONS = () if projection is None else (projection.default,)


@contextmanager
def lowering_onednn() -> Iterator[None]:
    """Makes Inductor compile oneDNN's projection, alone or fused with a sum, for weights that are
    inputs. By default, Inductor compiles it for constant weights only."""
    if projection is None:
        yield
        return
    with expecting("Inductor"):
        from torch._inductor.ir import TensorBox
        from torch._inductor.lowering import lowerings
        from torch._inductor.mkldnn_ir import LinearBinary, LinearUnary

    kernels: dict[Any, Callable[..., Any]] = {
        projection.default: lambda *args: TensorBox.create(LinearUnary.create(*args)),
        projection.binary: lambda *args: TensorBox.create(LinearBinary.create(*args)),
    }
    with patch.dict(lowerings, kernels):
        yield
