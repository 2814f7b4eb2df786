import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pabc
from pabc import budget as budgets
from pabc.budget import choose_slots, fit_plan
from pabc.plan import Plan, SlotSpec
from pabc.validate import as_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (np.int64(7), 7),
        ("7B", 7),
        ("2GiB", 2 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        (" 10 KB ", 10_000),
        ("0.1GB", 100_000_000),
        ("3MB", 3_000_000),
        ("1KiB", 1024),
    ],
)
def test_sizes(value, expected):
    assert as_bytes(value, "memory_budget") == expected


@pytest.mark.parametrize(
    "value", ["", "2", "GiB", "-1GiB", "2gib", "2 TiB", "1e3B", "0B", "0.1B", 0, -5, 1.5, True, []]
)
def test_no_sizes(value):
    with pytest.raises(ValueError, match=r"memory_budget: expected .*'2GiB', found "):
        as_bytes(value, "memory_budget")


def make_plan(sizes, reuse, kinds=None):
    kinds = kinds or ["spatial"] * len(sizes)
    slots = [
        SlotSpec(f"{kind}.{j}", kind, kinds[:j].count(kind), size)
        for j, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    return Plan.from_reuse(range(len(reuse), 0, -1), slots, np.array(reuse, dtype=bool))


@st.composite
def cases(draw):
    num_slots, num_steps = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 12), min_size=num_slots, max_size=num_slots))
    flops = draw(st.lists(st.integers(0, 9), min_size=num_slots, max_size=num_slots))
    row = st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)
    rows = draw(st.lists(row, min_size=num_steps - 1, max_size=num_steps - 1))
    plan = make_plan(sizes, [[False] * num_slots, *rows])
    return plan, flops, draw(st.integers(1, 60))


def peak_of(plan, kept):
    reuse = plan.reuse.copy()
    reuse[:, [j for j in range(len(plan.slots)) if j not in kept]] = False
    return Plan.from_reuse(plan.timesteps, plan.slots, reuse).peak_bytes


@settings(max_examples=150, deadline=None)
@given(case=cases())
@example(case=(make_plan([3, 2, 2], [[False] * 3, [True] * 3]), [4, 2, 2], 4))  # greedy takes 3
@example(case=(make_plan([1, 2], [[False] * 2, [True] * 2]), [0, 1], 2))  # one counts for nothing
def test_no_other_choice_saves_more(case):
    """Against all subsets: within the budget, and the most work saved that there is."""
    plan, flops, budget = case
    reused = np.nonzero(plan.reuse.any(axis=0))[0].tolist()
    subsets = [s for n in range(len(reused) + 1) for s in itertools.combinations(reused, n)]
    fitting = [s for s in subsets if peak_of(plan, s) <= budget]
    if reused and not any(fitting):
        least = min(plan.slots[j].nbytes for j in reused)
        with pytest.raises(ValueError, match=f"expected {least} ") as error:
            fit_plan(plan, flops, budget)
        assert fit_plan(plan, flops, least).kept, str(error.value)
        return
    fit = fit_plan(plan, flops, budget)
    saved = [int(count) * cost for count, cost in zip(plan.reuse.sum(axis=0), flops, strict=True)]
    assert fit.plan.peak_bytes <= budget and fit.plan.peak_bytes == peak_of(plan, fit.kept)
    assert sum(saved[j] for j in fit.kept) == max(sum(saved[j] for j in s) for s in fitting)
    assert sorted((*fit.kept, *fit.dropped)) == reused
    assert (fit.plan.reuse[:, list(fit.kept)] == plan.reuse[:, list(fit.kept)]).all()
    assert not fit.plan.reuse[:, list(fit.dropped)].any()
    assert fit_plan(plan, flops, budget) == fit, "the same each time, on all ranks"


def test_lifetimes_that_do_not_meet_share_the_room():
    early, late = [0, 1, 0, 0], [0, 0, 0, 1]
    plan = make_plan([10, 10], np.array([early, late]).T)
    assert fit_plan(plan, [1, 1], 10).dropped == ()


def test_the_search_ends_with_what_it_has_found(monkeypatch):
    """Many slots that are all different: no better than one by one, at the least."""
    rng = np.random.default_rng(0)
    reuse = rng.random((20, 60)) < 0.6
    reuse[0] = False
    sizes = rng.integers(50, 100, 60).tolist()
    plan = make_plan(sizes, reuse)
    saved = (rng.integers(50, 100, 60) * reuse.sum(axis=0)).tolist()
    found = {}
    for limit in (0, budgets.MAX_CHOICES):
        monkeypatch.setattr(budgets, "MAX_CHOICES", limit)
        kept = choose_slots(plan, saved, 1000)
        assert peak_of(plan, kept) <= 1000
        found[limit] = sum(saved[j] for j in kept)
    greedy, searched = found.values()
    assert searched >= greedy > 0


def test_pyramid_of_a_large_model_keeps_what_saves_most_per_byte():
    schedule = pabc.Schedule.pyramid(range(50, 0, -1), spatial=2, temporal=4, cross=6)
    kinds = ["spatial", "temporal", "cross"] * 28
    slots = [SlotSpec(f"{kind}.{j}", kind, j // 3, 40 * MIB) for j, kind in enumerate(kinds)]
    plan = schedule.plan(slots)
    flops = [{"spatial": 50, "temporal": 20, "cross": 40}[kind] * 10**9 for kind in kinds]
    fit = fit_plan(plan, flops, 2 * 2**30)
    assert len(fit.kept) == 51
    assert {plan.slots[j].kind for j in fit.dropped} == {"temporal", "spatial"}
    text = str(fit)
    assert "memory budget 2.0 GiB: room for 51 of 84 slots, 2.0 GiB of 3.3 GiB" in text
    assert "kept      cross 0-27: 40.0 MiB each, saves" in text
    assert "computed  temporal 0-27: 40.0 MiB each" in text


def test_room_for_all_or_nothing_to_reuse_changes_nothing():
    plan = make_plan([5, 5], [[0, 0], [1, 1]])
    assert fit_plan(plan, [1, 1], 10).plan is plan
    nothing = make_plan([5, 5], [[0, 0], [0, 0]])
    assert fit_plan(nothing, [1, 1], 1).plan is nothing


def test_too_little_for_any_names_the_smallest_that_is_of_use():
    plan = make_plan([5000, 3000], [[0, 0], [1, 1]], ["spatial", "cross"])
    message = r"expected 3000 bytes \(2\.9 KiB\) or more, for 'cross\.1' alone, found 2999"
    with pytest.raises(ValueError, match=message):
        fit_plan(plan, [1, 1], 2999)
