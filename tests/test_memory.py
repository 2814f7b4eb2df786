"""Bytes that slots take: predicted, counted by the runtime, and counted from the live tensors."""

import gc
import re
from contextlib import contextmanager
from dataclasses import replace

import generations
import pytest
import torch
import zoo
from generations import TIMESTEPS
from models import MODELS, Tiny
from stages import copy_graph

import pabc
from pabc import passes
from pabc.runtime.phases import check_fp8

FACTORIZED = next(case for case in MODELS if case.name == "Factorized")
ENTRIES = [entry for entry in zoo.ENTRIES if entry.name in ("Latte", "CogVideoX", "Wan")]
STEPS = 8
EVERY = {"spatial": 2, "temporal": 3, "cross": 5, "full": 2, "joint": 3, "mlp": 4}


def pyramid(kinds, steps=STEPS):
    masks = {kind: [i % EVERY[kind] != 0 for i in range(steps)] for kind in kinds}
    return pabc.Schedule.from_masks(range(steps), masks)  # the calls bring one timestep


def generate(fast, call, steps=STEPS):
    with torch.no_grad():
        for _ in range(steps):
            fast(**call)


@pytest.fixture
def capture_once(monkeypatch):
    """The graphs of one model, for the same call each time."""
    capture, kept = passes.capture, {}

    def captured(model, *args, **options):
        if id(model) not in kept:
            kept[id(model)] = model, *capture(model, *args, **options)
        _, gm, known = kept[id(model)]
        return copy_graph(gm), known

    monkeypatch.setattr(passes, "capture", captured)


