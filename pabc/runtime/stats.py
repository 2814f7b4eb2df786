"""Counts of what a compiled model did so far."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

logger = logging.getLogger(__name__)

GIVEN = "the schedule that was given"
"""Where a plan comes from that nothing else was said of."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts since a model was compiled, over all trajectories; printed, a table.

    Attributes:
        calls: steps that ran to their end.
        outside: unscheduled calls, which are no step of a generation, such as a prefill: their
            timestep is none of the schedule's, or not its first one where a generation may begin.
            They compute everything and keep nothing.
        generations: sequences of calls that reached the last step of their plan.
        computed, reused, stored: regions, one per slot and call.
        fallbacks: reason -> calls that computed what was to be reused. `shape`, `dtype`, `device`,
            `arguments` (others, or other values of constants): in this the call differs from the
            one before it. `weights`: a tensor of the model was replaced. `model`: a hook, a method
            or a Python value of it changed. `missing`: the step that stores the value was not run.
            `timestep`: it is not certain which step the call is, since its timestep is that of the
            call before, or of another step. `state`: an earlier call left Python state behind, with
            `backend="original"`.
        nbytes: bytes that slots hold now.
        peak_nbytes: the most bytes that slots held at one time.
        captures: graphs captured from the model.
        compiles: phases specialized and compiled.
        blocks: distinct blocks of these phases, each compiled once.
        recordings: CUDA graphs recorded.
        recorded: generations that were recorded by :func:`pabc.auto`.
        plan_source: where the plan comes from.
    """

    calls: int
    outside: int
    generations: int
    computed: int
    reused: int
    stored: int
    fallbacks: Mapping[str, int]
    nbytes: int
    peak_nbytes: int
    captures: int
    compiles: int
    blocks: int
    recordings: int
    recorded: int
    plan_source: str

    def __str__(self) -> str:
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        rows["fallbacks"] = ", ".join(f"{k} {n}" for k, n in self.fallbacks.items()) or "none"
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


class Recorder:
    """Counts for :class:`Stats`. Thread-safe.

    Attributes:
        plan_source: where the plan comes from, for people.
    """

    def __init__(self) -> None:
        # Re-entrant: an account may be closed by garbage collection while its lock is held.
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._nbytes = 0
        self._peak = 0
        self.plan_source = GIVEN

    def add(self, **counts: int) -> None:
        """Adds to counts by the names of :class:`Stats`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def add_call(self, reused: int, computed: int, stored: int) -> None:
        """Counts a step that ran to its end, and its regions."""
        with self._lock:
            counts = self._counts
            counts["calls"] += 1
            counts["reused"] += reused
            counts["computed"] += computed
            counts["stored"] += stored

    def fall_back(self, reason: str, step: int) -> None:
        """Counts a call that computes what was to be reused; logs the first one for each reason."""
        with self._lock:
            self._fallbacks[reason] += 1
            is_first = self._fallbacks[reason] == 1
        if is_first:
            logger.warning(
                "step %d computes what was to be reused (%s); further ones are counted in stats",
                step,
                reason,
            )

    def adjust(self, nbytes: int) -> None:
        """Adjusts the bytes held by `nbytes`, which may be negative."""
        with self._lock:
            self._nbytes += nbytes
            self._peak = max(self._peak, self._nbytes)

    def account(self, holder: object) -> Account:
        """Returns an account of the bytes of `holder`; it goes to 0 when that is collected."""
        account = Account(self)
        weakref.finalize(holder, account.set, 0).atexit = False
        return account

    def snapshot(self) -> Stats:
        """Returns the counts as they are now."""
        with self._lock:
            gauges = ("fallbacks", "nbytes", "peak_nbytes", "plan_source")
            names = (field.name for field in fields(Stats) if field.name not in gauges)
            counts: dict[str, Any] = {name: self._counts[name] for name in names}
            return Stats(
                **counts,
                fallbacks=dict(self._fallbacks),
                nbytes=self._nbytes,
                peak_nbytes=self._peak,
                plan_source=self.plan_source,
            )


class Account:
    """The bytes of one holder, as part of a recorder's sum."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.nbytes = 0

    def set(self, nbytes: int) -> None:
        """States how many bytes the holder holds now."""
        change, self.nbytes = nbytes - self.nbytes, nbytes
        self._recorder.adjust(change)
