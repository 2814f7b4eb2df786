"""Calls, branches, resets, exceptions and threads in any order, against a dictionary."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from models import Tiny

import pabc
from pabc.runtime.clock import Clock

pytestmark = pytest.mark.runtime

SCHEDULES = (
    pabc.Schedule.pyramid((900, 700, 500, 300, 100), full=2, mlp=3),
    pabc.Schedule.pyramid((800, 400, 200), full=3),
    pabc.Schedule.pyramid((950, 850, 650, 450), mlp=2).override(kind="full", layers=1, every=4),
    pabc.Schedule.none((600, 60)),
)
RUNS = st.integers(0, 3)
NAMES = st.sampled_from([None, "cond", "uncond"])
TOKENS = st.sampled_from([6, 6, 6, 4])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float32, torch.float16])


class Captioned(Tiny):
    """With a text that is projected once a generation."""

    def __init__(self):
        super().__init__()
        self.text = torch.nn.Linear(3, 8)

    def forward(self, x, t, text):
        h = self.proj(x) + self.text(text)
        for block in self.blocks:
            h = block(h, t[:, None, None] / 1000)
        return self.head(h)


@dataclass
class Branch:
    """What the calls of one name have come to."""

    last: int = -1
    source: object = None
    kept: dict = field(default_factory=dict)


@dataclass
class State:
    """A generation."""

    schedule: pabc.Schedule
    step: int = -1
    branches: dict = field(default_factory=dict)


class Reference:
    """The same by hand: per trajectory a step, and per branch a dictionary of what is kept."""

    def __init__(self, model):
        self.model, self.states, self.schedule = model, {}, SCHEDULES[0]
        self.num_replaced = 0

    def state(self, run):
        """The generation; its schedule is chosen as it begins."""
        return self.states.get(run) or State(self.schedule)

    def next_step(self, run, name, late=False):
        """Which step the next call of this name may be, in which schedule; `late`: not the first
        that it may be."""
        state = self.state(run)
        begin = self.schedule, 0
        if state.step < 0:
            return begin
        num_steps = state.schedule.num_steps
        after = (state.schedule, state.step + 1) if state.step + 1 < num_steps else begin
        is_called = state.branches.get(name, Branch()).last == state.step
        return after if is_called or late else (state.schedule, state.step)

    def call(self, run, name, schedule, step, x, t, text, may_repeat=False):
        state = self.state(run)
        if step == 0 and (state.step != 0 or state.branches.get(name, Branch()).last == 0):
            state = State(schedule)
        self.states[run] = state
        if step != state.step:
            state.step = step
            for other, branch in state.branches.items():
                kept = branch.kept.items()
                branch.kept = {at: (v, until) for at, (v, until) in kept if until >= step}
                if step + 1 == schedule.num_steps and branch.last + 1 < step and other != name:
                    branch.kept = {}
        branch = state.branches.setdefault(name, Branch())
        source = (x.shape, t.dtype, self.num_replaced)
        if source != branch.source:
            branch.source, branch.kept = source, {}
        branch.last = step
        planned = [at for at in self.slots() if self.reuses(state, at, step)]
        reuse = all(at in branch.kept for at in planned)
        values, m = {}, self.model
        h, shift = m.proj(x) + m.text(text), t[:, None, None] / 1000
        for layer, block in enumerate(m.blocks):
            for kind, compute in (("full", self.attend), ("mlp", lambda b, h, s: b.mlp(h))):
                at = kind, layer
                use = reuse and at in planned
                values[at] = branch.kept[at][0] if use else compute(block, h, shift)
                h = h + (shift * values[at] if kind == "full" else values[at])
        fresh = {
            at: (value, self.until(state, at, step))
            for at, value in values.items()
            if self.until(state, at, step) > step
        }
        stays = may_repeat and step + 1 < state.schedule.num_steps
        branch.kept = (branch.kept if stays else {}) | fresh
        return m.head(h)

    def until(self, state, at, step):
        """The last step that may read what this one computes: reuse follows without a gap."""
        while self.reuses(state, at, step + 1):
            step += 1
        return step

    def attend(self, block, h, shift):
        q, k, v = block.qkv(block.norm(h) + shift).unflatten(-1, (3, 2, -1)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return block.out(o.transpose(1, 2).flatten(2))

    def slots(self):
        return [(kind, layer) for layer in range(2) for kind in ("full", "mlp")]

    def reuses(self, state, at, step):
        mask = state.schedule.mask_of(pabc.SlotSpec("", *at))
        return step < state.schedule.num_steps and mask[step]

    def nbytes(self):
        branches = [b for state in self.states.values() for b in state.branches.values()]
        return sum(4 * v.numel() for branch in branches for v, _ in branch.kept.values())

    def reset(self, run):
        self.states.pop(run, None)


def build():
    torch.manual_seed(0)
    return Captioned().eval().requires_grad_(False)


def compile_eager(**options):
    return pabc.compile(MODEL, SCHEDULES[0], backend="eager", check_finite=True, **options)


MODEL = build()


class Runtime(RuleBasedStateMachine):
    """Trajectory 0 is the default one, 1 to 3 are independent."""

    fast = compile_eager()

    def __init__(self):
        super().__init__()
        self.forget_timesteps()
        self.fast.schedule = SCHEDULES[0]
        self.reference = Reference(MODEL)
        self.runs = {run: self.fast.trajectory() for run in (1, 2, 3)}
        self.texts = {run: torch.randn(1, 1, 3) for run in range(4)}

    def forget_timesteps(self):
        """Which argument is the timestep is to be found anew, not what earlier examples found."""
        known = self.fast._programs.timesteps
        for timesteps in {schedule.timesteps for schedule in SCHEDULES}:
            known.set(timesteps, ())
        self.fast._default._clock = Clock(known)
        self.fast.reset()

    def teardown(self):
        for run in range(4):
            self.reset(run)

    def enter(self, run):
        return self.runs[run] if run else nullcontext()

    def make_call(self, run, name, tokens, dtype, late=False):
        """The schedule and the step, and what the model is given."""
        schedule, step = self.reference.next_step(run, name, late)
        t = torch.full((2,), schedule.timesteps[step], dtype=dtype)
        return schedule, step, torch.randn(2, tokens, 4), t, self.texts[run]

    def call(self, run, name, call):
        with self.enter(run), self.fast.cache_context(name) if name else nullcontext():
            return self.fast(*call)

    @rule(
        run=RUNS,
        name=NAMES,
        tokens=TOKENS,
        dtype=DTYPES,
        count=st.integers(1, 6),
        late=st.booleans(),
    )
    def step(self, run, name, tokens, dtype, count, late):
        """Calls of one name, of which others may have made some in the step that is under way;
        `late`: it skips that step, and begins the next one."""
        for _ in range(count):
            call = self.make_call(run, name, tokens, dtype, late)
            found = self.call(run, name, call[2:])
            assert torch.equal(found, self.reference.call(run, name, *call))

    @rule(
        run=RUNS,
        name=st.sampled_from(["cond", "uncond"]),
        count=st.integers(1, 4),
        skip=st.integers(0, 2),
    )
    def steps_that_are_stated(self, run, name, count, skip):
        """As newer pipelines do; steps may be skipped."""
        for _ in range(count):
            schedule, step, x, t, text = self.make_call(run, name, 6, torch.float32)
            if 0 < step < schedule.num_steps - skip:
                step += skip
                t = torch.full((2,), schedule.timesteps[step])
            with (
                self.enter(run),
                self.fast.cache_context(
                    name, step_index=step, num_inference_steps=schedule.num_steps
                ),
            ):
                found = self.fast(x, t, text)
            assert torch.equal(
                found, self.reference.call(run, name, schedule, step, x, t, text, may_repeat=True)
            )

    @rule(runs=st.sets(RUNS, min_size=2), name=NAMES, count=st.integers(1, 3))
    def steps_in_threads(self, runs, name, count):
        def work(run, calls):
            return [self.call(run, name, call) for call in calls]

        calls = {run: [] for run in runs}
        expected = {run: [] for run in runs}
        for run in runs:
            for _ in range(count):
                call = self.make_call(run, name, 6, torch.float32)
                calls[run].append(call[2:])
                expected[run].append(self.reference.call(run, name, *call))
        with ThreadPoolExecutor(len(runs)) as pool:
            futures = {run: pool.submit(work, run, calls[run]) for run in runs}
        for run in runs:
            assert all(map(torch.equal, futures[run].result(), expected[run]))

    @rule(run=RUNS)
    def reset(self, run):
        with self.enter(run):
            self.fast.reset()
        self.reference.reset(run)

    @rule(run=RUNS)
    def drop(self, run):
        if run:
            self.runs[run] = self.fast.trajectory()
            self.reference.reset(run)

    @rule(run=st.integers(1, 3))
    def raise_between_steps(self, run):
        with pytest.raises(ZeroDivisionError), self.runs[run]:
            _ = 1 / 0
        self.reference.reset(run)

    @rule(run=RUNS, name=NAMES)
    def raise_before_a_step(self, run, name):
        with pytest.raises(TypeError):
            self.call(run, name, (1, 2, 3, 4, 5))
        self.reference.reset(run)

    @rule(run=RUNS, name=NAMES)
    def raise_while_storing(self, run, name):
        schedule, step, x, *others = self.make_call(run, name, 6, torch.float32)
        state = State(schedule)
        stores = [
            self.reference.reuses(state, at, step + 1)
            and not self.reference.reuses(state, at, step)
            for at in self.reference.slots()
        ]
        if any(stores):
            with pytest.raises(pabc.GuardError, match="NaN"):
                self.call(run, name, (x * torch.nan, *others))
            self.reference.reset(run)

    @rule(run=RUNS, name=NAMES)
    def bring_another_timestep(self, run, name):
        _, _, x, t, text = self.make_call(run, name, 6, torch.float32)
        state = self.reference.state(run)
        takes_part = state.branches.get(name, Branch()).last >= 0
        if takes_part and 0 < state.step < state.schedule.num_steps - 1:
            with pytest.raises(pabc.GuardError, match="expected timestep"):
                self.call(run, name, (x, t + 7, text))
            self.reference.reset(run)

    @rule(schedule=st.sampled_from(SCHEDULES))
    def change_the_schedule(self, schedule):
        self.fast.schedule = self.reference.schedule = schedule

    @rule(run=RUNS)
    def change_the_text_in_place(self, run):
        self.texts[run].mul_(-1)

    @rule(run=RUNS)
    def change_the_text(self, run):
        self.texts[run] = torch.randn(1, 1, 3)

    @rule()
    def change_weights_in_place(self):
        MODEL.blocks[0].qkv.weight.mul_(-1)
        MODEL.text.weight.mul_(-1)

    @rule()
    def replace_weights(self):
        weight = torch.nn.Parameter(-MODEL.blocks[1].out.weight, requires_grad=False)
        MODEL.blocks[1].out.weight = weight
        self.reference.num_replaced += 1

    @invariant()
    def bytes_add_up(self):
        expected = self.reference.nbytes()
        assert self.fast.stats.nbytes == expected
        runs = [self.fast._default, *self.runs.values()]
        assert sum(run.nbytes for run in runs) == expected


class Replayed(Runtime):
    """Phases are replayed."""

    fast = compile_eager(cudagraphs=True)


@pytest.mark.parametrize("machine", [Runtime, Replayed])
@pytest.mark.usefixtures("graphs_on_cpu")
def test_any_order_of_events_equals_the_reference(machine):
    gc.collect()
    examples = settings(max_examples=100, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(machine, settings=examples)
    assert machine.fast.stats.captures <= 4, "two shapes, two dtypes"
    assert (machine.fast.stats.recordings > 0) == (machine is Replayed)
