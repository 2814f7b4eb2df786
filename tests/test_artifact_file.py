"""The file of an artifact: whole or not at all, and no damage goes unseen."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from artifacts import BY_NAME, saved

import pabc
from pabc import ArtifactError
from pabc.artifact.container import read_container, write_container

pytestmark = pytest.mark.runtime
DAMAGED = r"damaged or cut short|another kind of file"
MEMBERS = {"manifest.json": b"{}" * 50, "program0/constants": bytes(range(256)) * 40, "empty": b""}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fast.pabc"
    write_container(path, MEMBERS)
    return path


def test_members_come_back(file: Path) -> None:
    assert read_container(file) == MEMBERS
    assert zipfile.ZipFile(file).testzip() is None  # any tool can look into it
    write_container(file, MEMBERS)
    assert [path.name for path in file.parent.iterdir()] == ["fast.pabc"]


def test_every_truncation_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    for length in {*range(0, len(content), 7), *range(len(content) - 200, len(content))}:
        file.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=DAMAGED):
            read_container(file)


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=DAMAGED):
            read_container(file)


def test_more_at_the_end_is_noticed(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        read_container(file)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = BY_NAME["Packed"]
    path = tmp_path_factory.mktemp("artifact") / "fast.pabc"
    saved(case.model(), [case.call()], path)
    return path


def test_damage_in_each_member_of_an_artifact_is_noticed(artifact: Path, tmp_path: Path) -> None:
    content, model = artifact.read_bytes(), BY_NAME["Packed"].model()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    assert {"manifest.json", "program0/program.json", "program0/constants"} == {
        member.filename for member in members
    }
    for member in members:
        start = member.header_offset
        for place in (start + 20, start + 32, start + 32 + member.compress_size // 2):
            damaged = bytearray(content)
            damaged[place] ^= 1
            (tmp_path / "damaged.pabc").write_bytes(damaged)
            with pytest.raises(ArtifactError, match=r"damaged\.pabc: expected .* its checksum"):
                pabc.load(tmp_path / "damaged.pabc", model)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x04}." * 100])
def test_what_is_no_artifact_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="file: "):
        pabc.load(path, BY_NAME["Packed"].model())
    with pytest.raises(FileNotFoundError):
        pabc.load(tmp_path / "missing", BY_NAME["Packed"].model())


@pytest.mark.parametrize("member", ["manifest.json", "program0/program.json"])
def test_members_that_pabc_did_not_write_are_refused(
    member: str, artifact: Path, tmp_path: Path
) -> None:
    members = read_container(artifact)
    for content in (b"", b"[]", b"{}", members[member].replace(b'"', b"'", 1)):
        path = tmp_path / "other.pabc"
        write_container(path, {**members, member: content})
        with pytest.raises(ArtifactError, match=r"other\.pabc: "):
            pabc.load(path, BY_NAME["Packed"].model())


def test_nothing_is_unpickled(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    import torch

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    pabc.load(artifact, BY_NAME["Packed"].model())
    assert not any(
        b"\x80\x04" in data[:2] or data.endswith(b".") for data in read_container(artifact).values()
    )


KILLED = """
import os, signal, sys
from pabc.artifact import container
for where in ("fdopen", "fsync", "chmod", "replace"):
    child = os.fork()
    if child == 0:
        setattr(container.os, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        container.write_container(sys.argv[1], {"new": bytes(10 ** 6)})
    _, status = os.waitpid(child, 0)
    print(where, os.WTERMSIG(status), container.read_container(sys.argv[1]) == {"old": b"1"})
"""


def test_a_process_killed_while_saving_leaves_the_old_artifact(file: Path) -> None:
    write_container(file, {"old": b"1"})
    command = [sys.executable, "-c", KILLED, str(file)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    points = ("fdopen", "fsync", "chmod", "replace")
    assert done.stdout.splitlines() == [f"{where} {int(signal.SIGKILL)} True" for where in points]
    write_container(file, MEMBERS)
    assert read_container(file) == MEMBERS


def test_an_error_while_saving_leaves_the_old_artifact_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_container(file, {"new": b"1"})
    assert read_container(file) == MEMBERS
    assert [path.name for path in file.parent.iterdir()] == ["fast.pabc"]