@contextmanager
def only_new_objects():
    """Within it, the collector knows of no object that there was before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes():
    """Bytes of the memory that tensors keep alive."""
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def kept_after(plan, step):
    """What the plan says that slots hold between a step and the next."""
    if step + 1 == plan.num_steps:
        return 0
    return sum(s.nbytes for s, r in zip(plan.slots, plan.reuse[step + 1], strict=True) if r)


OPTIONS = {
    "keep": {},
    "bf16": {"cache_dtype": "bf16"},
    "fp8": {"cache_dtype": "fp8"},
    "budget": {"memory_budget": 0.6},
    "fp8, budget": {"cache_dtype": "fp8", "memory_budget": 0.6},
    "offload": {"offload": "cpu"},
}


@pytest.mark.runtime
@pytest.mark.parametrize(
    "entry", [ENTRIES[0], *(pytest.param(e, marks=pytest.mark.slow) for e in ENTRIES[1:])], ids=str
)
def test_predicted_bytes_are_the_measured_ones(entry, add_row, capture_once):
    model, call = entry.build()
    kinds = set(pabc.explain(model, **call).attention.values()) - {"other"}
    schedule = pyramid([*kinds, "mlp"])
    full = pabc.explain(model, schedule=schedule, **call).plan.peak_bytes
    for name, given in OPTIONS.items():
        options = dict(given)
        if "memory_budget" in options:
            options["memory_budget"] = int(options["memory_budget"] * full)
        if name == "fp8, budget":
            options["memory_budget"] //= 4
        before = pabc.explain(model, schedule=schedule, **options, **call)
        fast = pabc.compile(model, schedule, backend="eager", **options)
        generate(fast, call)
        predicted, measured = before.plan.peak_bytes, fast.stats.peak_nbytes
        assert before.plan == fast.plan
        assert abs(predicted - measured) <= 0.01 * measured
        assert predicted <= options.get("memory_budget", full)
        assert fast.stats.nbytes == 0, "all is freed after the last step"
        assert f"({predicted} bytes) at the fullest step" in str(fast.explain())
        add_row(
            "predicted and measured peak bytes",
            model=entry.name,
            options=name,
            predicted=predicted,
            measured=measured,
        )


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["keep", "fp8"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_live_memory_is_what_the_plan_says_after_each_step(backend, name):
    """Storages, not tensors: a cut that is a part of a larger buffer would show."""
    model, call = FACTORIZED.model().eval(), FACTORIZED.call()
    steps = 4
    schedule = pyramid(["spatial", "temporal", "cross", "mlp"], steps)
    none = pabc.Schedule.none(range(steps, 0, -1))
    found = {}
    for which in (schedule, none):
        fast = pabc.compile(model, which, backend=backend, **OPTIONS[name])
        generate(fast, call, steps)
        sizes = []
        with torch.no_grad(), only_new_objects():
            start = live_bytes()
            for _ in range(steps):
                fast(**call)
                sizes.append(live_bytes() - start)
        found[which] = sizes, fast.plan
    sizes, plan = found[schedule]
    others, _ = found[none]  # what a generation holds besides: hoisted values
    expected = [kept_after(plan, step) for step in range(steps)]
    assert [a - b for a, b in zip(sizes, others, strict=True)] == expected
    assert max(expected) > 0


@pytest.mark.runtime
def test_two_guidance_calls_take_twice_as_much():
    model, call = FACTORIZED.model().eval(), FACTORIZED.call()
    fast = pabc.compile(model, pyramid(["spatial", "cross"]), backend="eager")
    for _ in range(STEPS):
        for name in ("cond", "uncond"):
            with fast.cache_context(name), torch.no_grad():
                fast(**call)
    assert fast.stats.peak_nbytes <= 2 * fast.plan.peak_bytes
    assert fast.stats.peak_nbytes > 1.5 * fast.plan.peak_bytes


@pytest.mark.runtime
@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_eager_equals_the_oracle_bit_for_bit(cache_dtype):
    model, calls = FACTORIZED.model().eval(), [FACTORIZED.call(step) for step in range(STEPS)]
    schedule = pyramid(["spatial", "temporal", "cross", "mlp"])
    runs = []
    for backend in ("eager", "oracle"):
        fast = pabc.compile(model, schedule, backend=backend, cache_dtype=cache_dtype)
        with torch.no_grad():
            runs.append(torch.stack([fast(**call) for call in calls]))
    assert torch.equal(*runs)


ROUNDING = {"bf16": 2.0**-8, "fp8": 2.0**-4}
"""By how much of itself a value of the format may be off."""


def off(found, expected):
    """By how much of the expected output's size each step's is off: root mean squares."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@pytest.mark.runtime
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.name != "CogVideoX"], ids=str)
def test_outputs_are_off_by_no_more_than_the_format_rounds(entry, add_row, capture_once):
    """Each value kept is off by a part of itself at most, and branches are but a part of the
    stream. Of the two formats' 8 and 4 bits, one makes a sixteenth of the other's error.
    """
    model, call = entry.build()
    kinds = set(pabc.explain(model, **call).attention.values()) - {"other"}
    schedule, start = pyramid(kinds), call.pop("hidden_states")
    torch.manual_seed(1)
    latents = [start + 0.1 * step * torch.randn_like(start) for step in range(STEPS)]
    runs = {}
    for name in ("keep", "bf16", "fp8", "none"):
        which = pabc.Schedule.none(schedule.timesteps) if name == "none" else schedule
        options = OPTIONS.get(name, {})
        fast = pabc.compile(model, which, backend="eager", **options)
        with torch.no_grad():
            runs[name] = torch.stack([fast(hidden_states=x, **call)[0] for x in latents])
    error = {name: off(run, runs["keep"]) for name, run in runs.items()}
    for name, rounding in ROUNDING.items():
        assert error[name][0] == 0, "the first step computes all"
        assert 0 < error[name].max() <= rounding
        add_row(
            "error of the forms in which slots are kept, against keep (largest of the steps)",
            model=entry.name,
            form=name,
            error=f"{error[name].max():.1e}",
            bound=f"{rounding:.1e}",
            reuse=f"{error['none'].max():.1e}",
        )
    assert 8 < error["fp8"].norm() / error["bf16"].norm() < 32


