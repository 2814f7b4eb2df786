"""Reads and writes files of named arrays, whole or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
Arrays = dict[str, np.ndarray]


def write_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Any]) -> Path:
    """Writes arrays to a file in numpy's `.npz` format, marked as of this kind."""
    target = Path(path)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            named: dict[str, Any] = {"pabc": np.asarray(kind), "version": np.asarray(VERSION)}
            np.savez_compressed(file, **named, **arrays)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def read_arrays(path: str | os.PathLike[str], kind: str) -> Arrays:
    """Returns the arrays in a file of this kind. Raises ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a file of a {kind}, found {error}") from error
    found = str(arrays.pop("pabc", "no mark of pabc")), int(arrays.pop("version", 0))
    if found != (kind, VERSION):
        raise ValueError(
            f"{path}: expected a {kind} of version {VERSION}, found {found[0]}, version {found[1]}"
        )
    return arrays


def nest(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def unnest(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays whose names begin with `prefix` and a dot, without these."""
    start = f"{prefix}."
    return {name[len(start) :]: a for name, a in arrays.items() if name.startswith(start)}
