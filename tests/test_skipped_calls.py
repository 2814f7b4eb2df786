"""Whole calls that are skipped in a captured model, against a loop written by hand."""

import copy
import warnings

import pytest
import torch
from models import MODELS, OneBranch

import pabc
from pabc import Schedule

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText", "Refined", "OneStream")]
FACTORIZED = CASES[0]
TIMESTEPS = (900.0, 850.0, 700.0, 610.0, 500.0, 420.0, 300.0, 150.0)
COMPUTED = (0, 1, 3, 4, 7)
POINTS = {"hold": 1, "linear": 2, "quadratic": 3}


def make_calls(case, *, seed=0):
    """Returns the arguments of every step."""
    calls = [case.call(seed + step) for step in range(len(TIMESTEPS))]
    pairs = zip(calls, TIMESTEPS, strict=True)
    return [{**call, "t_B": torch.full_like(call["t_B"], t)} for call, t in pairs]


def skip_by_hand(model, calls, computed, rule, units="step"):
    """Calls the model at the computed steps, and puts a polynomial through its last outputs."""
    positions = range(len(calls)) if units == "step" else TIMESTEPS
    known, outputs = [], []
    for step, call in enumerate(calls):
        if step in computed:
            known.insert(0, (positions[step], model(**call)))
            outputs.append(known[0][1])
            continue
        total, last = None, known[: POINTS[rule]]
        for own, output in last:
            weight = 1.0
            for other, _ in last:
                weight *= 1 if other == own else (positions[step] - other) / (own - other)
            term = output * torch.tensor(weight, dtype=torch.float32)
            total = term if total is None else total + term
        outputs.append(total)
    return outputs


def run(fast, calls):
    with torch.no_grad():
        return [fast(**call) for call in calls]


def assert_equal(found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), step


@pytest.mark.parametrize("units", ["step", "timestep"])
@pytest.mark.parametrize("rule", POINTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_skipped_calls_equal_a_loop_by_hand(case, rule, units):
    model, calls = case.model(), make_calls(case)
    expected = skip_by_hand(model, calls, COMPUTED, rule, units)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast=rule, units=units)
    for backend in ("eager", "oracle", "original"):
        fast = pabc.compile(model, schedule, backend=backend)
        for _ in range(2):
            assert_equal(run(fast, calls), expected)
        assert fast.stats.fallbacks == {} and fast.stats.nbytes == 0
        assert fast.stats.peak_nbytes == fast.plan.peak_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_nothing_skipped_is_the_model(case):
    model, calls = case.model(), make_calls(case)
    schedule = Schedule.skip(TIMESTEPS, len(TIMESTEPS))
    assert_equal(run(pabc.compile(model, schedule, backend="eager"), calls), run(model, calls))


@torch.no_grad()
def test_inductor_compiles_what_runs_the_model_alone():
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic")
    fast, none = (pabc.compile(model, s) for s in (schedule, Schedule.none(TIMESTEPS)))
    found = run(fast, calls)
    whole = run(none, calls)
    expected = skip_by_hand(model, calls, COMPUTED, "quadratic")
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=str(step))
    for step in COMPUTED:
        assert torch.equal(found[step], whole[step])
    assert fast.stats.blocks == none.stats.blocks


@pytest.mark.parametrize("rule", POINTS)
@pytest.mark.parametrize("backend", ["eager", "oracle", "original"])
@torch.no_grad()
def test_callers_may_write_to_what_they_get(rule, backend):
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    expected = skip_by_hand(model, calls, COMPUTED, rule)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast=rule)
    fast = pabc.compile(model, schedule, backend=backend)
    for call, wanted in zip(calls, expected, strict=True):
        found = fast(**call)
        assert torch.equal(found, wanted)
        found.fill_(torch.nan)


@torch.no_grad()
def test_guidance_branches_are_forecast_apart():
    model, names = FACTORIZED.model(), ("cond", "uncond")
    calls = {name: make_calls(FACTORIZED, seed=20 * i) for i, name in enumerate(names)}
    schedule = Schedule.skip(TIMESTEPS, COMPUTED)
    fast = pabc.compile(model, schedule, backend="eager")
    found = {name: [] for name in names}
    for step in range(len(TIMESTEPS)):
        for name in names:
            with fast.cache_context(name):
                found[name].append(fast(**calls[name][step]))
    for name in names:
        assert_equal(found[name], skip_by_hand(model, calls[name], COMPUTED, "linear"))


@torch.no_grad()
def test_a_branch_that_begins_late_has_a_history_of_its_own():
    """At step 5 the branch has two values, of steps 3 and 4; at step 2 it has one, of step 2."""
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic")
    fast = pabc.compile(model, schedule, backend="eager")
    found = []
    for step, call in enumerate(calls):
        with fast.cache_context("cond"):
            fast(**call)
        if step >= 2:
            with fast.cache_context("uncond"):
                found.append(fast(**call))
    expected = skip_by_hand(model, calls, (2, *COMPUTED[2:]), "quadratic")
    late = skip_by_hand(model, calls[2:], (0, 1, 2, 5), "quadratic")
    assert torch.equal(found[0], expected[2]), "computed: there was nothing to reuse"
    for step in (1, 2, 5):
        assert torch.equal(found[step], late[step])
    for step in (3, 4):
        torch.testing.assert_close(found[step], late[step])
    assert fast.stats.fallbacks == {"missing": 1}


