"""Plans with nested slots and forecasts, against a simulation by hand."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pabc.plan import Action, Plan, SlotSpec

NESTED = (
    SlotSpec("a", "spatial", 0, 3, ("block.0", "stack", "model")),
    SlotSpec("b", "mlp", 0, 5, ("block.0", "stack", "model")),
    SlotSpec("c", "spatial", 1, 3, ("block.1", "stack", "model")),
    SlotSpec("d", "other", 0, 7, ("model",)),
    SlotSpec("block.0", "block", 0, 11, ("stack", "model")),
    SlotSpec("block.1", "block", 1, 11, ("stack", "model")),
    SlotSpec("stack", "stack", 0, 13, ("model",)),
    SlotSpec("model", "model", 0, 17),
)
POINTS = {"hold": 1, "linear": 2, "quadratic": 3}


@dataclass(frozen=True)
class Case:
    """What a plan is made from."""

    timesteps: tuple[int, ...]
    reuse: np.ndarray
    forecasts: tuple[object, ...]
    units: str

    def plan(self) -> Plan:
        return Plan.from_reuse(self.timesteps, NESTED, self.reuse, self.forecasts, self.units)

    def covered(self, step: int, slot: int) -> bool:
        outer = [j for j, other in enumerate(NESTED) if other.name in NESTED[slot].outer]
        return bool(self.reuse[step, outer].any())

    def reads(self, step: int, slot: int) -> bool:
        return bool(self.reuse[step, slot]) and not self.covered(step, slot)

    def computed(self, step: int, slot: int) -> list[int]:
        """The steps before this one that compute a slot, newest first."""
        return [
            s
            for s in range(step - 1, -1, -1)
            if not self.reuse[s, slot] and not self.covered(s, slot)
        ]

    def history(self, step: int, slot: int) -> tuple[int, ...]:
        forecast = self.forecasts[slot]
        count = POINTS[forecast] if isinstance(forecast, str) else len(forecast[step])
        return tuple(self.computed(step, slot)[:count])

    def weights(self, step: int, slot: int) -> tuple[float, ...]:
        forecast = self.forecasts[slot]
        if not isinstance(forecast, str):
            return forecast[step]
        at = range(len(self.timesteps)) if self.units == "step" else self.timesteps
        sources = self.history(step, slot)
        return tuple(
            math.prod((at[step] - at[m]) / (at[s] - at[m]) for m in sources if m != s)
            for s in sources
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_steps = draw(st.integers(1, 12))
    cells = st.lists(st.sampled_from([True, False, False]), min_size=8, max_size=8)
    rows = draw(st.lists(cells, min_size=num_steps - 1, max_size=num_steps - 1))
    reuse = np.array([[False] * 8, *rows], dtype=bool)
    timesteps = tuple(draw(st.permutations(range(0, 10 * num_steps, 10))))
    bare = Case(timesteps, reuse, ("hold",) * 8, "step")
    forecasts = tuple(draw(forecast(bare, slot)) for slot in range(8))
    return Case(timesteps, reuse, forecasts, draw(st.sampled_from(["step", "timestep"])))


def forecast(case: Case, slot: int) -> st.SearchStrategy[object]:
    """A rule, or rows of up to three weights, no more than values are stored."""
    weight = st.sampled_from([-1.5, 0.25, 1.0, 3.0])
    rows = st.tuples(
        *(
            st.lists(
                weight, min_size=1, max_size=max(1, min(3, len(case.computed(step, slot))))
            ).map(tuple)
            for step in range(len(case.timesteps))
        )
    )
    return st.one_of(st.sampled_from(list(POINTS)), rows)


@dataclass
class Kept:
    """The steps whose values are kept of one slot, and those that were read."""

    steps: set[int] = field(default_factory=set)
    unread: set[int] = field(default_factory=set)


@settings(deadline=None)
@given(cases())
def test_a_plan_runs_in_a_simulator_that_keeps_only_what_it_says(case):
    """A read finds the last computed values; covered slots are left alone; nothing is kept longer
    than until its last read."""
    plan, kept = case.plan(), [Kept() for _ in NESTED]
    for step in range(plan.num_steps):
        for slot, held in enumerate(kept):
            action = plan.actions[step, slot]
            assert (action == Action.COVERED) == case.covered(step, slot)
            assert (action == Action.REUSE) == case.reads(step, slot)
            sources = plan.history(step, slot)
            assert plan.sources[step, slot] == (sources[0] if sources else -1)
            if action == Action.REUSE:
                assert sources == case.history(step, slot)
                assert held.steps.issuperset(sources)
                held.unread -= set(sources)
                assert plan.weights(step, slot) == pytest.approx(case.weights(step, slot))
                continue
            assert sources == plan.weights(step, slot) == ()
            if action == Action.STORE:
                held.steps.add(step)
                held.unread.add(step)
        assert plan.num_kept[step].tolist() == [len(held.steps) for held in kept]
        assert plan.bytes_at[step] == sum(
            slot.nbytes * len(held.steps) for slot, held in zip(NESTED, kept, strict=True)
        )
        for slot, held in enumerate(kept):
            dead = {source for source in held.steps if plan.until[source, slot] == step}
            assert not dead & held.unread, "freed before it is read"
            assert (slot in plan.frees[step]) == bool(dead)
            held.steps -= dead
    assert not any(held.steps for held in kept)
    assert plan.peak_bytes == plan.bytes_at.max()


@settings(deadline=None)
@given(cases())
def test_a_value_may_be_read_while_it_is_among_the_newest(case):
    """`until` holds for any step that computes, planned or not."""
    plan = case.plan()
    for slot in range(len(NESTED)):
        readers = [r for r in range(plan.num_steps) if case.reads(r, slot)]
        for step in range(plan.num_steps):
            last = -1
            for reader in readers:
                between = [s for s in case.computed(reader, slot) if s > step]
                if reader > step and len(between) < len(case.history(reader, slot)):
                    last = reader
            assert plan.until[step, slot] == last


@settings(deadline=None)
@given(cases())
def test_depths_are_those_of_the_deepest_reading(case):
    plan = case.plan()
    for slot, depth in enumerate(plan.depths):
        steps = [s for s in range(plan.num_steps) if case.reads(s, slot)]
        holds = all(plan.weights(step, slot) == (1.0,) for step in steps)
        expected = 0 if holds else max(len(case.history(step, slot)) for step in steps)
        assert depth == expected
        assert not holds or plan.forecasts[slot] == "hold"


@settings(deadline=None)
@given(cases())
def test_phases_are_the_sets_that_are_really_reused(case):
    plan = case.plan()
    sets = [
        tuple(slot for slot in range(len(NESTED)) if case.reads(step, slot))
        for step in range(plan.num_steps)
    ]
    assert [phase.reused for phase in plan.phases] == list(dict.fromkeys(sets))
    assert [plan.phases[i].reused for i in plan.phase_of_step] == sets


@settings(deadline=None)
@given(cases())
def test_round_trips(case):
    plan = case.plan()
    same = Plan.from_reuse(case.timesteps, NESTED, plan.reuse, plan.forecasts, plan.units)
    for copied in (
        same,
        Plan.from_json(plan.to_json()),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
    ):
        assert copied == plan
        assert hash(copied) == hash(plan)
        assert copied.digest() == plan.digest()
        assert (copied.frees, copied.phases) == (plan.frees, plan.phases)
        assert (copied.depths, copied._readings) == (plan.depths, plan._readings)
        assert np.array_equal(copied.until, plan.until)


@settings(deadline=None)
@given(cases(), st.data())
def test_weights_for_other_sources(case, data):
    """Rules have weights for any steps, fitted weights for the planned ones alone."""
    plan = case.plan()
    readings = [
        (step, slot)
        for step in range(plan.num_steps)
        for slot in range(len(NESTED))
        if plan.reuse[step, slot]
    ]
    for step, slot in readings:
        planned, weights = plan.history(step, slot), plan.weights(step, slot)
        assert plan.weigh(step, slot, planned) == weights
        some = data.draw(st.lists(st.integers(0, step - 1), min_size=1, max_size=3, unique=True))
        sources = tuple(sorted(some, reverse=True))
        found, rule = plan.weigh(step, slot, sources), plan.forecasts[slot]
        if not isinstance(rule, str):
            assert (found is None) == (sources[: len(planned)] != planned)
        else:
            at = range(plan.num_steps) if plan.units == "step" else plan.timesteps
            assert len(found) == len(sources)
            assert found[POINTS[rule] :] == (0.0,) * (len(sources) - POINTS[rule])
            assert sum(found) == pytest.approx(1)
            if rule != "hold" and len(sources) > 1:
                line = sum(w * at[s] for w, s in zip(found, sources, strict=True))
                assert line == pytest.approx(at[step], abs=1e-6)


@settings(deadline=None)
@given(cases(), st.sets(st.integers(0, 7)))
def test_without_some_slots_given_weights_are_for_the_values_that_they_were_for(case, slots):
    plan = case.plan()
    less = plan.without(slots)
    assert not less.reuse[:, list(slots)].any()
    assert not (less.reuse & ~plan.reuse).any()
    assert not (plan.computed & ~less.computed).any()
    for slot, forecast in enumerate(plan.forecasts):
        for step in np.nonzero(less.reuse[:, slot])[0]:
            same = less.history(step, slot) == plan.history(step, slot)
            assert same or isinstance(forecast, str)
    assert plan.without(()) == plan


def test_without_a_coarse_slot_what_it_contains_is_computed_there():
    slots = [SlotSpec("a", "mlp", 0, 1, ("m",)), SlotSpec("m", "model", 0, 1)]
    reuse = [[False] * 2, [False] * 2, [False, True], [True, False]]
    rows = ((), (), (), (3.0, -2.0))
    held = Plan.from_reuse((4, 3, 2, 1), slots, reuse, ["linear", "hold"])
    assert held.without([1]).history(3, 0) == (2, 1)
    fitted = Plan.from_reuse((4, 3, 2, 1), slots, reuse, [rows, "hold"])
    assert fitted.history(3, 0) == (1, 0)
    assert not fitted.without([1]).reuse.any()


def chain(column: str, forecast: object = "linear", units: str = "step") -> Plan:
    """A plan of one slot, `.` where it reuses."""
    reuse = np.array([[symbol == "."] for symbol in column])
    timesteps = range(len(column) * 10, 0, -10)
    return Plan.from_reuse(timesteps, [SlotSpec("m", "model", 0, 4)], reuse, [forecast], units)


def test_a_line_is_of_lower_order_while_one_value_is_stored():
    plan = chain("#.#..#.")
    assert [plan.history(step, 0) for step in (1, 3, 4, 6)] == [(0,), (2, 0), (2, 0), (5, 2)]
    assert plan.weights(1, 0) == (1.0,)
    assert plan.weights(3, 0) == (1.5, -0.5)
    assert plan.weights(4, 0) == (2.0, -1.0)
    assert plan.weights(6, 0) == (4 / 3, -1 / 3)
    assert plan.depths == (2,)
    assert plan.until[:, 0].tolist() == [4, 4, 6, 6, 6, 6, -1]
    assert plan.frees == ((), (), (), (), (0,), (), (0,))
    assert plan.bytes_at.tolist() == [4, 4, 8, 8, 8, 8, 8]
    assert plan.num_model_calls == 3


def test_a_parabola_over_timesteps():
    plan = Plan.from_reuse(
        (9, 7, 3, 2),
        [SlotSpec("m", "model", 0)],
        [[False]] * 3 + [[True]],
        ["quadratic"],
        "timestep",
    )
    assert plan.units == "timestep"
    assert plan.history(3, 0) == (2, 1, 0)
    assert plan.weights(3, 0) == pytest.approx((35 / 24, -7 / 8, 5 / 12))


def test_a_plan_whose_reuses_all_hold_is_that_of_hold():
    assert chain("#...") == chain("#...", "hold") == chain("#...", "linear", "timestep")
    assert chain("#.#.", [[9], [1], [9], [1, 0]]) == chain("#.#.", "hold")
    assert chain("#.#.") != chain("#.#.", "hold")
    assert chain("#.#.").digest() != chain("#.#.", "hold").digest()
    assert chain("#.#.").digest() != chain("#.#.", "linear", "timestep").digest()


def test_one_weight_that_is_not_1_has_depth_1():
    assert chain("#.", [[0], [0.5]]).depths == (1,)


def test_what_is_covered_is_neither_computed_nor_read():
    reuse = np.zeros((5, 8), dtype=bool)
    reuse[[1, 2, 4], 0] = True  # a
    reuse[[1], 4] = True  # block.0
    reuse[[3], 7] = True  # model
    plan = Plan.from_reuse(range(5, 0, -1), NESTED, reuse)
    assert str(plan).splitlines() == [
        "plan: 5 steps, t = 5 to 1, 8 slots; # compute, + compute and store, . reuse, - covered",
        "  spatial 0  +-.-.",
        "  mlp        #-#-#",
        "  spatial 1  ###-#",
        "  other      ###-#",
        "  block 0    +.#-#",
        "  block 1    ###-#",
        "  stack      ###-#",
        "  model      ##+.#",
        "  phase      01232",
        "  4 phases; reused: spatial 20%, mlp 0%, other 0%, block 10%, stack 0%, model 20%; "
        "peak 20 B",
    ]
    assert plan.computed[:, 0].tolist() == [True, False, False, False, False]


OLD = """{
 "pabc": "plan",
 "version": 1,
 "timesteps": [900.0, 800.0, 700.5, 600.0, 500.0],
 "slots": [
  {"name": "a", "kind": "spatial", "layer": 0, "nbytes": 8, "actions": "+.+.#"},
  {"name": "b", "kind": "mlp", "layer": 0, "nbytes": 4, "actions": "+..+."},
  {"name": "c", "kind": "mlp", "layer": 1, "nbytes": 4, "actions": "+.+.#"}
 ]
}"""


def test_a_file_of_an_older_version_loads():
    plan = Plan.from_json(OLD)
    assert plan.depths == (0, 0, 0)
    assert plan.digest() == "4a9d26e9e4e565b832c7f7870f7b1ddd9c318241a4a2452e618849ebce291d11"
    assert "forecast" not in plan.to_json()
    assert "outer" not in plan.to_json()


def test_a_file_says_sources_and_weights():
    plan = chain("#.#..")
    assert '"actions": "+.+~~"' in plan.to_json()
    assert plan._slot_content(0) == {
        "name": "m",
        "kind": "model",
        "layer": 0,
        "nbytes": 4,
        "actions": "+.+~~",
        "forecast": "linear",
        "sources": [[0], [2, 0], [2, 0]],
        "weights": [[1.0], [1.5, -0.5], [2.0, -1.0]],
    }
    assert "units" not in plan.to_json()
    assert '"units": "timestep"' in chain("#.#..", "linear", "timestep").to_json()


def changed(plan: Plan, **fields: object) -> str:
    """The file of a plan of one slot with other fields; None: without it."""
    content = json.loads(plan.to_json())
    slot = {**content["slots"][-1], **fields}
    content["slots"][-1] = {name: value for name, value in slot.items() if value is not None}
    return json.dumps(content)


LINE = chain("#.#..")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sources": [[0], [2, 3], [2, 0]]},
            "slot 'm', step 3: expected sources to be earlier steps, found 3",
        ),
        (
            {"sources": [[0], [2, -1], [2, 0]]},
            "slot 'm', step 3: expected sources to be earlier steps, found -1",
        ),
        (
            {"sources": [[0], [2, True], [2, 0]]},
            "slot 'm', step 3: expected sources to be earlier steps, found True",
        ),
        (
            {"sources": [[0], [2, 1], [2, 0]]},
            "slot 'm', step 3: expected sources that compute the slot, found step 1, which reuses"
            " the slot itself",
        ),
        (
            {"sources": [[0, 0], [2, 0], [2, 0]]},
            "slot 'm', step 1: expected at most 1 sources, as many values are stored by then, and"
            " at least 1, found 2",
        ),
        (
            {"sources": [[], [2, 0], [2, 0]]},
            "slot 'm', step 1: expected at most 1 sources, as many values are stored by then, and"
            " at least 1, found 0",
        ),
        (
            {"sources": [[0], [0, 2], [2, 0]]},
            "slot 'm', step 3: expected the last computed steps as sources, [2, 0], found [0, 2]",
        ),
        (
            {"sources": [[0], [2], [2, 0]], "weights": [[1], [1], [2, -1]]},
            "slot 'm', step 3: expected sources [2, 0], found [2]",
        ),
        (
            {"weights": [[1], [1.5, -0.25], [2, -1]]},
            "slot 'm', step 3: expected weights [1.5, -0.5], found [1.5, -0.25]",
        ),
        (
            {"weights": [[1], [1.5, "a"], [2, -1]]},
            "slot 'm', step 3: expected weights [1.5, -0.5], found [1.5, 'a']",
        ),
        (
            {"weights": [[1], [1.5], [2, -1]]},
            "slot 'm', step 3: expected a weight per source (2), found 1",
        ),
        (
            {"weights": [[1], [1.5, -0.5]]},
            "slot 'm': expected weights to be a list per step that reuses it (3), found"
            " [[1], [1.5, -0.5]]",
        ),
        ({"sources": 3}, "slot 'm': expected sources to be a list per step that reuses it (3)"),
        (
            {"weights": None},
            "slot 'm': expected forecast, sources, weights together, found no 'weights'",
        ),
        (
            {"forecast": None},
            "slot 'm': expected forecast, sources, weights together, found no 'forecast'",
        ),
        ({"forecast": "cubic"}, "slot 'm', forecast: expected one of hold, linear, quadratic"),
        ({"forecast": "hold"}, "slot 'm', step 3: expected sources [2], found [2, 0]"),
        (
            {"forecast": "weights", "weights": [[1], [float("nan"), 1], [2, -1]]},
            "slot 'm', forecast: expected finite weights, found nan at step 3",
        ),
        (
            {"actions": "+.+.~"},
            "slots[0].actions: expected '+' exactly where a later step reads the value, '~' exactly"
            " where it is reused by a forecast, '+.+~~', found '+.+.~'",
        ),
        ({"outer": ["m"]}, "slot 'm': expected outer to name other slots, found 'm'"),
        ({"outer": ["x"]}, "slot 'm': expected outer to name other slots, found 'x'"),
        ({"outer": "x"}, "slot 'm': expected outer to be names of slots, found 'x'"),
        ({"outer": [3]}, "slot 'm': expected outer to be names of slots, found [3]"),
    ],
)
def test_bad_json_is_named(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Plan.from_json(changed(LINE, **fields))
    assert str(error.value).startswith(message)


def test_a_source_in_json_that_is_covered_is_named():
    slots = [SlotSpec("a", "mlp", 0, 1, ("m",)), SlotSpec("m", "model", 0, 1)]
    reuse = [[False, False], [False, True], [True, False]]
    content = json.loads(Plan.from_reuse((3, 2, 1), slots, reuse, ["hold", "hold"]).to_json())
    fields = {"forecast": "weights", "sources": [[1]], "weights": [[2.0]], "actions": "+-~"}
    content["slots"][0] |= fields
    with pytest.raises(ValueError, match=r"slot 'a', step 2: .* found step 1, which is covered"):
        Plan.from_json(json.dumps(content))
    content["slots"][0]["sources"] = [[0]]
    assert Plan.from_json(json.dumps(content)).weights(2, 0) == (2.0,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: chain("#..", [[1], [1], [1, 0, 1]]),
            "forecast of 'model': expected at most 1 weights at step 2, as many values are stored"
            " by then, found 3",
        ),
        (
            lambda: chain("#..", [[1], [], [1]]),
            "forecast of 'model': expected 1 weight or more at step 1, found none",
        ),
        (
            lambda: chain("#..", [[1], [1]]),
            "forecast of 'm': expected one row of weights per step (3), found 2",
        ),
        (
            lambda: Plan.from_reuse(
                (9, 9, 8),
                [SlotSpec("m", "model", 0)],
                [[False], [False], [True]],
                ["linear"],
                "timestep",
            ),
            "forecast of 'model': expected different timesteps for 'linear' at step 2, found 9, 9"
            " at steps 1, 0; units='step' goes over the steps instead",
        ),
        (
            lambda: chain("#.", "linear", "steps"),
            "units: expected one of ('step', 'timestep'), found 'steps'",
        ),
        (
            lambda: Plan.from_reuse([1], [SlotSpec("m", "mlp", 0)], [[False]], []),
            "forecasts: expected one per slot (1), found 0",
        ),
        (
            lambda: Plan.from_reuse(
                [1],
                [
                    SlotSpec("a", "mlp", 0, 0, ("s",)),
                    SlotSpec("s", "stack", 0, 0, ("m",)),
                    SlotSpec("m", "model", 0),
                ],
                [[False] * 3],
            ),
            "slot 'a': expected outer to name all slots that contain it, found 's' without 'm',"
            " which contains that",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message


def test_equal_timesteps_matter_only_where_they_are_read():
    slots, reuse = [SlotSpec("m", "model", 0)], [[False], [False], [False], [True]]
    plan = Plan.from_reuse((9, 9, 8, 7), slots, reuse, ["linear"], "timestep")
    assert plan.weights(3, 0) == (2.0, -1.0)
    assert plan.weigh(3, 0, (1, 0)) is None, "the runtime computes such a step"
