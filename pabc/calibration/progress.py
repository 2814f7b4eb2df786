"""Shows how far a calibration is: by tqdm where it is installed, else a line a generation."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts generations, on stderr.

    With tqdm there is one bar, whose total grows as work turns up; without it, a line for each
    generation that is done.
    """

    def __init__(self, shown: bool = True) -> None:
        self._bar: Any = None
        self._shown = shown
        self._done = self._total = 0

    def expect(self, generations: int) -> None:
        """States that so many more generations will be run."""
        self._total += generations
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def begin(self, what: str) -> None:
        """States what the next generation is for."""
        if self._bar is not None:
            self._bar.set_description(what)

    def finish(self, what: str) -> None:
        """Counts a generation, and says what came of it."""
        self._done += 1
        if self._done > self._total:
            self.expect(self._done - self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(what)
            self._bar.update()
        elif self._shown:
            print(f"pabc: {self._done}/{self._total}: {what}", file=sys.stderr)

    def drop(self, generations: int) -> None:
        """States that so many of the expected generations are not needed."""
        self.expect(-generations)

    def __enter__(self) -> Progress:
        if self._shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return self
            self._bar = tqdm(unit="generation", desc="pabc", file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
