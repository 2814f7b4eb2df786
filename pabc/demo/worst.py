"""Shows the sample of each variant that is farthest from the full model's, beside that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pabc.demo import pictures
from pabc.demo.model import Model
from pabc.demo.timing import Round, Run
from pabc.demo.variants import FULL

GAIN = 8
"""How many times larger differences are shown than they are."""


def save_worst(
    path: Path,
    model: Model,
    table: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Run],
    rounds: Sequence[Round],
) -> bool:
    """Writes a picture with a row for each variant of one process that leaves something out.

    Returns False, and writes nothing, if none does.

    Args:
        path: the file.
        model: what makes pictures of samples.
        table: the figures of all variants, see `metrics.measure`.
        runs: what the variants generated.
        rounds: the captions of the samples.
    """
    captions = [caption for batch in rounds for caption in batch.captions]
    rows = {name: row["worst_sample"] for name, row in table.items() if _is_shown(row)}
    if not rows:
        return False
    titles = [
        f"{name}: {table[name]['psnr_min']:.1f} dB: {captions[index]}"
        for name, index in rows.items()
    ]
    full = model.pictures(torch.stack([runs[FULL].samples[index] for index in rows.values()]))
    found = model.pictures(torch.stack([runs[name].samples[i] for name, i in rows.items()]))
    columns = [
        pictures.Column("full model", "", full),
        pictures.Column("variant", "", found),
        pictures.Column("difference", f"{GAIN} times as large", _amplify(found, full)),
    ]
    pictures.save_still(path, titles, columns)
    return True


def _is_shown(row: Mapping[str, Any]) -> bool:
    return row["flop_share"] < 1 and row["ranks"] == 1 and row["psnr_min"] is not None


def _amplify(found: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Returns the difference of bytes, around a medium gray."""
    difference = found.to(torch.int32) - full.to(torch.int32)
    return (128 + GAIN * difference).clamp(0, 255).to(torch.uint8)
