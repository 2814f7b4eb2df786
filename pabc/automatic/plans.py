"""The plan of one kind of generation, and the facts by which later ones are known to be alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pabc.calibration.calibration import Calibration
from pabc.calibration.hearing import Stream
from pabc.calibration.target import Target
from pabc.runtime.timesteps import ArgPath
from pabc.schedule import Schedule


class PlannedCall(NamedTuple):
    """A call that a generation makes.

    Attributes:
        step: the step that it is.
        name: its name; None: it has none.
        order: its index among the calls of this name in the step.
    """

    step: int
    name: str | None
    order: int


@dataclass(frozen=True)
class Kind:
    """The facts that are known of a generation.

    Attributes:
        family: a digest of the models, but for weights.
        weights: a digest of the weights.
        form: shapes and dtypes of the arguments of its first call.
        sampler: a digest of the scheduler's settings; empty: not known.
        timesteps: of its steps; before its end, those that are known: the first, or all.
        precision: the dtypes of the arguments of its first call, and the autocast around it.
    """

    family: str
    weights: str
    form: str
    sampler: str
    timesteps: tuple[float, ...]
    precision: str

    def is_related(self, other: Kind) -> bool:
        """Returns whether both are of the same models, precision and settings of the scheduler."""
        mine, theirs = self, other
        return (mine.family, mine.sampler, mine.precision) == (
            theirs.family,
            theirs.sampler,
            theirs.precision,
        )

    def is_start_of(self, other: Kind) -> bool:
        """Returns whether all its timesteps are the first ones of `other`."""
        steps = other.timesteps[: len(self.timesteps)]
        return self.is_related(other) and _are_close(self.timesteps, steps)


@dataclass(frozen=True, eq=False)
class AutoPlan:
    """The plan of one kind of generation.

    Attributes:
        kind: the facts of the generation that was recorded.
        calibration: its recording, and the plans that were run on it.
        schedule: what generations of this kind follow.
        calls: those of a generation, in order.
        path: the argument that is the timestep; None: none was found.
        streams, parts: where the latents are among the arguments; see :class:`HeardGeneration`.
        origin: where the recording was made, for people.
        remark: in what it differs from the generations that follow it, for people.
        slack: the relative difference of latents from what the recorded sampler makes that was seen
            with this very sampler.
    """

    kind: Kind
    calibration: Calibration
    schedule: Schedule
    calls: tuple[PlannedCall, ...]
    path: ArgPath | None
    streams: tuple[Stream, ...]
    parts: int
    origin: str = "recorded in this process"
    remark: str = ""
    slack: float = 0.0

    @property
    def target(self) -> Target:
        """The target that was asked for."""
        return self.calibration.plans[0][0]

    @property
    def measured(self) -> float | None:
        """The PSNR in dB with which it was run; None: it computes all steps, or was not run."""
        chosen, measured = self.calibration.chosen, self.calibration.measured
        return next((each.mean for each in measured if each.candidate == chosen), None)

    def suits(self, kind: Kind) -> bool:
        """Returns whether a generation that begins like `kind` may follow this plan."""
        known = len(kind.timesteps)
        return kind.is_start_of(self.kind) and known in (1, len(self.kind.timesteps))

    def is_related(self, other: AutoPlan) -> bool:
        """Returns whether both are for the same models, precision and settings of the scheduler."""
        return self.kind.is_related(other.kind)

    def is_like(self, other: AutoPlan) -> bool:
        """Returns whether generations that one is for may follow the other, by all that is known
        before they begin."""
        return self.suits(other.kind)

    def adopt(self, kind: Kind) -> AutoPlan:
        """Returns the plan for generations of this kind, with a remark on what differs."""
        differing = [
            noun
            for noun, mine, theirs in (
                ("weights", self.kind.weights, kind.weights),
                ("shapes", self.kind.form, kind.form),
            )
            if mine != theirs
        ]
        remark = f", with other {' and '.join(differing)}" if differing else ""
        return replace(self, remark=remark)

    def follow(self, timesteps: tuple[float, ...]) -> Schedule:
        """Returns the schedule for a loop that spells the timesteps like this."""
        return replace(self.schedule, timesteps=timesteps)

    def distance(self, kind: Kind) -> int:
        """Returns in how much the recorded generation differs from `kind`; 0: in nothing known."""
        return 2 * (self.kind.form != kind.form) + (self.kind.weights != kind.weights)

    def __str__(self) -> str:
        plan, n = self.schedule, self.schedule.num_steps
        skipped = sum(plan.mask("model"))
        found, chosen = self.measured, self.calibration.chosen
        told = "" if found is None else f", {found:.1f} dB when it was run"
        return (
            f"{self.target}: computes {n - skipped} of {n} steps ({chosen.name}{told}); "
            f"{self.origin}{self.remark}"
        )

    def is_replaced_by(self, new: AutoPlan) -> bool:
        """Returns whether this is of generations like those of another plan, or of such that were
        left before their end: kind and sampler."""
        if not self.kind.is_start_of(new.kind) or self.kind.form != new.kind.form:
            return False
        mine, theirs = self.calibration.updates, new.calibration.updates
        if mine.outputs.shape[1:] != theirs.outputs.shape[1:]:
            return False
        return np.allclose(mine.outputs[:3], theirs.outputs[:3], rtol=0.01, atol=1e-6)

    def to_content(self) -> dict[str, Any]:
        """Returns what is known beside the calibration, as plain values."""
        return {
            "kind": asdict(self.kind),
            "calls": self.calls,
            "path": self.path,
            "streams": self.streams,
            "parts": self.parts,
            "slack": self.slack,
        }

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], calibration: Calibration, origin: str
    ) -> AutoPlan:
        """Returns the plan that `to_content` gave, and its calibration."""
        kind = content["kind"]
        calls = tuple(PlannedCall(*call) for call in content["calls"])
        steps = list(dict.fromkeys(call.step for call in calls))
        if steps != list(range(calibration.num_steps)) or not content["streams"]:
            raise ValueError(
                f"calls: expected those of {calibration.num_steps} steps, found {len(steps)} steps"
            )
        return cls(
            Kind(**{**kind, "timesteps": tuple(kind["timesteps"])}),
            calibration,
            calibration.schedule(),
            calls,
            content["path"],
            tuple(Stream(*stream) for stream in content["streams"]),
            content["parts"],
            origin,
            slack=content["slack"],
        )


_FAR = 1e-4
"""The largest distance of two spellings of one timestep, as a share of the largest."""


def _are_close(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    far = _FAR * max(map(abs, mine), default=0)
    return len(mine) == len(theirs) and all(
        abs(a - b) <= far for a, b in zip(mine, theirs, strict=True)
    )
