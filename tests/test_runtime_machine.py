"""Calls, branches, resets, exceptions and threads in any order, against a dictionary."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

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
class State:
    """What a sequence of calls has come to."""

    schedule: pabc.Schedule
    step: int = 0
    source: object = None
    kept: dict = field(default_factory=dict)


class Reference:
    """The same by hand: per trajectory and branch a step, and a dictionary of what is kept."""

    def __init__(self, model):
        self.model, self.states, self.schedule = model, {}, SCHEDULES[0]
        self.num_replaced = 0

    def state(self, key):
        """Where the next call stands; the schedule is chosen as a generation begins."""
        return replace(self.states.get(key, State(self.schedule)))

    def call(self, key, x, t, text):
        state = self.states[key] = self.state(key)
        source = (x.shape, t.dtype, self.num_replaced)
        if source != state.source:
            state.source, state.kept = source, {}
        planned = [at for at in self.slots() if self.reuses(state, at, state.step)]
        reuse = all(at in state.kept for at in planned)
        values, m = {}, self.model
        h, shift = m.proj(x) + m.text(text), t[:, None, None] / 1000
        for layer, block in enumerate(m.blocks):
            for kind, branch in (("full", self.attend), ("mlp", lambda b, h, s: b.mlp(h))):
                at = kind, layer
                use = reuse and at in planned
                values[at] = state.kept[at] if use else branch(block, h, shift)
                h = h + (shift * values[at] if kind == "full" else values[at])
        state.step += 1
        read_next = [at for at in values if self.reuses(state, at, state.step)]
        state.kept = {at: values[at] for at in read_next}
        if state.step == state.schedule.num_steps:
            del self.states[key]
        return m.head(h)

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
        return sum(4 * v.numel() for state in self.states.values() for v in state.kept.values())

    def reset(self, run):
        self.states = {key: state for key, state in self.states.items() if key[0] != run}


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
        self.fast.reset()
        self.fast.schedule = SCHEDULES[0]
        self.reference = Reference(MODEL)
        self.runs = {run: self.fast.trajectory() for run in (1, 2, 3)}
        self.texts = {run: torch.randn(1, 1, 3) for run in range(4)}

    def teardown(self):
        for run in range(4):
            self.reset(run)

    def enter(self, run):
        return self.runs[run] if run else nullcontext()

    def make_call(self, run, name, tokens, dtype):
        state = self.reference.state((run, name))
        t = torch.full((2,), state.schedule.timesteps[state.step], dtype=dtype)
        return torch.randn(2, tokens, 4), t, self.texts[run]

    def call(self, run, name, call):
        with self.enter(run), self.fast.cache_context(name) if name else nullcontext():
            return self.fast(*call)

    @rule(run=RUNS, name=NAMES, tokens=TOKENS, dtype=DTYPES, count=st.integers(1, 6))
    def step(self, run, name, tokens, dtype, count):
        for _ in range(count):
            call = self.make_call(run, name, tokens, dtype)
            found = self.call(run, name, call)
            assert torch.equal(found, self.reference.call((run, name), *call))

    @rule(runs=st.sets(RUNS, min_size=2), name=NAMES, count=st.integers(1, 3))
    def steps_in_threads(self, runs, name, count):
        def work(run, calls):
            return [self.call(run, name, call) for call in calls]

        calls = {run: [] for run in runs}
        expected = {run: [] for run in runs}
        for run in runs:
            for _ in range(count):
                calls[run].append(self.make_call(run, name, 6, torch.float32))
                expected[run].append(self.reference.call((run, name), *calls[run][-1]))
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
        x, *others = self.make_call(run, name, 6, torch.float32)
        state = self.reference.state((run, name))
        stores = [
            self.reference.reuses(state, at, state.step + 1)
            and not self.reference.reuses(state, at, state.step)
            for at in self.reference.slots()
        ]
        if any(stores):
            with pytest.raises(pabc.GuardError, match="NaN"):
                self.call(run, name, (x * torch.nan, *others))
            self.reference.reset(run)

    @rule(run=RUNS, name=NAMES)
    def bring_another_timestep(self, run, name):
        x, t, text = self.make_call(run, name, 6, torch.float32)
        if self.reference.state((run, name)).step > 1:
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
