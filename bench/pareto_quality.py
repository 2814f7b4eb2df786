"""Measures how near samples are to others: PSNR and SSIM, clip by clip.

Shapes: B samples in [-1, 1], (B, ..., H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pabc.demo import judge

EQUAL = 150.0
"""The PSNR in dB of samples that are equal, or as good as that."""


def find_psnr(samples: Tensor, others: Tensor) -> Tensor:
    """Returns the PSNR of each sample, (B,) in dB, at most `EQUAL`; -inf for what is not finite."""
    found = judge.psnr(_as_frames(samples), _as_frames(others)).clamp(max=EQUAL)
    return found.nan_to_num(nan=float("-inf"))


def mean_psnr(samples: Tensor, others: Tensor) -> float:
    """Returns the mean PSNR of the samples."""
    return float(find_psnr(samples, others).mean())


def compare(samples: Tensor, others: Tensor) -> dict[str, float]:
    """Returns mean, standard deviation and worst PSNR, and mean and worst SSIM, of the samples."""
    psnr = find_psnr(samples, others)
    ssim = judge.ssim(_as_frames(samples), _as_frames(others))
    found = {
        "psnr": psnr.mean(),
        "psnr_sd": psnr.std() if len(psnr) > 1 else torch.zeros(()),
        "psnr_min": psnr.min(),
        "ssim": ssim.mean(),
        "ssim_min": ssim.min(),
    }
    return {name: round(float(value), 5) for name, value in found.items()}


def _as_frames(samples: Tensor) -> Tensor:
    """Returns samples as (B, frames or colors, H, W) in [0, 1]."""
    return ((samples.clamp(-1, 1) + 1) / 2).flatten(1, -3)
