"""Tells schedules that only skip whole calls, for which a model need not be captured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pabc.plan import SlotSpec
from pabc.schedule import Schedule

WHOLE_CALL = SlotSpec("model", "model", 0)
"""The slot of a model that is called as it is; its bytes are not known yet."""


def names_only_calls(schedule: Schedule) -> bool:
    """Returns whether a schedule reuses nothing but whole calls."""
    return not _other_kinds(schedule)


def check_kinds(schedule: Schedule, reason: str = "") -> None:
    """Raises ValueError for a schedule that reuses anything but whole calls.

    `reason`: why the model is called as it is, if that was not asked for.
    """
    others = _other_kinds(schedule)
    if others:
        why = f"since {reason}" if reason else "and nothing within it is captured"
        raise ValueError(
            f"schedule: expected only kind {WHOLE_CALL.kind!r} with backend='original', found "
            f"{', '.join(others)}: the model is called as it is, {why}"
        )


def advise_on(unmatched: Collection[str]) -> str:
    """Returns what helps where nothing matches these kinds and overrides of a schedule."""
    if f"kind {WHOLE_CALL.kind!r}" not in unmatched:
        return ""
    return "; backend='original' skips calls of any model"


def find_obstacle(slots: Sequence[SlotSpec], left_out: Sequence[str]) -> str | None:
    """Returns why a captured model cannot skip whole calls; None: it can.

    `left_out`: a message for each coarser region that cannot be reused, with the reason.
    """
    kind = WHOLE_CALL.kind
    if any(slot.kind == kind for slot in slots):
        return None
    reasons = [line.removeprefix(f"{kind}: ") for line in left_out if line.startswith(kind)]
    return f"its graph cannot be skipped as a whole: {'; '.join(reasons) or 'it has no outputs'}"


def advise(error: ValueError, schedule: Schedule) -> ValueError | None:
    """Returns the error of a model that cannot be captured, with what helps; None if nothing does:
    the schedule needs what is within the model."""
    if not (schedule.reuses and names_only_calls(schedule)):
        return None
    return ValueError(
        f"{error}; or use backend='original', which captures nothing: the schedule only skips "
        "whole calls"
    )


def _other_kinds(schedule: Schedule) -> list[str]:
    kinds = [f"kind {kind!r}" for kind in schedule.masks if kind != WHOLE_CALL.kind]
    wanted = [o for o in schedule.overrides if any(o.mask)]
    return kinds + [str(o) for o in wanted if not o.matches(WHOLE_CALL)]