@pytest.mark.runtime
@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_inductor_equals_the_oracle_but_for_ties(cache_dtype):
    """What Inductor computes differs in the last bits. So some values that are stored round to the
    neighbor of the oracle's; all that does not follow from these is equal within 1e-5.
    """
    steps = 4
    model, calls = FACTORIZED.model().eval(), [FACTORIZED.call(step) for step in range(steps)]
    schedule = pyramid(["spatial", "temporal", "cross", "mlp"], steps)
    runs = []
    for backend in ("oracle", "inductor"):
        fast = pabc.compile(model, schedule, backend=backend, cache_dtype=cache_dtype)
        with torch.no_grad():
            runs.append(torch.stack([fast(**call) for call in calls]))
    difference = (runs[0] - runs[1]).abs()
    assert difference[0].max() <= 1e-5, "the first step reuses nothing"
    assert difference.max() <= ROUNDING[cache_dtype] * runs[0].abs().max()
    assert difference.median() <= 1e-5


@pytest.mark.runtime
def test_what_a_budget_has_no_room_for_is_computed():
    """As with a schedule that never asked for it, bit for bit; the others are reused."""
    model, calls = FACTORIZED.model().eval(), [FACTORIZED.call(step) for step in range(STEPS)]
    schedule = pyramid(["spatial", "temporal", "cross", "mlp"])
    full = pabc.explain(model, schedule=schedule, **calls[0]).plan
    fast = pabc.compile(model, schedule, backend="eager", memory_budget=full.peak_bytes // 2)
    with torch.no_grad():
        found = [fast(**call) for call in calls]
    fit = fast.explain().fit
    assert fit.kept and fit.dropped and fit.full == full
    narrower = schedule
    for j in fit.dropped:
        slot = full.slots[j]
        narrower = narrower.override(kind=slot.kind, layers=slot.layer, mask=[False] * STEPS)
    other = pabc.compile(model, narrower, backend="eager")
    with torch.no_grad():
        assert all(torch.equal(a, other(**call)) for a, call in zip(found, calls, strict=True))
    assert fast.plan.actions.tolist() == other.plan.actions.tolist()
    text = str(fast.explain())
    assert "memory budget" in text
    for what, slots in (("kept", fit.kept), ("computed", fit.dropped)):
        kinds = set(re.findall(rf"^    {what} +(\w+)", text, re.MULTILINE))
        assert kinds == {full.slots[j].kind for j in slots}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int8"}, r"cache_dtype: .*'keep', 'bf16', 'fp8'.*'int8'"),
        ({"cache_dtype": torch.bfloat16}, r"cache_dtype: .*found torch.bfloat16"),
        ({"offload": "disk"}, r"offload: .*None, 'cpu'.*'disk'"),
        ({"offload": True}, r"offload: .*found True"),
        (
            {"memory_budget": "2 gigabytes"},
            r"memory_budget: expected a number of bytes.*GiB.*, found '2 gigabytes'",
        ),
        ({"memory_budget": 0}, r"memory_budget: expected a number of bytes, 1 or more.*, found 0"),
        (
            {"memory_budget": 2.5},
            r"memory_budget: expected a number of bytes, 1 or more.*, found 2.5",
        ),
    ],
)
def test_bad_options(options, message):
    model = FACTORIZED.model().eval()
    with pytest.raises(ValueError, match=message):
        pabc.compile(model, pyramid(["spatial"]), **options)
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **options, **FACTORIZED.call())


@pytest.mark.runtime
def test_a_budget_that_fits_nothing_names_the_smallest_useful_one():
    model, call = FACTORIZED.model().eval(), FACTORIZED.call()
    fast = pabc.compile(model, pyramid(["spatial"]), backend="eager", memory_budget="10 B")
    with pytest.raises(ValueError, match=r"memory_budget: expected \d+ bytes .*found 10;") as error:
        fast(**call)
    least = int(re.search(r"expected (\d+)", str(error.value))[1])
    fast = pabc.compile(model, pyramid(["spatial"]), backend="eager", memory_budget=least)
    with torch.no_grad():
        fast(**call)
    assert len(fast.explain().fit.kept) == 1


