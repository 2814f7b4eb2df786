"""Which step a call is: branches that begin late, rest or end early, calls outside of the loop,
timesteps in any place and shape, and what callers say of their loop."""

import pytest
import torch
from generations import SCHEDULE, TIMESTEPS, assert_equal, compile_eager, generate, make_call
from models import Tiny

import pabc

pytestmark = pytest.mark.runtime
INDICES = pabc.Schedule.from_masks(range(5), SCHEDULE.masks)
"""That names no timesteps."""


@pytest.fixture
def model():
    return Tiny().eval()


def oracle(model, steps, seed=0, spell=lambda t: t):
    """What each of these steps gives; what was not stored is computed."""
    fast = pabc.compile(model, SCHEDULE, backend="oracle")
    found = []
    with fast.trajectory() as run:
        for step in steps:
            run.at_step(step)
            x, t = make_call(seed, step)
            found.append(fast(x, spell(t)))
    return found


def run_named(fast, steps_of, spell=lambda t: t):
    """A generation in which each name is called at its steps, in the order of the names."""
    found = {name: [] for name in steps_of}
    for step in range(len(TIMESTEPS)):
        for seed, (name, steps) in enumerate(steps_of.items()):
            if step in steps:
                x, t = make_call(seed, step)
                with fast.cache_context(name):
                    found[name].append(fast(x, spell(t)))
    return found


@pytest.mark.parametrize("schedule", [SCHEDULE, INDICES], ids=["timesteps", "indices"])
@pytest.mark.parametrize("steps", [(1, 2, 3), (0, 1, 4), (0, 2), (3, 4), (2,)])
def test_a_branch_begins_late_rests_and_ends_early(model, schedule, steps):
    fast = compile_eager(model, schedule)
    for _ in range(2):
        found = run_named(fast, {"cond": range(5), "uncond": steps})
        assert_equal(found["cond"], oracle(model, range(5)))
        assert_equal(found["uncond"], oracle(model, steps, seed=1))
    assert fast.stats.nbytes == 0 or 3 in steps, "held for the last step, which did not come"


@pytest.mark.parametrize("steps", [(1, 2, 3), (2, 3), (0, 2, 3)])
def test_a_late_branch_that_comes_first_is_placed_by_its_timestep(model, steps):
    found = run_named(compile_eager(model), {"uncond": steps, "cond": range(5)})
    assert_equal(found["uncond"], oracle(model, steps))
    assert_equal(found["cond"], oracle(model, range(5), seed=1))


@pytest.mark.parametrize("schedule", [SCHEDULE, INDICES], ids=["timesteps", "indices"])
def test_loops_of_names_after_one_another(model, schedule):
    fast = compile_eager(model, schedule)
    for seed, name in enumerate(("cond", "uncond", "cond")):
        with fast.cache_context(name):
            assert_equal(generate(fast, seed), oracle(model, range(5), seed))


def test_a_branch_that_rested_begins_with_the_generation(model):
    """What it kept in the generation before is another prompt's."""
    fast = compile_eager(model, INDICES)
    run_named(fast, {"cond": range(5), "uncond": range(2)})
    found = run_named(fast, {"cond": range(5), "uncond": range(1, 5)})
    assert_equal(found["uncond"], oracle(model, range(1, 5), seed=1))


@pytest.mark.parametrize(
    ("before", "count"),
    [(0.0, 1), (1.0, 1), (500.0, 1), (999.0, 1), (100.0, 1), (0.0, 3), (1.0, 2), (500.0, 2)],
)
def test_calls_before_the_loop_are_no_steps(model, before, count):
    fast = compile_eager(model)
    expected = oracle(model, range(5))
    for _ in range(3):
        for _ in range(count):
            x = make_call(7, 0)[0]
            t = torch.full((2,), before)
            assert torch.equal(fast(x, t), model(x, t))
        assert_equal(generate(fast, 0), expected)
    assert fast.stats.outside == 2 * count, "once the timestep is known"
    assert fast.stats.nbytes == 0


def test_calls_before_the_loop_that_reused_something_are_told_of(model):
    """Two unlike timesteps in no known spelling look like a loop."""
    fast = compile_eager(model)
    for t in (999.0, 0.55):
        fast(make_call(7, 0)[0], torch.full((2,), t))
    with pytest.raises(pabc.GuardError, match=r"the calls before were none of the loop's.*reset"):
        fast(*make_call(0, 0))
    assert_equal(generate(fast, 0), oracle(model, range(5)))


