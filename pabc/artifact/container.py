"""Writes and reads the file of an artifact: named members, and a checksum over all of them.

It is a zip file whose comment is the SHA-256 of every byte before the comment. A truncated or
corrupted file is rejected before any member is read. The checksum protects against damage, not
against forgery: an artifact contains machine code, as a shared library does.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from pabc.artifact.errors import ArtifactError

_DIGEST = hashlib.sha256().digest_size * 2
_EPOCH = (1980, 1, 1, 0, 0, 0)  # one date for all members: files with equal members are equal


def write_container(path: str | os.PathLike[str], members: Mapping[str, bytes]) -> None:
    """Writes the file atomically: an interrupted write leaves a previous file as it was."""
    target = Path(path)
    content = _pack(members)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def read_container(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Returns the members of a file that :func:`write_container` wrote.

    Raises: :class:`ArtifactError` if the file is damaged or is not an artifact; FileNotFoundError.
    """
    content = Path(path).read_bytes()
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not content.startswith(b"PK\x03\x04"):
        raise ArtifactError(f"{path}: expected an artifact of pabc, found another kind of file")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ArtifactError(
            f"{path}: expected a file that matches its checksum, found one ({len(content)} bytes)"
            " that is damaged or cut short; save it again"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pack(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
        archive.comment = b"0" * _DIGEST
    body = buffer.getvalue()[:-_DIGEST]
    return body + hashlib.sha256(body).hexdigest().encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Flushes the folder's entries to disk, if the system can open folders (Windows cannot)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