@torch.no_grad()
def test_given_weights_do_not_fit_other_steps():
    """The branch that begins at step 2 has what is planned from step 6 on."""
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, (0, 1, 3, 5, 7), forecast=[[1.5, -0.5]] * len(TIMESTEPS))
    fast = pabc.compile(model, schedule, backend="eager")
    for step, call in enumerate(calls):
        with fast.cache_context("cond"):
            fast(**call)
        if step >= 2:
            with fast.cache_context("uncond"):
                found = fast(**call)
            if step in (2, 4):
                assert torch.equal(found, model(**call)), step
            if step == 6:
                after = [model(**calls[source]) for source in (5, 3)]
                assert torch.equal(found, after[0] * 1.5 + after[1] * -0.5)
    assert fast.stats.fallbacks == {"missing": 2}


@torch.no_grad()
def test_a_generation_that_ends_early_leaves_nothing_behind():
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    fast = pabc.compile(model, Schedule.skip(TIMESTEPS, COMPUTED), backend="eager")
    run(fast, calls[:6])
    fast.reset()
    assert fast.stats.nbytes == 0
    assert_equal(run(fast, calls), skip_by_hand(model, calls, COMPUTED, "linear"))


@torch.no_grad()
def test_another_resolution_computes():
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    fast = pabc.compile(model, Schedule.skip(TIMESTEPS, COMPUTED), backend="eager")
    run(fast, calls[:5])
    larger = {**calls[5], "x_BCTHW": torch.cat([calls[5]["x_BCTHW"]] * 2, dim=-1)}
    assert torch.equal(fast(**larger), model(**larger))
    assert fast.stats.fallbacks == {"shape": 1}


@pytest.mark.parametrize("backend", ["eager", "oracle", "original"])
@torch.no_grad()
def test_a_nan_raises_before_it_spreads(backend):
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED)
    fast = pabc.compile(model, schedule, backend=backend, check_finite=True)
    broken = {**calls[0], "x_BCTHW": calls[0]["x_BCTHW"] * torch.nan}
    with pytest.raises(pabc.GuardError, match="NaN or infinity in the model"):
        fast(**broken)


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("backend", ["eager", "original"])
@torch.no_grad()
def test_bytes_count_the_whole_history(cache_dtype, backend):
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic")
    whole = pabc.compile(model, schedule, backend=backend)
    fast = pabc.compile(model, schedule, backend=backend, cache_dtype=cache_dtype)
    exact, found = run(whole, calls), run(fast, calls)
    assert whole.plan.peak_bytes == 3 * exact[0].nbytes == whole.stats.peak_nbytes
    assert fast.plan.peak_bytes == fast.stats.peak_nbytes < whole.plan.peak_bytes
    for a, b in zip(exact, found, strict=True):
        assert (a - b).norm() < 0.3 * a.norm()


@torch.no_grad()
def test_a_budget_without_room_for_the_history_names_it():
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    nbytes = model(**calls[0]).nbytes
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic")
    fast = pabc.compile(model, schedule, backend="eager", memory_budget=3 * nbytes)
    assert_equal(run(fast, calls), skip_by_hand(model, calls, COMPUTED, "quadratic"))
    fast = pabc.compile(model, schedule, backend="eager", memory_budget=3 * nbytes - 1)
    with pytest.raises(ValueError, match=f"memory_budget: expected {3 * nbytes} bytes"):
        fast(**calls[0])


@torch.no_grad()
def test_a_saved_model_skips_the_same(tmp_path):
    model, calls = FACTORIZED.model(), make_calls(FACTORIZED)
    schedule = Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic").override(
        kind="spatial", mask=[False, True] * 4, forecast="linear"
    )
    fast = pabc.compile(model, schedule)
    expected = run(fast, calls)
    fast.save(tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", copy.deepcopy(model))
    assert loaded.schedule == schedule
    assert_equal(run(loaded, calls), expected)
    assert loaded.stats.captures == 0 and loaded.stats.compiles <= 1, "the skipped call"


@torch.no_grad()
def test_many_generations_at_once():
    model = FACTORIZED.model()
    runs = [make_calls(FACTORIZED, seed=30 * i) for i in range(3)]
    fast = pabc.compile(model, Schedule.none(TIMESTEPS), backend="eager")
    rules = list(POINTS)
    states = [fast.trajectory(Schedule.skip(TIMESTEPS, COMPUTED, forecast=rule)) for rule in rules]
    found = [[] for _ in runs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(len(TIMESTEPS)):
            for i, calls in enumerate(runs):
                with states[i]:
                    found[i].append(fast(**calls[step]))
    for calls, rule, outputs in zip(runs, rules, found, strict=True):
        assert_equal(outputs, skip_by_hand(model, calls, COMPUTED, rule))


def test_why_a_call_cannot_be_skipped_is_said():
    class Writes(OneBranch):
        def forward(self, x, t):
            x[:, -1].fill_(1)
            return super().forward(x, t)

    schedule = Schedule.skip((3, 2, 1), [0, 2])
    fast = pabc.compile(Writes().eval(), schedule, backend="eager")
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="left out: model: every call writes to x; backend='orig"),
    ):
        fast(**OneBranch.call())
