"""Finds plans for the generations of a model, or of a pipeline: known ones, or from a recording."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from pabc.automatic.check import NOISY, TRANSITIONS
from pabc.automatic.ends import reaches_end
from pabc.automatic.kinds import Kinds
from pabc.automatic.plans import AutoPlan, Kind, PlannedCall
from pabc.automatic.runs import SEED, ReplayedRuns
from pabc.automatic.store import Store
from pabc.calibration.calibration import Calibration
from pabc.calibration.choice import Choice
from pabc.calibration.hearing import HeardGeneration, Hearing, name_call
from pabc.calibration.target import Target
from pabc.calibration.updates import identify
from pabc.compiled import CompiledModel
from pabc.runtime.timesteps import ArgPath

logger = logging.getLogger(__name__)

FEWEST = 4
"""The steps of a generation below which there is nothing to plan."""
_NONE = "no generation of this kind is recorded yet, all steps are computed"
_MOST_UNENDED = 16
"""Generations that seem to have been left before their end, and are remembered."""
_MOST_REFUSALS = 3
"""Generations that could not be planned, after which none is recorded any more."""


class Planner:
    """Finds and makes plans for one model, or the models of one pipeline. Thread-safe."""

    def __init__(
        self,
        target: Target,
        floor: float,
        candidates: int,
        models: Mapping[str, CompiledModel],
        store: Store | None,
    ) -> None:
        self.target, self.models = target, tuple(models.values())
        self._floor, self._candidates, self._store = floor, candidates, store
        self._kinds = Kinds({n: m._orig_mod for n, m in models.items()})
        self._plans: list[AutoPlan] | None = None
        self._note = _NONE
        self.record()
        self._lock = threading.RLock()
        self._doubted: AutoPlan | None = None
        self._latest: AutoPlan | None = None
        self._refusals = 0
        self._unended: list[Kind] = []

    def kind(self, leaves: Sequence[Any], sampler: str, timesteps: Sequence[float]) -> Kind:
        """Returns what is known of a generation that begins with a call with these arguments."""
        with self._lock:
            return self._kinds.of(leaves, sampler, timesteps)

    def begin_recording(self, kind: Kind) -> Kind:
        """Says that a generation is recorded, and why; returns its kind, with the weights read."""
        self.record()
        with self._lock:
            return self._kinds.read_again(kind)

    def find(self, kind: Kind, num_steps: int | None = None) -> AutoPlan | None:
        """Returns the plan for a generation that begins like this; None: it is to be recorded.

        `num_steps`: of the generation; None: not known, as its first timestep alone is.
        A plan that was recorded with other weights or shapes will do; its remark says so. Of
        several, the one with the fewest differences, and of these the latest, is taken.
        """
        with self._lock:
            if self._plans is None:
                self._plans = self._load(kind.family)
            known = [
                plan
                for plan in self._plans
                if plan.suits(kind) and num_steps in (None, len(plan.kind.timesteps))
            ]
            if not known:
                return None
            least = min(plan.distance(kind) for plan in known)
            plan = [each for each in known if each.distance(kind) == least][-1]
            if self._doubted is not None and plan.is_like(self._doubted):
                return None
            plan = plan.adopt(kind)
            self.take(plan)
            return plan

    @property
    def latest(self) -> AutoPlan | None:
        """The plan that was made, or taken, last; None: there is none yet."""
        return self._latest

    @property
    def has_given_up(self) -> bool:
        """True if nothing is recorded any more, since nothing could be planned."""
        return self._refusals >= _MOST_REFUSALS

    def explain(self, reason: str) -> None:
        """Says why nothing is planned so far."""
        self._note = f"all steps are computed, since {reason}"
        self.record()

    def refuse(self, reason: str) -> None:
        """Says why a generation cannot be planned."""
        self._refusals += 1
        self.explain(reason)
        if self._refusals == 1:
            warnings.warn(f"pabc.auto: all steps are computed, since {reason}", stacklevel=2)

    def others(self, plan: AutoPlan) -> list[AutoPlan]:
        """Returns other plans of the same models and scheduler, the latest first."""
        with self._lock:
            known = reversed(self._plans or [])
            return [each for each in known if each is not plan and each.is_related(plan)]

    def take(self, plan: AutoPlan) -> None:
        """Says that a generation follows a plan."""
        self._latest = plan
        self._describe(str(plan))

    def record(self) -> None:
        """Says that a generation is computed, to be recorded, and why."""
        self._describe(f"{self.target}: {self._note}")

    def record_rest(self, kind: Kind, reason: str) -> Kind:
        """Says that a generation leaves its plan, and is recorded; returns its kind, as
        `begin_recording` does."""
        kind = self.begin_recording(kind)
        text = f"{reason}; this generation is computed and recorded"
        logger.info("pabc.auto: %s", text)
        self._describe(text)
        return kind

    def doubt(self, plan: AutoPlan, reason: str) -> None:
        """Says that a generation left its plan; the next one like it is recorded anew."""
        text = f"{reason}; the rest of this generation is computed, and the next one recorded"
        logger.warning("pabc.auto: %s", text)
        self._describe(text)
        with self._lock:
            self._doubted = plan

    def learn(
        self,
        hearing: Hearing,
        kind: Kind,
        calls: Sequence[PlannedCall],
        path: ArgPath | None = None,
        *,
        left: float = 0.0,
        is_whole: bool = True,
    ) -> None:
        """Makes the plan for generations like one that was recorded.

        Args:
            hearing, kind, calls, path: the generation.
            left: by how much its latents differed from what the sampler of another plan makes,
                which it began to follow; 0: it followed none.
            is_whole: whether it is known to have come to its end. If not, and its last step leaves
                noise, it is planned only once another one has ended at the same step.
        """
        n = hearing.num_steps
        if n < FEWEST:
            steps = "1 step" if n == 1 else f"{n} steps"
            self.explain(
                f"the generation before had {steps}: there is nothing to skip in fewer than "
                f"{FEWEST}"
            )
            return
        start = perf_counter()
        nbytes = hearing.nbytes
        try:
            heard = hearing.finish(kind.timesteps)
        except ValueError as error:
            self.refuse(str(error))
            return
        with self._lock:
            try:
                if not is_whole and not self._ends(heard, kind):
                    return
                plan = self._make(heard, kind, calls, path)
            except Exception as error:  # the generation itself is done, and its result is not lost
                logger.info("pabc.auto: no plan could be made", exc_info=True)
                self.refuse(f"no plan could be made: {error}")
                return
            if plan is None:
                return
            self._doubted, self._note = None, _NONE
            replaced = [p for p in self._plans or () if p.is_replaced_by(plan)]
            known = next((p for p in replaced if p.is_like(plan)), None)
            if left and known is not None:
                if float(plan.calibration.updates.residual[:TRANSITIONS].max()) > NOISY:
                    return  # of a known sampler, but something else has changed the latents
                plan = replace(plan, slack=max(known.slack, 1.5 * left))
            self._plans = [p for p in self._plans or [] if p not in replaced] + [plan]
            self._latest = plan
            self._describe(str(plan), recorded=1)
            logger.info(
                "pabc.auto: %s; planned in %.1f s, %d bytes were kept for it",
                plan,
                perf_counter() - start,
                nbytes,
            )
            if self._store is not None:
                self._store.save(plan, replaced)

    def _ends(self, heard: HeardGeneration, kind: Kind) -> bool:
        """Returns whether a generation came to its end, by its last steps, or by one before it."""
        n = len(kind.timesteps)
        if any(len(e.timesteps) == n and e.is_start_of(kind) for e in self._unended):
            return True
        if reaches_end(kind.timesteps, identify(heard.recording)):
            return True
        self._unended = [*self._unended[1 - _MOST_UNENDED :], kind]
        self.explain(
            f"the generation before ended with noise left, at timestep {kind.timesteps[-1]:g}; it "
            "is planned once another one ends there"
        )
        return False

    def _drop(self, change: str) -> None:
        """Says that a recording is of no use, since the model has changed."""
        self.explain(
            f"the model changed after the generation before was recorded: {change}; where it is to "
            "change after a generation, call fast.reset() first"
        )
        logger.warning("pabc.auto: %s", self._note)

    def _make(
        self,
        heard: HeardGeneration,
        kind: Kind,
        calls: Sequence[PlannedCall],
        path: ArgPath | None,
    ) -> AutoPlan | None:
        runs = ReplayedRuns(heard, self.models, {_spell(c): c for c in calls})
        if not runs.can_run:
            self.refuse("arguments of its calls were written to after them")
            return None
        change = runs.find_change()
        if change is not None:
            self._drop(change)
            return None
        choice = Choice(heard.recording, runs, limit=self._candidates, floor=self._floor)
        chosen = choice.meet(self.target)
        costs = runs.costs
        calibration = Calibration(
            heard.recording,
            tuple(runs.measured),
            costs.full,
            costs.skipped,
            ((self.target, chosen),),
            self._floor,
            (SEED,),
        )
        rest = runs.residual
        if rest > NOISY:
            warnings.warn(
                f"pabc.auto: up to {rest:.0%} of what the sampler does does not follow from the "
                "model's outputs: it adds noise, clips, or rescales its guidance. The fidelity of "
                "plans is estimated without that; pabc.calibrate measures it",
                stacklevel=2,
            )
        return AutoPlan(
            kind,
            calibration,
            calibration.schedule(),
            tuple(calls),
            path,
            heard.streams,
            heard.parts,
        )

    def _load(self, family: str) -> list[AutoPlan]:
        known = [] if self._store is None else self._store.load(family)
        return [plan for plan in known if plan.target == self.target and self._is_above(plan)]

    def _is_above(self, plan: AutoPlan) -> bool:
        """Returns whether a plan was chosen with this floor, or is known to be above it."""
        found = plan.measured
        return plan.calibration.floor == self._floor or (found is not None and found >= self._floor)

    def _describe(self, text: str, **counts: int) -> None:
        for model in self.models:
            model.describe_plan(text, **counts)


def _spell(call: PlannedCall) -> str:
    return name_call(call.name, call.order)
