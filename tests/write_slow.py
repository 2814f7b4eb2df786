"""Writes `slow.txt`, the tests that `-m "not slow"` leaves out, from how long each took.

    .ci/run --durations=0 --durations-min=0.05 | tee run.log
    python tests/write_slow.py run.log

A test is slow if it takes about a second, or several seconds with all of its parameters.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

LIST = Path(__file__).with_name("slow.txt")
LONGEST = 1.0
"""Seconds of the slowest parameters of a test that is not slow; 0.6 of this in the mean."""
TOTAL = 6.0
"""Seconds of all parameters of a test that is not slow."""
_ROW = re.compile(r"^([\d.]+)s (?:call|setup|teardown)\s+(\S+::\S.*)$", re.MULTILINE)


def find_slow(log: str) -> list[str]:
    """Returns the names of the slow tests, without their parameters, in order."""
    seconds: dict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for taken, name in _ROW.findall(log):
        seconds[name.partition("[")[0]][name] += float(taken)
    return sorted(name for name, each in seconds.items() if _is_slow([*each.values()]))


def _is_slow(seconds: list[float]) -> bool:
    total = sum(seconds)
    return total >= TOTAL or max(seconds) >= LONGEST <= total / len(seconds) / 0.6


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}\n" for name in find_slow(Path(sys.argv[1]).read_text())))
