import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pabc.base.kinds import KINDS
from pabc.plan import Action, Phase, Plan, SlotSpec
from pabc.schedule import Schedule


def make_slots(kinds, *, num_layers=2, nbytes=10):
    return [SlotSpec(f"{i}.{kind}", kind, i, nbytes) for i in range(num_layers) for kind in kinds]


def make_plan(*columns: str, nbytes=10) -> Plan:
    """A plan from one string per slot, `.` where it reuses."""
    slots = [SlotSpec(f"s{j}", "mlp", j, nbytes) for j in range(len(columns))]
    reuse = np.array([[symbol == "." for symbol in column] for column in columns])
    return Plan.from_reuse(range(len(columns[0])), slots, reuse.T)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_steps, num_slots = draw(st.integers(1, 12)), draw(st.integers(0, 5))
    rows = st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)
    table = [
        [False] * num_slots,
        *draw(st.lists(rows, min_size=num_steps - 1, max_size=num_steps - 1)),
    ]
    slots = [
        SlotSpec(f"s{j}", draw(st.sampled_from(KINDS)), j, draw(st.integers(0, 9)))
        for j in range(num_slots)
    ]
    reuse = np.array(table, dtype=bool).reshape(num_steps, num_slots)
    return Plan.from_reuse(draw(st.permutations(range(num_steps))), slots, reuse)


@settings(deadline=None)
@given(plans())
def test_plan_runs_in_a_simulator_that_keeps_only_what_it_says(plan):
    """Every read finds the last computed value; nothing is stored in vain or kept too long."""
    kept: dict[int, int] = {}
    last_computed: dict[int, int] = {}
    unread: set[int] = set()
    for step in range(plan.num_steps):
        for slot in range(len(plan.slots)):
            action = plan.actions[step, slot]
            if action == Action.REUSE:
                assert kept[slot] == plan.sources[step, slot] == last_computed[slot]
                unread.discard(slot)
                continue
            assert plan.sources[step, slot] == -1
            assert slot not in kept, "a value is freed before it is computed again"
            last_computed[slot] = step
            if action == Action.STORE:
                kept[slot] = step
                unread.add(slot)
        assert plan.bytes_at[step] == sum(plan.slots[slot].nbytes for slot in kept)
        for slot in plan.frees[step]:
            assert slot not in unread, "a value is freed unread"
            del kept[slot]
    assert not kept


@settings(deadline=None)
@given(plans())
def test_phases_partition_the_steps_by_what_they_reuse(plan):
    assert sorted(step for phase in plan.phases for step in phase.steps) == list(
        range(plan.num_steps)
    )
    assert len({phase.reused for phase in plan.phases}) == len(plan.phases)
    assert [phase.index for phase in plan.phases] == list(range(len(plan.phases)))
    for phase in plan.phases:
        stored = set()
        for step in phase.steps:
            assert plan.phase_of_step[step] == phase.index
            assert tuple(np.nonzero(plan.actions[step] == Action.REUSE)[0]) == phase.reused
            stored |= set(np.nonzero(plan.actions[step] == Action.STORE)[0])
        assert phase.stored == tuple(sorted(stored))


@settings(deadline=None)
@given(plans())
def test_round_trips(plan):
    for copied in (
        Plan.from_json(plan.to_json()),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
    ):
        assert copied == plan
        assert hash(copied) == hash(plan)
        assert copied.digest() == plan.digest()
        assert (copied.frees, copied.phases) == (plan.frees, plan.phases)
        assert np.array_equal(copied.sources, plan.sources)
        assert not copied.actions.flags.writeable


@settings(deadline=None)
@given(plans())
def test_timeline_reads_back(plan):
    lines = str(plan).splitlines()
    columns = {line.split()[-1] for line in lines[1:-2]}
    assert columns == {plan._column(slot) for slot in range(len(plan.slots))}


@pytest.mark.parametrize("num_steps", [30, 50])
def test_2_4_6_over_the_middle_70_percent_has_five_phases(num_steps):
    schedule = Schedule.pyramid(
        range(num_steps), spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85)
    )
    plan = schedule.plan(make_slots(["spatial", "cross", "temporal", "mlp"]))
    assert len(plan.phases) == 5
    assert plan.phases[0].reused == ()


def test_actions_sources_and_frees():
    plan = make_plan("#..#.#", "######", "#.##..")
    assert plan.actions.T.tolist() == [[1, 2, 2, 1, 2, 0], [0] * 6, [1, 2, 0, 1, 2, 2]]
    assert plan.sources.T.tolist() == [
        [-1, 0, 0, -1, 3, -1],
        [-1] * 6,
        [-1, 0, -1, -1, 3, 3],
    ]
    assert plan.frees == ((), (2,), (0,), (), (0,), (2,))
    assert plan.bytes_at.tolist() == [20, 20, 10, 20, 20, 10]
    assert plan.peak_bytes == 20


def test_phase_joins_the_stores_of_its_steps():
    plan = make_plan("#.#.##", "###.#.")
    assert plan.phases == (
        Phase(0, reused=(), stored=(0, 1), steps=(0, 2, 4)),
        Phase(1, reused=(0,), stored=(), steps=(1,)),
        Phase(2, reused=(0, 1), stored=(), steps=(3,)),
        Phase(3, reused=(1,), stored=(), steps=(5,)),
    )
    assert plan.phase_of_step.tolist() == [0, 1, 0, 2, 0, 3]


def test_schedule_binds_kinds_and_overrides_to_slots():
    schedule = Schedule.pyramid(range(4), cross=2).override(kind="cross", layers=[1], every=4)
    plan = schedule.plan(make_slots(["cross", "mlp"]))
    assert plan.reuse.T.tolist() == [
        [False, True, False, True],
        [False] * 4,
        [False, True, True, True],
        [False] * 4,
    ]


