"""Reads and writes files of named arrays, whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

VERSION = 1
Arrays = dict[str, np.ndarray]
Parsed = TypeVar("Parsed")
_SHOWN = 200
"""The most characters of an error that are repeated: some quote all of a damaged file."""


def write_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Any]) -> Path:
    """Writes arrays to a file in numpy's `.npz` format, marked as of this kind."""
    with replacing(path) as beside, beside.open("wb") as file:
        named: dict[str, Any] = {"pabc": np.asarray(kind), "version": np.asarray(VERSION)}
        np.savez_compressed(file, **named, **arrays)
    return Path(path)


def read_arrays(
    path: str | os.PathLike[str], kind: str, parse: Callable[[Arrays], Parsed]
) -> Parsed:
    """Returns what `parse` makes of the arrays in a file of this kind.

    Raises ValueError for a file of another kind, and for one that is damaged in whatever way;
    FileNotFoundError, or another OSError, for one that cannot be opened.
    """
    data = Path(path).read_bytes()
    with parsing(path, kind):
        arrays = _unpack(data)
        found = str(arrays.pop("pabc", "no mark of pabc")), int(arrays.pop("version", 0))
    if found != (kind, VERSION):
        raise ValueError(
            f"{path}: expected a {kind} of version {VERSION}, found {found[0]}, version {found[1]}"
        )
    with parsing(path, kind):
        return parse(arrays)


@contextmanager
def parsing(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Makes one ValueError of whatever is raised while the contents of a file are parsed: damaged
    bytes make decoders raise errors of many types."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: expected a {kind}, found a file that is damaged or of another kind "
            f"({reason[:_SHOWN]}); give another path, or delete the file to have it made anew"
        ) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; at the end, the file there takes the place of the one at `path`.

    It is in a folder of its own beside that, so that others who write the same file at the same
    time do not meet it. If an exception is raised, the file at `path` stays as it was.
    """
    target = Path(path)
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as folder:
        beside = Path(folder) / target.name
        yield beside
        beside.replace(target)


def _unpack(data: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        damaged = archive.testzip()  # numpy may stop before the checksum of a member is compared
    if damaged is not None:
        raise ValueError(f"{damaged} does not match its checksum")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def nest(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def unnest(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays whose names begin with `prefix` and a dot, without these."""
    start = f"{prefix}."
    return {name[len(start) :]: a for name, a in arrays.items() if name.startswith(start)}
