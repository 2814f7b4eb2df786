"""Runs tasks, each in a process of its own, within their times: parts of bench/gpu.py.

Neither the memory of a task nor its crash affects other tasks. A process imports its modules while
the task before it runs, and then waits to be begun. A task that exceeds its time is stopped, with
all processes that it started; the rows that it sent stay.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from case import first_line
from gpu_checks import Target
from rows import Row, Rows

LEAST = 5.0
"""A task is begun only if at least this many seconds are left."""
DONE = "done"
NOT_RUN = "not run: out of time"
STOPPED = "stopped: out of time"


@dataclass(frozen=True, slots=True)
class Task:
    """The work of one process.

    Attributes:
        run: yields rows by name.
        seconds: the most that it may take.
    """

    name: str
    run: Callable[[Target], Iterator[tuple[str, Row]]]
    seconds: float


class Process:
    """A process for a task. It is spawned, not forked: CUDA cannot be used after a fork.

    Attributes:
        end: when it has to be done, by :func:`time.monotonic`.
    """

    def __init__(self, task: Task, target: Target, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self.begun = self.end = 0.0
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task, target, log))
        self._process.start()
        theirs.close()

    def begin(self, seconds: float) -> None:
        """Lets the task begin, and end within so many seconds."""
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        with contextlib.suppress(OSError):  # it died as it imported: reading the pipe says so
            self.pipe.send(seconds)

    def take(self, rows: Rows) -> str | None:
        """Takes a row, or returns how the task ended."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            return f"died: exit code {self._process.exitcode}"
        if message is None:
            return DONE
        key, row = message[0], make_finite(message[1])
        rows.add(f"{self.task.name}: {key}", row)
        print(format_row(f"{self.task.name}: {key}", row), flush=True)
        return None

    def stop(self, seconds: float = 0.0) -> None:
        """Ends the process and those that it started, after waiting a while for it to end."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # raised where none is left
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.pipe.close()


def make_finite(value: Any) -> Any:
    """Returns a row with text in the place of infinities and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: make_finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [make_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def serve(pipe: Connection, task: Task, target: Target, log: Path) -> None:
    """Runs a task in its process: waits to be begun, sends its rows, then None."""
    os.setpgid(0, 0)
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        seconds = pipe.recv()
    except EOFError:
        return
    print(f"== {task.name}", flush=True)
    send_rows(pipe, task, replace(target, seconds=seconds))


def send_rows(pipe: Connection, task: Task, target: Target) -> None:
    """Sends the rows of a task, its error if it raises one, then None."""
    try:
        for row in task.run(target):
            pipe.send(row)
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", {"error": first_line(error)}))
    pipe.send(None)


def run_tasks(
    tasks: Iterable[Task],
    target: Target,
    rows: Rows,
    deadline: float,
    log: Path,
    *,
    jobs: int = 1,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Runs tasks in their order, up to `jobs` at a time, until the deadline."""
    pool = Pool(target, rows, log)
    waiting = deque(tasks)
    try:
        while waiting or pool.running:
            while waiting and len(pool.running) < jobs:
                task, left = waiting.popleft(), deadline - time.monotonic()
                if left < LEAST:
                    _conclude(rows, task, NOT_RUN, 0.0)
                else:
                    pool.begin(task, min(task.seconds, left), waiting[0] if waiting else None)
            if pool.listen():
                after_each()
    finally:
        pool.stop()


class Pool:
    """The processes that run, and the one that waits to be begun next."""

    def __init__(self, target: Target, rows: Rows, log: Path) -> None:
        self._target, self._rows, self._log = target, rows, log
        self._ready: Process | None = None
        self.running: list[Process] = []

    def begin(self, task: Task, seconds: float, following: Task | None) -> None:
        """Begins a task, and starts the process of the one that follows."""
        _forget(self._rows, task)
        process = self._ready
        if process is None or process.task is not task:
            process = self._start(task)
        process.begin(seconds)
        self.running.append(process)
        self._ready = None if following is None else self._start(following)

    def _start(self, task: Task) -> Process:
        return Process(task, self._target, self._log)

    def listen(self) -> bool:
        """Waits for messages, or for the end of some task's time; returns True if one ended."""
        if not self.running:
            return False
        before = len(self.running)
        left = min(process.end for process in self.running) - time.monotonic()
        found = wait([process.pipe for process in self.running], max(left, 0.0))
        for process in tuple(self.running):
            outcome = process.take(self._rows) if process.pipe in found else None
            if outcome is None and time.monotonic() >= process.end:
                outcome = STOPPED
            if outcome is not None:
                process.stop(10 if outcome == DONE else 0)
                self.running.remove(process)
                seconds = time.monotonic() - process.begun
                _conclude(self._rows, process.task, outcome, seconds)
        return len(self.running) < before

    def stop(self) -> None:
        """Ends all processes."""
        for process in (*self.running, *filter(None, [self._ready])):
            process.stop()


def _forget(rows: Rows, task: Task) -> None:
    """Removes the rows of an earlier run of a task."""
    for name in [name for name in rows.rows if is_of(name, task)]:
        del rows.rows[name]


def _conclude(rows: Rows, task: Task, outcome: str, seconds: float) -> None:
    row: Row = {"outcome": outcome, "seconds": round(seconds, 1)}
    if outcome.startswith("died"):
        row["error"] = outcome
    rows.add(task.name, row)
    print(format_row(task.name, row), flush=True)


def is_of(name: str, task: Task) -> bool:
    """Returns True for the name of a row that a task wrote."""
    return name == task.name or name.startswith(f"{task.name}: ")


def is_complete(task: Task, rows: Rows) -> bool:
    """Returns True if a task was done, and no check of it failed."""
    own = [row for name, row in rows.rows.items() if is_of(name, task)]
    return rows.rows.get(task.name, {}).get("outcome") == DONE and not any(map(has_failed, own))


def has_failed(row: Row) -> bool:
    """Returns True if a row has a failed check or an error."""
    return "error" in row or row.get("passed") is False


def format_row(name: str, row: Row) -> str:
    """Returns a row as a line of text."""
    if "error" in row:
        return f"{name}: FAILED: {row['error']}"
    parts = [f"{key} {_format(value)}" for key, value in row.items() if key != "passed"]
    verdict = {True: "passed", False: "FAILED", None: ""}[row.get("passed")]
    return f"{name}: {', '.join(filter(None, [verdict, *parts]))}"


def _format(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_format(each)}" for key, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
