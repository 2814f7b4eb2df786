"""Schedules that skip whole calls, and forecasts in schedules."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pabc.base.kinds import KINDS
from pabc.plan import SlotSpec
from pabc.schedule import Override, Schedule

STEPS = range(50, 0, -1)
MODEL = SlotSpec("model", "model", 0, 10)


def computed_steps(schedule: Schedule, kind: str = "model") -> list[int]:
    """The steps that do not reuse a kind."""
    return [step for step, reuses in enumerate(schedule.mask(kind)) if not reuses]


def test_half_of_the_calls_are_the_first_and_last_15_percent_and_evenly_between():
    schedule = Schedule.skip(STEPS, 25)
    between = [11, 14, 18, 21, 25, 28, 32, 35, 39]
    assert computed_steps(schedule) == [*range(8), *between, *range(42, 50)]
    assert schedule.label == "skip 25 of 50 model linear"
    assert dict(schedule.forecasts) == {"model": "linear"}


@pytest.mark.parametrize(
    ("num_steps", "count", "steps"),
    [
        (50, 9, [0, 1, 2, 13, 25, 36, 47, 48, 49]),
        (20, 6, [0, 1, 7, 12, 18, 19]),
        (10, 3, [0, 5, 9]),
        (10, 2, [0, 9]),
        (10, 1, [0]),
        (1, 1, [0]),
        (2, 2, [0, 1]),
    ],
)
def test_the_ends_take_a_third_of_the_calls_at_most(num_steps, count, steps):
    assert computed_steps(Schedule.skip(range(num_steps), count)) == steps


@given(st.integers(1, 120).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_a_number_of_steps_is_the_number_that_run(numbers):
    num_steps, count = numbers
    steps = computed_steps(Schedule.skip(range(num_steps), count))
    assert len(steps) == count
    assert steps[0] == 0
    assert count == 1 or steps[-1] == num_steps - 1
    edge = max(1, min(round(0.15 * num_steps), count // 3))
    assert steps[:edge] == list(range(edge))
    inner = steps[edge - 1 : len(steps) - edge + 1]
    gaps = np.diff(inner)
    assert count < 3 or gaps.max() - gaps.min() <= 1


def test_all_steps_computed_is_no_reuse():
    assert Schedule.skip(STEPS, 50) == Schedule.skip(STEPS, range(50)) == Schedule.none(STEPS)


@pytest.mark.parametrize(
    "steps", [[0, 2, 5], (5, 0, 2), {0, 2, 5}, np.array([0, 2, 5]), torch.tensor([0, 2, 5])]
)
def test_steps_are_given_by_their_indices(steps):
    assert computed_steps(Schedule.skip(range(6), steps)) == [0, 2, 5]


@pytest.mark.parametrize("count", [np.int64(2), torch.tensor(2), np.array(2)])
def test_a_number_of_steps_from_arrays(count):
    assert computed_steps(Schedule.skip(range(6), count)) == [0, 5]


def test_several_kinds():
    schedule = Schedule.skip(range(4), [0, 2], kind=("stack", "mlp"), forecast={"stack": "linear"})
    assert computed_steps(schedule, "stack") == computed_steps(schedule, "mlp") == [0, 2]
    assert dict(schedule.forecasts) == {"stack": "linear"}
    assert schedule.label == "skip 2 of 4 stack mlp stack:linear"
    assert Schedule.skip(range(4), 2, label="mine").label == "mine"


def test_the_plan_of_skipped_calls():
    plan = Schedule.skip(STEPS, 25).plan([SlotSpec("a", "mlp", 0, 1, ("model",)), MODEL])
    assert str(plan).splitlines() == [
        "plan: 50 steps, t = 50 to 1, 2 slots; # compute, + compute and store, . reuse,"
        " ~ forecast, - covered",
        "  mlp    ########---#--#---#--#---#--#---#--#---#--########",
        "  model  ######++~~~+~~+~~~+~~+~~~+~~+~~~+~~+~~~+~~########",
        "  phase  00000000111011011101101110110111011011101100000000",
        "  2 phases; reused: mlp 0%, model 50%; peak 20 B",
    ]
    assert plan.num_model_calls == 25
    assert plan.depths == (0, 2)


def test_coarse_slots_that_are_never_reused_are_left_out():
    slots = [
        SlotSpec("a", "mlp", 0, 1, ("block", "stack", "model")),
        SlotSpec("block", "block", 0, 1, ("stack", "model")),
        SlotSpec("stack", "stack", 0, 1, ("model",)),
        MODEL,
    ]
    fine = SlotSpec("a", "mlp", 0, 1)
    assert Schedule.pyramid(STEPS, mlp=2).plan(slots) == Schedule.pyramid(STEPS, mlp=2).plan([fine])
    names = [slot.name for slot in Schedule.skip(STEPS, 25, kind="stack").plan(slots).slots]
    assert names == ["a", "stack"]
    overridden = Schedule.none(STEPS).override(name="bl*", every=2).plan(slots)
    assert [slot.name for slot in overridden.slots] == ["a", "block"]
    assert overridden.slots[0].outer == ("block",)


# ---- forecasts ----


def test_a_pyramid_with_forecasts():
    schedule = Schedule.pyramid(STEPS, spatial=2, mlp=3, model=1, forecast="linear")
    assert dict(schedule.forecasts) == dict.fromkeys(("spatial", "mlp", "model"), "linear")
    assert schedule.label == "pyramid spatial=2 mlp=3 model=1 forecast=linear"
    mixed = Schedule.pyramid(STEPS, spatial=2, mlp=3, forecast={"mlp": "quadratic"})
    assert dict(mixed.forecasts) == {"mlp": "quadratic"}
    assert mixed.label == "pyramid spatial=2 mlp=3 forecast=mlp:quadratic"


def test_what_has_no_effect_makes_no_difference():
    plain = Schedule.pyramid(range(4), mlp=2)
    ones = [[1, 0]] * 4
    for same in (
        Schedule.pyramid(range(4), mlp=2, forecast="hold"),
        Schedule.pyramid(range(4), mlp=2, spatial=1, forecast={"spatial": "linear"}),
        Schedule.pyramid(range(4), mlp=2, forecast={"mlp": "hold"}, units="timestep"),
        Schedule.pyramid(range(4), mlp=2, forecast=ones),
        Schedule.pyramid(range(4), mlp=2, forecast=[[9, 9], [1, 0], [2, 0], [1, 0]]),
        Schedule.from_masks(
            range(4), {**plain.masks, "model": [False] * 4}, forecast={"model": "linear"}
        ),
        Schedule(range(4), plain.masks, forecasts={"mlp": "hold", "cross": "linear"}),
    ):
        assert same == plain
        assert hash(same) == hash(plain)
    fitted = Schedule.pyramid(range(4), mlp=2, forecast=[[9, 9], [2, 0], [2, 0], [1, 0]])
    assert dict(fitted.forecasts) == {"mlp": ((), (2.0,), (), (1.0,))}


def test_overrides_without_an_effect_make_no_difference():
    plain = Schedule.pyramid(range(4), mlp=2).override(kind="mlp", layers=1, every=3)
    for forecast in ("hold", [[1]] * 4):
        same = Schedule.pyramid(range(4), mlp=2).override(
            kind="mlp", layers=1, every=3, forecast=forecast
        )
        assert same == plain
    never = Override(kind="mlp", mask=(False,) * 4, forecast="linear")
    assert never == Override(kind="mlp", mask=(False,) * 4)


def test_an_override_has_the_forecast_of_its_kind_or_its_own():
    slots = [SlotSpec(f"b{i}", "mlp", i) for i in range(4)]
    rows = [[1], [2], [1], [3]]
    schedule = (
        Schedule.pyramid(range(4), mlp=2, forecast="linear")
        .override(kind="mlp", layers=1, every=2)
        .override(kind="mlp", layers=2, every=2, forecast="hold")
        .override(name="b3", every=2, forecast=rows)
    )
    expected = ["linear", "linear", "hold", ((), (2.0,), (), (3.0,))]
    assert [schedule.forecast_of(slot) for slot in slots] == expected
    plan = schedule.plan(slots)
    assert plan.depths == (2, 2, 0, 1)
    assert [plan.weights(3, slot) for slot in range(4)] == [(1.5, -0.5)] * 2 + [(1.0,), (3.0,)]


def test_a_forecast_is_kept_for_overrides_that_alone_reuse_its_kind():
    reusing = Override(kind="mlp", layers=(0,), mask=(False, False, True))
    schedule = Schedule.from_masks(range(3), {}, overrides=[reusing], forecast="linear")
    assert dict(schedule.forecasts) == {"mlp": "linear"}
    assert schedule.plan([SlotSpec("a", "mlp", 0)]).weights(2, 0) == (2.0, -1.0)


def test_units_are_those_of_polynomials():
    steps = [9, 7, 6, 2]
    slots = [SlotSpec("m", "model", 0)]
    schedule = Schedule.skip(steps, [0, 1, 2], units="timestep")
    assert schedule.units == "timestep"
    assert schedule.plan(slots).weights(3, 0) == (5.0, -4.0)
    assert Schedule.skip(steps, [0, 1, 2]).plan(slots).weights(3, 0) == (2.0, -1.0)
    hold = Schedule.skip(steps, [0, 1, 2], forecast="hold", units="timestep")
    assert hold == Schedule.skip(steps, [0, 1, 2], forecast="hold")
    later = Schedule.pyramid(steps, mlp=4, units="timestep")
    later = later.override(kind="mlp", mask=[False, False, False, True], forecast="linear")
    assert later.plan([SlotSpec("m", "mlp", 0)]).weights(3, 0) == (5.0, -4.0)


def test_a_forecast_waits_for_the_override_that_uses_it():
    mask = [False, False, True, True]
    none = Schedule.from_masks(range(4), {"mlp": [False] * 4}, forecast="linear")
    slot = SlotSpec("m", "mlp", 0)
    assert none == Schedule.none(range(4))
    assert none.override(kind="mlp", mask=mask).plan([slot]).weights(2, 0) == (2.0, -1.0)
    with pytest.raises(ValueError, match="forecast: expected 'hold' without masks and overrides"):
        Schedule.from_masks(range(4), {}, forecast="linear")
    with pytest.raises(ValueError, match="found one of 'stack'"):
        Schedule.from_masks(range(4), {"mlp": mask}, forecast={"stack": "linear"})


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("kind", lambda: Schedule.skip(range(4), 2, kind=None)),
        ("kind", lambda: Schedule.skip(range(4), 2, kind=3)),
        ("overrides", lambda: Schedule.from_masks(range(4), {}, overrides=None)),
        ("overrides", lambda: Schedule.from_masks(range(4), {}, overrides=3)),
        ("units", lambda: Schedule.skip(range(4), 2, units=np.array([1, 2]))),
        ("timesteps", lambda: Schedule.skip(torch.ones(4, device="meta"), 2)),
        ("computed", lambda: Schedule.skip(range(4), torch.ones(2, device="meta"))),
        ("forecast", lambda: Schedule.skip(range(4), 2, forecast=torch.ones(4, 1, device="meta"))),
        ("forecast", lambda: Schedule.skip(range(4), 2, forecast=[[1.0], [1.0], [1.0], [1e300]])),
    ],
)
def test_bad_arguments_are_named(field, make):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        make()


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_steps = draw(st.integers(2, 8))
    masks = st.lists(st.booleans(), min_size=num_steps - 1, max_size=num_steps - 1).map(
        lambda rest: (False, *rest)
    )
    weights = st.lists(st.floats(-3, 3), min_size=2, max_size=2)
    forecasts = st.one_of(
        st.sampled_from(["hold", "linear", "quadratic"]),
        st.lists(weights, min_size=num_steps, max_size=num_steps),
    )
    kinds = st.sampled_from(KINDS)
    overrides = st.builds(
        Override,
        mask=masks,
        kind=st.none() | kinds,
        name=st.sampled_from(["*", "a"]),
        forecast=st.none() | forecasts,
    )
    return Schedule(
        range(num_steps, 0, -1),
        draw(st.dictionaries(kinds, masks)),
        draw(st.lists(overrides, max_size=2)),
        "some",
        draw(st.dictionaries(kinds, forecasts)),
        draw(st.sampled_from(["step", "timestep"])),
    )


@settings(deadline=None)
@given(schedules())
def test_round_trips(schedule):
    for copied in (
        Schedule.from_json(schedule.to_json()),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ):
        assert copied == schedule
        assert hash(copied) == hash(schedule)
        assert copied.label == schedule.label


OLD = """{
 "pabc": "schedule",
 "version": 1,
 "label": "pyramid mlp=2",
 "timesteps": [3.0, 2.0, 1.0],
 "masks": {"mlp": "#.#"},
 "overrides": [{"kind": "mlp", "layers": [1], "name": null, "mask": "###"}]
}"""


def test_a_file_of_an_older_version_loads():
    expected = Schedule.pyramid([3, 2, 1], mlp=2).override(kind="mlp", layers=[1], every=1)
    assert Schedule.from_json(OLD) == expected
    for field in ("forecast", "units"):
        assert field not in expected.to_json()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Schedule.skip(range(5), 0),
            "computed: expected a number of steps, 1 to 5, or their indices, found 0",
        ),
        (
            lambda: Schedule.skip(range(5), 6),
            "computed: expected a number of steps, 1 to 5, or their indices, found 6",
        ),
        (
            lambda: Schedule.skip(range(5), True),
            "computed: expected a number of steps, 1 to 5, or their indices, found True",
        ),
        (
            lambda: Schedule.skip(range(5), 2.5),
            "computed: expected a number of steps, 1 to 5, or their indices, found 2.5",
        ),
        (
            lambda: Schedule.skip(range(5), "012"),
            "computed: expected a number of steps, 1 to 5, or their indices, found '012'",
        ),
        (
            lambda: Schedule.skip(range(5), [1, 3]),
            "computed: expected different indices of steps, 0 to 4, with 0 among them, found"
            " [1, 3]",
        ),
        (
            lambda: Schedule.skip(range(5), []),
            "computed: expected different indices of steps, 0 to 4, with 0 among them, found []",
        ),
        (
            lambda: Schedule.skip(range(5), [0, 5]),
            "computed: expected different indices of steps, 0 to 4, found 5",
        ),
        (
            lambda: Schedule.skip(range(5), [0, -1]),
            "computed: expected different indices of steps, 0 to 4, found -1",
        ),
        (
            lambda: Schedule.skip(range(5), [0, True]),
            "computed: expected different indices of steps, 0 to 4, found True",
        ),
        (
            lambda: Schedule.skip(range(5), [0, 2.0]),
            "computed: expected different indices of steps, 0 to 4, found 2.0",
        ),
        (
            lambda: Schedule.skip(range(5), [0, 2, 2]),
            "computed: expected different indices of steps, 0 to 4, found 2 twice",
        ),
        (
            lambda: Schedule.skip(range(5), 2, kind="space"),
            f"kind: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            lambda: Schedule.skip(range(5), 2, kind=()),
            "kind: expected a kind or several, found ()",
        ),
        (
            lambda: Schedule.skip(range(5), 2, units="sigma"),
            "units: expected one of ('step', 'timestep'), found 'sigma'",
        ),
        (
            lambda: Schedule.skip(range(5), 2, forecast="cubic"),
            "forecast: expected one of hold, linear, quadratic, or weights [num_steps, k], found"
            " 'cubic'",
        ),
        (
            lambda: Schedule.skip(range(5), 2, forecast=np.ones((4, 2))),
            "forecast: expected one row of weights per step (5), found 4",
        ),
        (
            lambda: Schedule.pyramid(range(5), mlp=2, forecast={"model": "linear"}),
            "forecast: expected forecasts of kinds that are reused here, mlp, found one of 'model'",
        ),
        (
            lambda: Schedule(range(5), forecasts="linear"),
            "forecasts: expected a mapping from kind to forecast, found 'linear'",
        ),
        (
            lambda: Schedule.none(range(3)).override(kind="mlp", every=2, forecast=[[1.0]] * 2),
            "override forecast: expected one row of weights per step (3), found 2",
        ),
        (
            lambda: Schedule.skip(range(3), 2, forecast=[[1, 1]] * 3).plan([MODEL]),
            "forecast of 'model': expected at most 1 weights at step 1, as many values are stored"
            " by then, found 2",
        ),
        (
            lambda: Schedule.skip((9, 9, 8), [0, 1], units="timestep").plan([MODEL]),
            "forecast of 'model': expected different timesteps for 'linear' at step 2, found 9, 9"
            " at steps 1, 0; units='step' goes over the steps instead",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message


def test_names_of_slots_are_strings():
    with pytest.raises(ValueError, match="slot name: expected a string, found \\['m'\\]"):
        SlotSpec(["m"], "mlp", 0)