def test_fp8_needs_a_device_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"'bf16' on cuda:1 .* found 'fp8': .* 8\.9, .* has 8\.0"):
        check_fp8({torch.device("cuda:1")})
    check_fp8({torch.device("cpu")})


@pytest.mark.runtime
@pytest.mark.parametrize("cache_dtype", ["keep", "bf16", "fp8"])
def test_check_finite_sees_what_is_encoded(cache_dtype):
    model, call = FACTORIZED.model().eval(), FACTORIZED.call()
    fast = pabc.compile(
        model,
        pyramid(["spatial"]),
        backend="eager",
        cache_dtype=cache_dtype,
        check_finite=True,
    )
    with torch.no_grad():
        fast(**call)
        fast.reset()
        call["x_BCTHW"][0, 0, 0, 0, 0] = float("inf")
        with pytest.raises(pabc.GuardError, match="NaN or infinity in the spatial branch"):
            fast(**call)


@pytest.mark.runtime
def test_options_come_back_with_a_saved_model(tmp_path):
    model, calls = FACTORIZED.model().eval(), [FACTORIZED.call(step) for step in range(STEPS)]
    schedule = pyramid(["spatial", "temporal", "cross", "mlp"])
    fast = pabc.compile(
        model, schedule, backend="eager", cache_dtype="fp8", offload="cpu", memory_budget="3KiB"
    )
    with torch.no_grad():
        expected = [fast(**call) for call in calls]
        fast.save(tmp_path / "model.pabc")
        loaded = pabc.load(tmp_path / "model.pabc", model)
        assert all(torch.equal(loaded(**c), e) for c, e in zip(calls, expected, strict=True))
    assert loaded.stats.captures == 0
    assert loaded.explain().fit == fast.explain().fit and fast.explain().fit.dropped
    assert loaded.stats.peak_nbytes == fast.stats.peak_nbytes == fast.plan.peak_bytes


@pytest.mark.runtime
def test_a_graph_for_any_sizes_takes_the_bytes_of_the_call_at_hand():
    """And keeps within the budget at each of them."""
    case = next(case for case in MODELS if case.name == "Packed")
    model, budget = case.model().eval(), 6 * 2**10
    fast = pabc.compile(
        model, pyramid(["full", "cross"]), backend="eager", dynamic=True, memory_budget=budget
    )
    kept, sizes, peaks = [], [], []
    for height in (4, 8):
        generate(fast, case.call(0, replace(case.sizes, height=height)))
        kept.append(len(fast.explain().fit.kept))
        sizes.append(fast.plan.slots[0].nbytes)
        peaks.append(fast.plan.peak_bytes)
        assert fast.stats.peak_nbytes == max(peaks) <= budget
    assert fast.stats.captures == 1
    assert kept == [2, 1] and sizes[1] == 2 * sizes[0]


class Split(Tiny):
    """The branch is a half of a larger buffer."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(8, 16)

    def forward(self, x, t):
        h = super().forward(x, t) @ self.proj.weight.T
        return h + self.wide(torch.nn.functional.gelu(h)).chunk(2, -1)[1] * t[:, None, None]


@pytest.mark.runtime
@pytest.mark.parametrize("backend", ["eager", "oracle", "inductor"])
def test_slots_keep_no_larger_buffer_alive(backend):
    model = Split().eval()
    fast = pabc.compile(model, pabc.Schedule.pyramid(TIMESTEPS, full=2, mlp=2), backend=backend)
    outputs = generations.generate(fast, 0)
    assert fast.stats.peak_nbytes == fast.plan.peak_bytes
    oracle = pabc.compile(model, fast.schedule, backend="oracle")
    for found, expected in zip(outputs, generations.generate(oracle, 0), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5)