def test_a_call_between_generations_is_outside(model):
    """As an autoregressive model makes, to keep the keys and values of what is done."""
    fast = compile_eager(model)
    expected = oracle(model, range(5))
    for _ in range(3):
        assert_equal(generate(fast, 0), expected)
        x, t = make_call(3, 0)[0], torch.zeros(2)
        assert torch.equal(fast(x, t), model(x, t))
    assert fast.stats.outside == 3 and fast.stats.generations == 3


def test_a_loop_of_other_timesteps_is_warned_of_once(model):
    fast = compile_eager(model)
    generate(fast, 0)
    x, others = make_call(0, 0)[0], (890.0, 640.0, 440.0, 240.0, 40.0)
    with pytest.warns(UserWarning, match="make the schedule from the timesteps") as warned:
        found = [fast(x, torch.full((2,), t)) for t in others]
    assert_equal(found, [model(x, torch.full((2,), t)) for t in others])
    assert len(warned) == 1 and fast.stats.outside == 5


class Spelled(Tiny):
    """Takes the timestep as the largest of any number of elements."""

    def forward(self, x, t):
        return super().forward(x, t.flatten(1).amax(1))


def per_token(t):
    return t[:, None].expand(-1, 6)


def of_frames_of_which_one_is_clean(t):
    return torch.stack([torch.zeros_like(t), t, t], 1)[:, :, None]


@pytest.mark.parametrize("spell", [per_token, of_frames_of_which_one_is_clean])
def test_timesteps_of_tokens_and_frames(spell):
    model = Spelled().eval()
    fast = compile_eager(model)
    x, t = make_call(3, 0)[0], spell(torch.ones(2))
    assert torch.equal(fast(x, t), model(x, t))
    for _ in range(2):
        found = [fast(x, spell(t)) for x, t in (make_call(0, step) for step in range(5))]
        assert_equal(found, oracle(model, range(5), spell=spell))
    for step in (0, 1):
        x, t = make_call(0, step)
        fast(x, spell(t))
    with pytest.raises(pabc.GuardError, match="timestep 500 at step 2, found 300, that of step 3"):
        fast(x, spell(make_call(0, 3)[1]))


class Lists(Tiny):
    def forward(self, xs, t):
        return list(super().forward(torch.stack(xs), t).unbind(0))


def test_the_timestep_is_found_where_the_structure_changes():
    """Guidance as two samples in a list, then one: the leaf after them has another place."""
    model = Lists().eval()
    fast = compile_eager(model, pabc.Schedule.none(TIMESTEPS))
    for step in range(5):
        x, t = make_call(0, step)
        count = 2 if step < 3 else 1
        call = list(x)[:count], t[:count]
        assert_equal(fast(*call), model(*call))
    fast(list(x), make_call(0, 0)[1])
    with pytest.raises(pabc.GuardError, match="timestep 700 at step 1, found 300"):
        fast(list(x)[:1], make_call(0, 3)[1][:1])


@pytest.mark.parametrize("schedule", [SCHEDULE, INDICES], ids=["timesteps", "indices"])
@pytest.mark.parametrize(
    "steps", [range(5), (0, 1, 3, 4), (0, 2, 3), (2, 3, 4), (3, 4, 3, 4), (1, 0, 1)]
)
def test_the_step_that_a_context_says_is_taken(model, schedule, steps):
    fast, found = compile_eager(model, schedule), []
    reference = pabc.compile(model, SCHEDULE, backend="oracle")
    expected, last = [], -1
    for step in steps:
        where = {"step_index": step, "num_inference_steps": 5, "sigma": TIMESTEPS[step] / 1000}
        with fast.cache_context("cond", **where, unknown=1):
            found.append(fast(*make_call(0, step)))
        if step < last:
            reference.reset()
        reference.current.at_step(step)
        expected.append(reference(*make_call(0, step)))
        last = step
    assert_equal(found, expected)


