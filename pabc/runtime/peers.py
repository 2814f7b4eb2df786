"""Compares what the processes that share a model are about to do, and finds out which one failed.

Before a step computes, the ranks compare it in one small collective on the CPU. A rank that is at
another step, follows another plan or has raised an error stops all of them there, before any rank
waits in a collective that others never enter. A rank that fails within its step leaves a note in
the store of torch.distributed, and one that fails between two steps leaves one, too, in place of
the next comparison. A rank that is killed leaves no note: it misses its heartbeats.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pabc.internals.collectives import default_store, timeout_of

BEAT = 0.5
"""Seconds between two heartbeats of a rank."""
PATIENCE = 5.0
"""Seconds without a heartbeat after which a rank counts as lost."""
_AGREES, _FAILED, _MISSED = range(3)
"""A rank's message in a comparison: its facts, a failure, or that it takes no part."""
_COMMUNICATION_WORDS = ("gloo", "nccl", "connection", "timed out", "socket")


class RankError(RuntimeError):
    """Ranks that share a model do not agree, or one of them failed: the message says which."""


class Peers:
    """The ranks of a mesh, as one of them sees the others. Construction is collective."""

    def __init__(self, mesh: DeviceMesh) -> None:
        members: list[int] = mesh.mesh.flatten().tolist()
        self._rank = members.index(dist.get_rank())
        self._size = len(members)
        self._group = _cpu_group(mesh, members)
        self._store = dist.PrefixStore(f"pabc/{self._group.group_name}", default_store())
        self._names = [f"rank {member}" for member in members]
        self._lock = threading.RLock()
        self._lost: str | None = None
        self._num_met = 0
        """Comparisons that this rank has taken part in, or missed."""
        self._num_missed = 0
        """Missed comparisons that it still has to enter, so that later ones stay in order."""
        self._under_way: list[tuple[dist.Work, Any]] = []
        versions = {"pabc": importlib.import_module("pabc").__version__}
        self.versions = {**versions, "torch": str(torch.__version__)}
        self._store.set(f"beat/{self._rank}", "0")
        beating = threading.Thread(
            target=_send_heartbeats, args=(weakref.ref(self), self._store, self._rank), daemon=True
        )
        beating.start()

    @contextmanager
    def step(self) -> Iterator[RankStep]:
        """Makes what is within one step, whose facts :meth:`RankStep.agree` compares.

        An error before that is passed on to the other ranks. Raises: RankError where another rank
        failed, or the ranks do not agree.
        """
        with self._lock:
            if self._lost is not None:
                raise RankError(f"{self._lost}; restart the processes")
            step = RankStep(self)
            try:
                yield step
            except RankError as error:
                _mark_told(error)
                raise
            except BaseException as error:
                if not step.agreed:
                    _mark_told(error)
                    self.exchange({}, failure=_name(error))
                    raise
                found = self._diagnose(error)
                if found is None:
                    raise
                raise found from error

    def tell(self, error: BaseException) -> None:
        """Reports an error between two steps of this rank to the others, at their next comparison,
        in which this rank takes no part. An error that they know of is not reported again."""
        with self._lock:
            if self._lost is not None or _is_told(error):
                return
            _mark_told(error)
            self._num_met += 1
            self._num_missed += 1
            text = f"{self._names[self._rank]} failed between two calls: {_name(error)}"
            self._note(f"missed/{self._num_met}/{self._rank}", text)

    def exchange(self, facts: Mapping[str, str], failure: str = "") -> None:
        """Compares facts among the ranks, or reports a failure of this one.

        Raises: RankError on all ranks where facts differ, and on the others where one failed.
        """
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
        try:
            while self._num_missed:
                self._num_missed -= 1
                self._gather(bytes(len(digest)), _MISSED)
            self._num_met += 1
            work, everyone = self._gather(digest, _FAILED if failure else _AGREES)
            missed = self._wait(work)
            flags = everyone[:, -1].tolist()
            if missed or _MISSED in flags:
                if failure:
                    return
                raise RankError("; ".join(missed or self._read_missed()))
            if bool((everyone == everyone[0]).all()) and not failure:
                return
            said: list[Any] = [None] * self._size
            dist.all_gather_object(said, (dict(facts), failure), group=self._group)
        except RankError:
            raise
        except Exception as error:
            found = self._diagnose(error)
            if found is None:
                raise
            raise found from error
        failures = [
            f"{name} failed: {text}"
            for name, (_, text) in zip(self._names, said, strict=True)
            if text
        ]
        if failure:
            return
        if failures:
            raise RankError("; ".join(failures))
        raise RankError(self._describe([found for found, _ in said]))

    def _gather(self, digest: bytes, flag: int) -> tuple[dist.Work, torch.Tensor]:
        """Starts the collective that gathers a digest and a flag from each rank."""
        mine = torch.frombuffer(bytearray(digest + bytes([flag])), dtype=torch.uint8)
        everyone = torch.empty(self._size, len(mine), dtype=torch.uint8)
        work = dist.all_gather(list(everyone), mine, group=self._group, async_op=True)
        self._under_way = [pair for pair in self._under_way if not pair[0].is_completed()]
        self._under_way.append((work, (mine, everyone)))  # which it reads and writes until then
        return work, everyone

    def _wait(self, work: dist.Work) -> list[str]:
        """Waits for all ranks; returns the notes of those that take no part, if there are any."""
        pause, look = 0.0, time.monotonic() + BEAT
        while not work.is_completed():
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)
            if time.monotonic() > look:
                missed = self._read_missed()
                if missed:
                    return missed
                look = time.monotonic() + BEAT
        work.wait()
        return []

    def _read_missed(self) -> list[str]:
        """Returns the notes of ranks that take no part in the comparison under way."""
        return self._read([f"missed/{self._num_met}/{i}" for i in range(self._size)])

    def _read(self, keys: Sequence[str]) -> list[str]:
        return [self._store.get(key).decode() for key in keys if self._store.check([key])]

    def _describe(self, facts: list[dict[str, str]]) -> str:
        lines = []
        for key in dict.fromkeys(key for each in facts for key in each):
            ranks_by_value: dict[str, list[str]] = {}
            for name, each in zip(self._names, facts, strict=True):
                ranks_by_value.setdefault(each.get(key, "nothing"), []).append(name)
            if len(ranks_by_value) > 1:
                found = "; ".join(f"{', '.join(r)}: {v}" for v, r in ranks_by_value.items())
                lines.append(f"{key}: {found}")
        return f"expected the same on every rank, found {' | '.join(lines)}"

    def _diagnose(self, error: BaseException) -> RankError | None:
        """Returns what other ranks did that led to `error`, raised after all ranks agreed; None if
        this rank failed by itself."""
        if not (isinstance(error, RuntimeError) and _is_of_communication(error)):
            self._lost = f"{self._names[self._rank]} failed: {_name(error)}"
            self._note(f"failed/{self._rank}", self._lost)
            return None
        try:
            self._lost = self._find_lost() or f"communication among ranks failed: {_name(error)}"
            self._note("lost", self._lost)  # for those who notice when this rank has gone as well
        except RuntimeError as store_error:
            self._lost = (
                "the store of torch.distributed is gone, and with it the process that holds it "
                f"(rank 0, or the launcher): {_name(store_error)}"
            )
        return RankError(self._lost)

    def _find_lost(self) -> str:
        """Returns which ranks failed: by their notes, or by missed heartbeats; empty: unknown."""
        last = self._beats()
        deadline = time.monotonic() + PATIENCE
        while True:
            notes = [*[f"failed/{i}" for i in range(self._size)], "lost"]
            told = self._read_missed() + self._read(notes)
            if told:
                return "; ".join(dict.fromkeys(told))
            if time.monotonic() > deadline:
                break
            time.sleep(BEAT)
        silent = [
            name
            for name, before, now in zip(self._names, last, self._beats(), strict=True)
            if before == now
        ]
        if not silent:
            return ""
        return f"{', '.join(silent)} missed heartbeats for {PATIENCE:g} s: killed, or cut off"

    def _beats(self) -> list[bytes]:
        keys = [f"beat/{i}" for i in range(self._size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _note(self, key: str, text: str) -> None:
        try:
            self._store.set(key, text)
        except RuntimeError:  # the store went with another rank: there is nobody to tell
            return


class RankStep:
    """A step of one rank, which is compared with those of the others."""

    def __init__(self, peers: Peers) -> None:
        self.agreed = False
        self._peers = peers

    def agree(self, facts: Mapping[str, str]) -> None:
        """Waits until all ranks have stated their facts. Raises RankError where these differ."""
        self._peers.exchange({**self._peers.versions, **facts})
        self.agreed = True


def _cpu_group(mesh: DeviceMesh, members: list[int]) -> dist.ProcessGroup:
    """Returns a group of the mesh's ranks whose collectives do not wait for a device."""
    if mesh.ndim == 1 and dist.get_backend(mesh.get_group()) == "gloo":
        return mesh.get_group()
    group: Any = dist.new_group(
        members, timeout=_timeout(mesh), backend="gloo", use_local_synchronization=True
    )
    assert isinstance(group, dist.ProcessGroup)  # which it is for the members
    return group


def _timeout(mesh: DeviceMesh) -> timedelta | None:
    """Returns how long the mesh's own collectives wait."""
    return timeout_of(mesh.get_group(0), torch.device(mesh.device_type))


def _send_heartbeats(peers: weakref.ref[Peers], store: dist.Store, rank: int) -> None:
    """Counts up in the store, as long as the model and the store exist."""
    count = 0
    while peers() is not None:
        count += 1
        try:
            store.set(f"beat/{rank}", str(count))
        except RuntimeError:
            return
        time.sleep(BEAT)


def _is_of_communication(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _COMMUNICATION_WORDS)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _mark_told(error: BaseException) -> None:
    """Marks an error as known to the other ranks."""
    error.__dict__["_pabc_told"] = True


def _is_told(error: BaseException | None) -> bool:
    """Returns whether the other ranks know of an error, or of one that it follows from."""
    while error is not None:
        if "_pabc_told" in error.__dict__:
            return True
        error = error.__cause__ or error.__context__
    return False
