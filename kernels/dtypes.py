"""The dtypes that kernels read and write, and the numbers of the fp8 encoding."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that kernels compute from, in float32, and round their results to."""
FP8 = torch.float8_e4m3fn
"""The dtype of encoded cuts."""
FP8_MAX = torch.finfo(FP8).max
"""448, the largest finite value of :data:`FP8`."""
OVER_FP8_MAX = 1 / FP8_MAX
"""A factor in place of a divisor: PyTorch divides by a number in this way on GPUs, not on CPUs."""
TINY = torch.finfo(torch.float32).tiny
"""The smallest scale of a row: quotients by it stay finite, and zeros stay zero."""
