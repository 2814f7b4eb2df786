"""The file of an artifact: named members, and a checksum over all of it.

It is a zip file whose comment is the SHA-256 of every byte before the comment. A file that was cut
short, or of which a bit has changed, is found out before anything in it is read. The checksum is
there for damage, not for forgery: an artifact holds machine code, as a shared library does.
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
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal members make equal files


def write_container(path: str | os.PathLike[str], members: Mapping[str, bytes]) -> None:
    """Writes the file whole or not at all: whoever dies in between leaves what was there before."""
    target = Path(path)
    content = _pack(members)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's own is for the owner alone
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def read_container(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The members of a file that :func:`write_container` wrote.

    Raises: :class:`ArtifactError` if the file is damaged, or no artifact; FileNotFoundError.
    """
    content = Path(path).read_bytes()
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not content.startswith(b"PK\x03\x04"):
        raise ArtifactError(f"{path}: expected an artifact of pabc, found another kind of file")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ArtifactError(
            f"{path}: the checksum differs; the file ({len(content)} bytes) is damaged or cut"
            " short: save it again"
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
    """Makes the new name last through a loss of power, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