def test_schedule_without_reuse_is_one_phase():
    plan = Schedule.none(range(4)).plan(make_slots(["spatial"]))
    assert plan.phases == (Phase(0, (), (), (0, 1, 2, 3)),)
    assert plan.peak_bytes == 0


def test_model_without_slots():
    plan = Schedule.pyramid(range(4), spatial=2).plan([])
    assert plan.actions.shape == (4, 0)
    assert len(plan.phases) == 1
    assert "reused: nothing; peak 0 B" in str(plan)


def test_reuse_fraction():
    plan = Schedule.pyramid(range(4), cross=2).plan(make_slots(["cross", "mlp"]))
    assert plan.reuse_fraction("cross") == 0.5
    assert plan.reuse_fraction() == 0.25
    assert plan.reuse_fraction("joint") == 0.0


def test_digest_covers_actions_timesteps_and_names_but_not_bytes():
    plan = make_plan("#.#.")
    assert plan.digest() == make_plan("#.#.", nbytes=99).digest()
    assert plan != make_plan("#.#.", nbytes=99)
    assert plan.digest() != make_plan("#..#").digest()
    other_times = Plan.from_reuse([9, 8, 7, 6], plan.slots, plan.reuse)
    assert plan.digest() != other_times.digest()
    assert plan.digest() != make_plan("#...").digest()
    assert len(plan.digest()) == 64


def test_arrays_are_read_only():
    plan = make_plan("#.")
    for array in (plan.actions, plan.sources, plan.phase_of_step):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_timeline():
    schedule = Schedule.pyramid(range(900, 0, -100), spatial=2, cross=4, window=(150, 800))
    schedule = schedule.override(kind="mlp", layers=[0, 1], every=3)
    slots = make_slots(["spatial", "cross", "mlp"], num_layers=4, nbytes=2**20)
    assert str(schedule.plan(slots)).splitlines() == [
        "plan: 9 steps, t = 900 to 100, 12 slots; # compute, + compute and store, . reuse",
        "  spatial  ##+.+.+.#",
        "  cross    #+..+...#",
        "  mlp 0-1  +..+..+..",
        "  mlp 2-3  #########",
        "  phase    012314541",
        "  6 phases; reused: spatial 33%, cross 56%, mlp 33%; peak 10.0 MiB",
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SlotSpec("a", "space", 0),
            f"slot 'a': expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            lambda: SlotSpec("a", "mlp", -1),
            "slot 'a': expected layer to be an integer of 0 or more, found -1",
        ),
        (
            lambda: SlotSpec("a", "mlp", 0, 1.5),
            "slot 'a': expected nbytes to be an integer of 0 or more, found 1.5",
        ),
        (
            lambda: Plan.from_reuse([1], [SlotSpec("a", "mlp", 0)] * 2, np.zeros((1, 2), bool)),
            "slots: expected one slot per name, found 'a' twice",
        ),
        (
            lambda: Plan.from_reuse([1, 0], [SlotSpec("a", "mlp", 0)], np.zeros((1, 1), bool)),
            "reuse: expected bool [num_steps, num_slots] = [2, 1], found bool [1, 1]",
        ),
        (
            lambda: Plan.from_reuse([1], [SlotSpec("a", "mlp", 0)], [[0]]),
            "reuse: expected bool [num_steps, num_slots] = [1, 1], found int64 [1, 1]",
        ),
        (
            lambda: Plan.from_reuse([1], [SlotSpec("a", "mlp", 0)], [[True]]),
            "reuse: expected reuse from step 1 on, found slot 'a' reused at step 0",
        ),
        (
            lambda: Plan.from_reuse([], [], np.zeros((0, 0), bool)),
            "timesteps: expected one per step, at least 1, found none",
        ),
        (
            lambda: make_plan("#.").reuse_fraction("space"),
            f"kind: expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message


def changed(**changes) -> str:
    content = json.loads(make_plan("#..").to_json())
    slot = {key[5:]: value for key, value in changes.items() if key.startswith("slot_")}
    content["slots"][0].update(slot)
    content.update({key: value for key, value in changes.items() if not key.startswith("slot_")})
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan JSON: expected valid JSON"),
        (changed(version=2), "plan JSON, version: expected 1, found 2"),
        (
            changed(extra=2),
            "plan JSON: expected fields pabc, version, timesteps, slots and perhaps units, found "
            "'extra'",
        ),
        (changed(slots=[3]), "slots[0]: expected an object, found int"),
        (
            changed(slot_kind="space"),
            f"slot 's0': expected a kind, one of {', '.join(KINDS)}, found 'space'",
        ),
        (
            changed(slot_size=3),
            "slots[0]: expected fields name, kind, layer, nbytes, actions and perhaps outer, "
            "forecast, sources, weights, found 'size'",
        ),
        (changed(slot_actions="+."), "slots[0].actions: expected one per step (3), found 2"),
        (
            changed(slot_actions="+x."),
            "slots[0].actions: expected a string of '#', '+', '.', '-' and '~', found '+x.'",
        ),
        (
            changed(slot_actions="..."),
            "reuse: expected reuse from step 1 on, found slot 's0' reused at step 0",
        ),
        (
            changed(slot_actions="#.."),
            "slots[0].actions: expected '+' exactly where a later step reads the value, '+..', "
            "found '#..'",
        ),
        (
            changed(slot_actions="+.+"),
            "slots[0].actions: expected '+' exactly where a later step reads the value, '+.#', "
            "found '+.+'",
        ),
    ],
)
def test_bad_json_is_named(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Plan.from_json(text)
    assert str(error.value).startswith(message)