def test_a_step_that_is_repeated_finds_what_it_found_before(model):
    fast, found = compile_eager(model), []
    for step in (0, 1, 1, 2, 3, 3, 4):
        with fast.cache_context("cond", step_index=step):
            found.append(fast(*make_call(0, step)))
    assert torch.equal(found[1], found[2]) and torch.equal(found[4], found[5])
    assert_equal([found[i] for i in (0, 1, 3, 4, 6)], oracle(model, range(5)))
    assert not fast.stats.fallbacks and fast.stats.nbytes == 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps: expected 5, as many as .*, found 4"),
        ({"step_index": 7}, "expected a step below 5, .* found 7; make the schedule"),
        ({"sigma": 0.5}, r"sigma: expected that of step 1, .* 700, found 0.5, that of step 2"),
        ({"timestep": torch.tensor(650.0)}, "timestep: expected that of step 1.*no step's"),
    ],
)
def test_what_a_context_says_is_checked(model, where, message):
    fast = compile_eager(model)
    fast(*make_call(0, 0))
    with (
        pytest.raises(pabc.GuardError, match=message),
        fast.cache_context("cond", **{"step_index": 1, **where}),
    ):
        fast(*make_call(0, 1))
    assert fast.stats.nbytes == 0
    with pytest.raises(TypeError, match=r"step_index: expected an integer, found 1\.5"):
        fast.cache_context("cond", step_index=1.5)


@pytest.mark.parametrize("states_step", [False, True])
def test_what_a_context_says_is_checked_where_another_states_the_step(model, states_step):
    """Checks both ways: `at_step` states the step, or nobody does, and the calls are counted."""
    fast = compile_eager(model)
    says = {"num_inference_steps": 5, "sigma": 0.9, "timestep": torch.tensor(900.0)}
    if states_step:
        fast.current.at_step(0)
    with fast.cache_context("cond", **says):
        fast(*make_call(0, 0))
    if states_step:
        fast.current.at_step(1)
    says = {"sigma": 0.5} if states_step else {"num_inference_steps": 4}
    with (
        pytest.raises(pabc.GuardError, match=rf"{next(iter(says))}: expected .*, found"),
        fast.cache_context("cond", **says),
    ):
        fast(*make_call(0, 1))
    assert fast.stats.nbytes == 0


def test_a_stated_step_that_the_timestep_contradicts(model):
    fast = compile_eager(model)
    for step in range(2):
        with fast.cache_context("cond", step_index=step):
            fast(*make_call(0, step))
    with (
        pytest.raises(pabc.GuardError, match="timestep 500 at step 2, found 300, that of step 3"),
        fast.cache_context("cond", step_index=2),
    ):
        fast(*make_call(0, 3))


def test_the_timestep_that_a_context_says_places_a_call():
    """Where the model itself gets it in no known spelling."""
    model = Tiny().eval()
    fast, unlike = compile_eager(model), lambda t: t.log() / 4
    expected = oracle(model, range(5), spell=unlike)
    for _ in range(2):
        x, t = make_call(3, 0)
        with fast.cache_context("cond", timestep=0.0):
            assert torch.equal(fast(x, unlike(t + 1)), model(x, unlike(t + 1)))
        for step in range(5):
            x, t = make_call(0, step)
            with fast.cache_context("cond", sigma=TIMESTEPS[step] / 1000, timestep=t):
                assert torch.equal(fast(x, unlike(t)), expected[step])


@pytest.mark.parametrize("stated", [1, 4])
def test_calls_that_state_nothing_after_stated_ones(model, stated):
    """The first one skips a step, which its timestep tells: that of the stated calls is known."""
    fast = compile_eager(model)
    run_stated(fast, range(stated))
    with fast.cache_context("uncond"):
        found = [fast(*make_call(1, step)) for step in range(stated, 5)]
        fast.schedule = pabc.Schedule.pyramid((950, 850, 650, 450), mlp=2)
        x, t = make_call(2, 0)[0], torch.full((2,), 950.0)
        assert torch.equal(fast(x, t), model(x, t)), "the first step of another generation"
    assert_equal(found, oracle(model, range(stated, 5), seed=1))


def test_another_timestep_after_stated_steps(model):
    fast = compile_eager(model)
    run_stated(fast, range(2))
    x, t = make_call(0, 2)
    with (
        pytest.raises(pabc.GuardError, match="timestep 500 at step 2, found 507, no step's"),
        fast.cache_context("cond"),
    ):
        fast(x, t + 7)


def run_stated(fast, steps):
    for step in steps:
        with fast.cache_context("cond", step_index=step):
            fast(*make_call(0, step))
