"""Random schedules with forecasts: every backend gives what the guarded graph gives."""

import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import MODELS

import pabc
from pabc import Schedule

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText", "OneStream", "Refined")]
STEPS = 6
RULES = ["hold", "linear", "quadratic"]
NUMBERS = st.floats(-2, 2, width=32)


def rows_of(depth):
    row = st.lists(NUMBERS, min_size=depth, max_size=depth)
    return st.lists(row, min_size=STEPS, max_size=STEPS)


@st.composite
def schedules(draw, kinds):
    """Draws masks, forecasts and units; and an override of the first layer of one kind."""
    masks = {
        kind: [False, *draw(st.lists(st.booleans(), min_size=STEPS - 1, max_size=STEPS - 1))]
        for kind in kinds
    }
    forecasts = {
        kind: draw(st.sampled_from(RULES) | rows_of(draw(st.integers(1, 3)))) for kind in kinds
    }
    timesteps = draw(st.lists(st.integers(100, 999), min_size=STEPS, max_size=STEPS, unique=True))
    units = draw(st.sampled_from(["step", "timestep"]))
    schedule = Schedule.from_masks(
        sorted(timesteps, reverse=True), masks, forecast=forecasts, units=units
    )
    kind = draw(st.sampled_from(sorted(kinds)))
    mask = [False, *draw(st.lists(st.booleans(), min_size=STEPS - 1, max_size=STEPS - 1))]
    return schedule.override(kind=kind, layers=0, mask=mask, forecast=draw(st.sampled_from(RULES)))


@pytest.fixture(scope="module")
def compiled():
    """Returns a function that compiles the model of a case once for each set of options."""
    known = {}

    def get(case, **options):
        key = (case.name, *options.items())
        if key not in known:
            known[key] = pabc.compile(case.model(), Schedule.none(range(STEPS)), **options)
        return known[key]

    return get


def make_call(case, schedule, step):
    """Returns the arguments of a step, with the timestep that the schedule has."""
    call = case.call(step)
    return {**call, "t_B": torch.full_like(call["t_B"], schedule.timesteps[step])}


def run(fast, schedule, case):
    """Returns the outputs of one generation; all that is kept is freed by its end."""
    fast.reset()
    fast.schedule = schedule
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedules that reuse nothing
        outputs = [fast(**make_call(case, schedule, step)) for step in range(STEPS)]
    assert fast.stats.nbytes == 0
    return outputs


def is_possible(fast, schedule, case):
    """Returns whether no row of weights is deeper than what was computed before its step."""
    fast.schedule = Schedule.none(range(STEPS))
    fast.reset()
    with torch.no_grad():
        fast(**make_call(case, fast.schedule, 0))
    try:
        schedule.plan(fast._captured("")[0].slots)
    except ValueError as error:
        if "as many values are stored by then" not in str(error):
            raise
        return False
    return True


BACKENDS = [
    {"backend": "eager"},
    {"backend": "eager", "cache_dtype": "bf16"},
    {"backend": "eager", "cudagraphs": True},
]


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("graphs_on_cpu")
def test_random_schedules_equal_the_oracle(case, options, compiled):
    oracle = compiled(case, **{**options, "backend": "oracle", "cudagraphs": False})
    fast = compiled(case, **options)

    @settings(max_examples=15, deadline=None)
    @given(schedules(sorted({*case.kinds, "mlp", "block", "stack", "model"} - {"other"})))
    def check(schedule):
        assume(is_possible(oracle, schedule, case))
        pairs = zip(run(fast, schedule, case), run(oracle, schedule, case), strict=True)
        for step, (found, expected) in enumerate(pairs):
            assert torch.equal(found, expected), step
        assert fast.stats.fallbacks == {}

    check()


NESTED = {
    "full": "#.#.#.",
    "mlp": "##....",
    "block": "##.##.",
    "stack": "#..#.#",
    "model": "####.#",
}
FORECASTS = {
    "full": "linear",
    "mlp": [[1.0], [1.0], [1.0], [0.75], [1.0], [1.25]],
    "stack": "quadratic",
    "model": "linear",
}


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "bf16"}], ids=str)
def test_nested_forecasts_on_inductor(options, compiled):
    (case,) = (c for c in CASES if c.name == "Refined")
    masks = {kind: [symbol == "." for symbol in row] for kind, row in NESTED.items()}
    timesteps = range(900, 300, -100)
    schedule = Schedule.from_masks(timesteps, masks, forecast=FORECASTS, units="timestep")
    fast, oracle = compiled(case, **options), compiled(case, backend="oracle", **options)
    pairs = zip(run(fast, schedule, case), run(oracle, schedule, case), strict=True)
    for step, (found, expected) in enumerate(pairs):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=str(step))
    kinds = {slot.kind for j, slot in enumerate(fast.plan.slots) if fast.plan.reuse[:, j].any()}
    assert kinds == set(NESTED)
