import copy
import dataclasses
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pabc.base.kinds import KINDS
from pabc.plan import SlotSpec
from pabc.schedule import Override, Schedule

RANGES = st.one_of(st.none(), st.integers(1, 9))
STEPS = st.lists(st.floats(-50, 1100, allow_nan=False), min_size=1, max_size=40)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(STEPS)
    masks = st.lists(st.booleans(), min_size=len(steps) - 1, max_size=len(steps) - 1).map(
        lambda rest: (False, *rest)
    )
    overrides = st.builds(
        Override,
        mask=masks,
        kind=st.sampled_from(KINDS),
        layers=st.none() | st.sets(st.integers(0, 5), min_size=1).map(tuple),
        name=st.none() | st.sampled_from(["*", "blocks.0.*", "a"]),
    )
    return Schedule.from_masks(
        steps,
        draw(st.dictionaries(st.sampled_from(KINDS), masks)),
        overrides=draw(st.lists(overrides, max_size=3)),
    )


@settings(deadline=None)
@given(
    steps=STEPS,
    ranges=st.dictionaries(st.sampled_from(KINDS), RANGES),
    window=st.none() | st.tuples(st.integers(-60, 500), st.integers(501, 1200)),
)
@pytest.mark.filterwarnings("ignore:window .* holds none")
def test_pyramid_follows_the_published_rule(steps, ranges, window):
    schedule = Schedule.pyramid(steps, window=window, **ranges)
    low, high = window or (-1000, 2000)
    for kind in KINDS:
        every = ranges.get(kind) or 1
        for i, t in enumerate(steps):
            assert schedule.mask(kind)[i] == (i % every != 0 and low < int(t) < high)


@pytest.mark.filterwarnings("ignore:nothing is reused")
@settings(deadline=None)
@given(
    num_steps=st.integers(1, 200),
    bounds=st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_fraction_is_exact_in_the_decimals_that_were_written(num_steps, bounds):
    low, high = bounds
    steps = range(num_steps)
    schedule = Schedule.pyramid(steps, spatial=10**6, fraction=(low / 1000, high / 1000))
    for i in steps[1:]:
        inside = Fraction(low, 1000) * num_steps <= i < Fraction(high, 1000) * num_steps
        assert schedule.mask("spatial")[i] == inside


def test_fraction_survives_binary_rounding():
    assert 0.29 * 100 < 29  # 28.999..., so plain floats would let step 29 count as outside
    mask = Schedule.pyramid(range(100), spatial=10**6, fraction=(0.1, 0.29)).mask("spatial")
    assert [i for i, reuse in enumerate(mask) if reuse] == list(range(10, 29))


def test_first_step_always_computes():
    schedule = Schedule.pyramid([500, 400], spatial=2, window=(100, 900))
    assert schedule.mask("spatial") == (False, True)


def test_window_bounds_are_strict():
    schedule = Schedule.pyramid([950, 900, 899, 101, 100], cross=100, window=(100, 900))
    assert schedule.mask("cross") == (False, False, True, True, False)


def test_integral_window_truncates_timesteps():
    schedule = Schedule.pyramid([999, 930.9, 450.5, 451.5, 929.9], cross=100, window=(450, 930))
    assert schedule.mask("cross") == (False, False, False, True, True)


def test_fractional_window_compares_timesteps_as_they_are():
    schedule = Schedule.pyramid([1.0, 0.85, 0.8, 0.16, 0.15], cross=100, window=(0.15, 0.85))
    assert schedule.mask("cross") == (False, False, True, True, False)


def test_window_per_kind():
    schedule = Schedule.pyramid(
        range(9, -1, -1),
        spatial=2,
        cross=2,
        temporal=2,
        window={"spatial": (4, 9), "cross": (0, 4)},
    )
    assert [i for i in range(10) if schedule.mask("spatial")[i]] == [1, 3]
    assert [i for i in range(10) if schedule.mask("cross")[i]] == [7]
    assert [i for i in range(10) if schedule.mask("temporal")[i]] == [1, 3, 5, 7, 9]


def test_window_without_steps_warns():
    with pytest.warns(UserWarning, match=r"window \(100, 800\) holds none of the 3 timesteps"):
        schedule = Schedule.pyramid([1.0, 0.5, 0.1], spatial=2, window=(100, 800))
    assert schedule == Schedule.none([1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    "steps",
    [(3, 2, 1), np.array([3, 2, 1]), np.array([3, 2, 1], dtype=np.float32), range(3, 0, -1)],
)
def test_timesteps_from_sequences_and_arrays(steps):
    assert Schedule.none(steps).timesteps == (3.0, 2.0, 1.0)


def test_timesteps_from_tensors():
    torch = pytest.importorskip("torch")
    assert Schedule.none(torch.tensor([3, 2, 1])).timesteps == (3.0, 2.0, 1.0)
    assert Schedule.none(list(torch.tensor([3.5, 2, 1]))).timesteps == (3.5, 2.0, 1.0)


def test_timesteps_may_repeat_and_rise():
    assert Schedule.pyramid([1, 5, 5, 2], mlp=2).mask("mlp") == (False, True, False, True)


def test_masks_without_reuse_are_dropped():
    schedule = Schedule.from_masks([2, 1], {"mlp": [False, False], "cross": [False, True]})
    assert dict(schedule.masks) == {"cross": (False, True)}
    assert Schedule.pyramid([2, 1], spatial=1, cross=None) == Schedule.none([2, 1])


def test_masks_from_arrays():
    assert Schedule.from_masks([2, 1], {"mlp": np.array([False, True])}).mask("mlp") == (
        False,
        True,
    )


def test_last_matching_override_holds():
    slots = [SlotSpec(f"blocks.{i}", "mlp", i) for i in range(3)]
    schedule = (
        Schedule.pyramid(range(4, 0, -1), mlp=2)
        .override(kind="mlp", layers=(1, 2), every=1)
        .override(name="*.2", mask=[False, True, True, True])
    )
    assert [schedule.mask_of(slot) for slot in slots] == [
        (False, True, False, True),
        (False, False, False, False),
        (False, True, True, True),
    ]


def test_override_takes_one_layer_a_range_and_a_fraction():
    schedule = Schedule.none(range(10)).override(kind="mlp", layers=3, every=2, fraction=(0.3, 0.8))
    assert schedule.overrides[0].layers == (3,)
    assert [i for i in range(10) if schedule.overrides[0].mask[i]] == [3, 5, 7]


def test_override_leaves_the_original_alone():
    schedule = Schedule.none([2, 1])
    assert schedule.override(kind="mlp", every=2) != schedule
    assert schedule == Schedule.none([2, 1])


def test_unmatched_names_what_has_no_slot():
    schedule = Schedule.pyramid([3, 2, 1], spatial=2, joint=2).override(
        kind="mlp", layers=[7], every=2
    )
    slots = [SlotSpec("a", "spatial", 0), SlotSpec("b", "mlp", 0)]
    assert schedule.unmatched(slots) == ("kind 'joint'", "override of kind 'mlp', layers (7,)")
    assert schedule.unmatched([*slots, SlotSpec("c", "joint", 0), SlotSpec("d", "mlp", 7)]) == ()


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


def test_label_names_the_settings():
    schedule = Schedule.pyramid([3, 2, 1], spatial=2, cross=6, window=(0, 4))
    assert schedule.label == "pyramid spatial=2 cross=6 window=(0, 4)"


def test_schedule_is_immutable():
    schedule = Schedule.pyramid([2, 1], mlp=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.timesteps = ()
    with pytest.raises(TypeError):
        schedule.masks["mlp"] = (False, False)


STEPS3 = [3, 2, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule.none([]), "timesteps: expected one per step, at least 1, found none"),
        (
            lambda: Schedule.none([1.0, float("nan")]),
            "timesteps: expected finite numbers, found nan at step 1",
        ),
        (
            lambda: Schedule.none([float("inf")]),
            "timesteps: expected finite numbers, found inf at step 0",
        ),
        (
            lambda: Schedule.none("321"),
            "timesteps: expected a flat sequence of numbers, found '321'",
        ),
        (lambda: Schedule.none(7), "timesteps: expected a flat sequence of numbers, found 7"),
        (
            lambda: Schedule.none(["7"]),
            "timesteps: expected a flat sequence of numbers, found ['7']",
        ),
        (
            lambda: Schedule.none([[3, 2], [1, 0]]),
            "timesteps: expected a flat sequence of numbers, found [[3, 2], [1, 0]]",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=0),
            "spatial: expected an integer of 1 or more, or None, found 0",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, mlp=-2),
            "mlp: expected an integer of 1 or more, or None, found -2",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, cross=2.0),
            "cross: expected an integer of 1 or more, or None, found 2.0",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, cross=True),
            "cross: expected an integer of 1 or more, or None, found True",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, window=(5, 5)),
            "window: expected finite (low, high) with low < high, found (5, 5)",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, window=(5, 4)),
            "window: expected finite (low, high) with low < high, found (5, 4)",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, window=(0, float("inf"))),
            "window: expected finite (low, high) with low < high, found (0, inf)",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, window=5),
            "window: expected a pair of numbers (low, high), found 5",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, window={"mlp": (1, 2)}),
            "window: expected pairs for kinds with a range, found one for 'mlp'",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, window={"space": (1, 2)}),
            f"window: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, fraction=(0.5, 1.5)),
            "fraction: expected 0 <= low < high <= 1, found (0.5, 1.5)",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, spatial=2, fraction=(0.9, 0.1)),
            "fraction: expected finite (low, high) with low < high, found (0.9, 0.1)",
        ),
        (
            lambda: Schedule.pyramid(STEPS3, window=(0, 2), fraction=(0, 1)),
            "window, fraction: expected one of them, found both",
        ),
        (
            lambda: Schedule.pyramid(
                STEPS3, spatial=2, window={"spatial": (0, 2)}, fraction=(0, 1)
            ),
            "window, fraction: expected one of them, found both",
        ),
        (
            lambda: Schedule.from_masks(STEPS3, {"space": [False] * 3}),
            f"masks: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            lambda: Schedule.from_masks(STEPS3, {"mlp": [False, True]}),
            "mask of 'mlp': expected one bool per step (3), found 2",
        ),
        (
            lambda: Schedule.from_masks(STEPS3, {"mlp": [True, True, False]}),
            "mask of 'mlp': expected False at step 0, as nothing is stored yet, found True (reuse)",
        ),
        (
            lambda: Schedule.from_masks(STEPS3, {"mlp": [False, 1, False]}),
            "mask of 'mlp': expected True (reuse) or False, found 1 at step 1",
        ),
        (
            lambda: Schedule.from_masks(STEPS3, {"mlp": 3}),
            "mask of 'mlp': expected one bool per step, found 3",
        ),
        (
            lambda: Schedule(STEPS3, masks=[]),
            "masks: expected a mapping from kind to mask, found []",
        ),
        (
            lambda: Schedule(STEPS3, overrides=({},)),
            "overrides: expected Override objects, found {}",
        ),
        (lambda: Schedule(STEPS3, label=3), "label: expected a string, found 3"),
        (
            lambda: Schedule(STEPS3, overrides=(Override(kind="mlp", mask=(False,)),)),
            "mask of override of kind 'mlp': expected one bool per step (3), found 1",
        ),
        (
            lambda: Schedule.none(STEPS3).override(kind="mlp"),
            "override: expected either mask or every, found mask None and every None",
        ),
        (
            lambda: Schedule.none(STEPS3).override(kind="mlp", mask=[False] * 3, fraction=(0, 1)),
            "override: expected window or fraction with every, found one with mask",
        ),
        (
            lambda: Schedule.none(STEPS3).override(kind="mlp", mask=[False] * 2),
            "override mask: expected one bool per step (3), found 2",
        ),
        (
            lambda: Schedule.none(STEPS3).override(layers=[1], every=2),
            "override: expected a kind, a name or both, found neither",
        ),
        (
            lambda: Schedule.none(STEPS3).override(kind="space", every=2),
            f"override: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            lambda: Schedule.none(STEPS3).override(kind="mlp", layers=[-1], every=2),
            "override layers: expected integers of 0 or more, or None, found [-1]",
        ),
        (
            lambda: Schedule.none(STEPS3).override(name=3, every=2),
            "override name: expected a pattern or None, found 3",
        ),
        (
            lambda: Schedule.none(STEPS3).mask("space"),
            f"mask: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message


def changed(**changes) -> str:
    return json.dumps({**json.loads(Schedule.pyramid(STEPS3, mlp=2).to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "schedule JSON: expected valid JSON"),
        ("[]", "schedule JSON: expected an object, found list"),
        (
            "{}",
            "schedule JSON: expected fields pabc, version, label, timesteps, masks, overrides, "
            "found no 'pabc'",
        ),
        (changed(pabc="plan"), "schedule JSON, pabc: expected 'schedule', found 'plan'"),
        (changed(version=2), "schedule JSON, version: expected 1, found 2"),
        (changed(version=True), "schedule JSON, version: expected 1, found True"),
        (
            changed(extra=1),
            "schedule JSON: expected fields pabc, version, label, timesteps, masks, overrides "
            "and perhaps forecasts, units, found 'extra'",
        ),
        (changed(timesteps=3), "schedule JSON, timesteps: expected list, found int"),
        (changed(timesteps=[]), "timesteps: expected one per step, at least 1, found none"),
        (changed(masks=[]), "schedule JSON, masks: expected dict, found list"),
        (
            changed(masks={"space": "#.#"}),
            f"masks: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            changed(masks={"mlp": "#x#"}),
            "masks, mlp: expected a mask of '#' (compute) and '.' (reuse), found '#x#'",
        ),
        (
            changed(masks={"mlp": [0]}),
            "masks, mlp: expected a mask of '#' (compute) and '.' (reuse), found [0]",
        ),
        (changed(overrides=[3]), "overrides[0]: expected an object, found int"),
        (
            changed(overrides=[{"kind": "mlp"}]),
            "overrides[0]: expected fields kind, layers, name, mask, found no 'layers'",
        ),
    ],
)
def test_bad_json_is_named(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Schedule.from_json(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("steps", "options"), [([9], {}), (range(30, 0, -1), {"window": (14, 16)})]
)
def test_a_pyramid_that_reuses_nothing_warns(steps, options):
    with pytest.warns(UserWarning, match="nothing is reused.*ranges of spatial"):
        assert not Schedule.pyramid(steps, spatial=3, **options).reuses
