"""Phases as CUDA graphs, on a tape for the CPU: memory at fixed addresses, and who has it."""

import gc
from itertools import pairwise

import pytest
import torch
from generations import SCHEDULE, assert_equal, compile_eager, generate, make_call
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Branch, Experts, Tiny
from reading import Plain, make, make_calls
from reading import generate as generate_calls
from tapes import Tape

import pabc
from pabc.runtime import cudagraphs
from pabc.runtime.chain import BlockCall, BlockChain

pytestmark = [pytest.mark.runtime, pytest.mark.usefixtures("graphs_on_cpu")]
FACTORIZED = next(case for case in MODELS if case.name == "Factorized")


@pytest.fixture
def model():
    return Tiny().eval().requires_grad_(False)


def compile_both(model, schedule=SCHEDULE, **options):
    plain = compile_eager(model, schedule, **options)
    return plain, compile_eager(model, schedule, cudagraphs=True, **options)


def test_generations_give_what_they_give_without_graphs(model):
    plain, fast = compile_both(model)
    found, expected = [], []
    for seed in range(4):
        found.append(generate(fast, seed))
        expected.append(generate(plain, seed))
    for outputs, others in zip(found, expected, strict=True):
        assert_equal(outputs, others)  # no later call wrote over an earlier one's result
    assert fast.stats.peak_nbytes == plain.stats.peak_nbytes and fast.stats.nbytes == 0
    assert plain.stats.recordings == 0


def test_each_phase_is_recorded_once(model):
    fast = compile_eager(model, cudagraphs=True)
    for seed in range(2):
        generate(fast, seed)
    count = fast.stats.recordings
    assert count >= len(fast.plan.phases)
    for seed in range(3):
        generate(fast, seed)
        with fast.trajectory():  # takes over the memory of the generation that ended
            pass
    fast.reset()
    gc.disable()
    try:
        for seed in range(3):
            with fast.trajectory():
                generate(fast, seed)
    finally:
        gc.enable()
    assert fast.stats.recordings == count and fast.stats.compiles == len(fast.plan.phases)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_hoisted_values_and_several_kinds(backend):
    model = FACTORIZED.model().requires_grad_(False)
    masks = {
        kind: [i % every != 0 for i in range(5)] for kind, every in (("spatial", 2), ("cross", 3))
    }
    schedule = pabc.Schedule.from_masks(range(5), masks)
    plain = pabc.compile(model, schedule, backend=backend)
    fast = pabc.compile(model, schedule, backend=backend, cudagraphs=True)
    for seed in range(3):
        for step in range(5):
            call = FACTORIZED.call(step=step + seed)
            with torch.no_grad():
                assert torch.equal(fast(**call), plain(**call))
    assert fast.stats.recordings > 0 and fast.stats.fallbacks == {}


def test_branches_and_trajectories_in_turns(model):
    plain, fast = compile_both(model)
    for _ in range(3):
        for compiled in (plain, fast):
            compiled.reset()
        runs = [(plain.trajectory(), fast.trajectory()) for _ in range(2)]
        for step in range(5):
            for seed, pair in enumerate(runs):
                for name in ("cond", "uncond"):
                    call = make_call(seed + (name == "cond"), step)
                    results = []
                    for run, compiled in zip(pair, (plain, fast), strict=True):
                        with run, compiled.cache_context(name):
                            results.append(compiled(*call))
                    assert torch.equal(*results)


def test_generations_at_a_time_have_memory_of_their_own_and_leave_some(model, monkeypatch):
    made = []
    monkeypatch.setattr(cudagraphs, "Tape", lambda device: made.append(Tape(device)) or made[-1])
    fast = compile_eager(model, cudagraphs=True)

    def begin(count):
        runs = [fast.trajectory() for _ in range(count)]
        for run in runs:
            with run:
                fast(*make_call(0, 0))
        return runs

    runs = begin(cudagraphs.MAX_IDLE + 2)
    assert len(made) == cudagraphs.MAX_IDLE + 2
    del runs
    begin(cudagraphs.MAX_IDLE)
    assert len(made) == cudagraphs.MAX_IDLE + 2
    begin(cudagraphs.MAX_IDLE + 1)
    assert len(made) == cudagraphs.MAX_IDLE + 3, (
        "of those that were left, the oldest two were freed"
    )


def test_weights_that_move_are_recorded_anew(model):
    plain, fast = compile_both(model)
    weight = model.blocks[0].qkv.weight

    def compare():
        assert_equal(generate(fast, 0), generate(plain, 0))
        return fast.stats.recordings

    compare(), compare()
    count = compare()
    weight.mul_(-1)
    assert compare() == count, "values in place"
    weight.data = weight.data.clone().mul_(-1)
    assert compare() > count, "the same parameter, elsewhere"
    count = fast.stats.recordings
    model.blocks[1].out.weight = torch.nn.Parameter(weight[:8] * 2, requires_grad=False)
    compare(), compare()
    assert fast.stats.recordings > count, "another parameter"
    assert fast.stats.captures == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_of_other_strides(model, dynamic):
    plain, fast = compile_both(model, dynamic=dynamic)
    for seed in range(6):
        for step in range(5):
            x, t = make_call(seed, step)
            time = t[:1].expand(2) if seed in (1, 2) else t
            assert torch.equal(fast(x, time), plain(x, time))
    assert fast.stats.fallbacks == {}


def test_cuts_are_copied_by_the_recording(model, monkeypatch):
    copy, copies = cudagraphs._copy, []

    def note(tensor, place):
        copies.append(Tape.is_running)
        copy(tensor, place)

    fast = compile_eager(model, cudagraphs=True)
    for seed in range(3):
        generate(fast, seed)
    monkeypatch.setattr(cudagraphs, "_copy", note)
    generate(fast, 3)
    assert copies.count(False) == 2 * 5, "latents and timesteps"
    assert copies.count(True) == fast.stats.stored // 4


def test_inference_mode_and_back(model):
    plain, fast = compile_both(model)
    for mode in (True, False, True, False):
        with torch.inference_mode(mode), torch.no_grad():
            assert_equal(generate(fast, 0), generate(plain, 0))


def test_sizes_that_stay_free(model):
    plain, fast = compile_both(model, dynamic=True)
    for tokens in (6, 4, 6, 4, 5):
        assert_equal(generate(fast, 1, tokens), generate(plain, 1, tokens))
    assert fast.stats.captures == 1


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_forms_of_slots(model, cache_dtype):
    plain, fast = compile_both(model, cache_dtype=cache_dtype)
    for seed in range(3):
        assert_equal(generate(fast, seed), generate(plain, seed))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_modules_outside_of_the_graph_part_it(backend):
    model, calls = make(Plain, Branch(), Experts(), Branch()), make_calls()
    schedule = pabc.Schedule.pyramid(range(len(calls), 0, -1), full=2, mlp=2)
    plain = pabc.compile(model, schedule, backend=backend)
    fast = pabc.compile(model, schedule, backend=backend, cudagraphs=True)
    for _ in range(3):
        pairs = zip(generate_calls(fast, calls), generate_calls(plain, calls), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert fast.stats.recordings > len(fast.plan.phases), "before and after the experts"


def test_what_is_saved_is_recorded_where_it_is_loaded(model, tmp_path):
    plain, fast = compile_both(model)
    expected = generate(plain, 3)
    generate(fast, 0)
    fast.save(tmp_path / "fast.pabc")
    again = pabc.load(tmp_path / "fast.pabc", model)
    for _ in range(3):
        assert_equal(generate(again, 3), expected)
    assert again.stats.recordings > 0 and again.stats.captures == 0


def test_values_that_are_not_finite_are_found(model):
    fast = compile_eager(model, cudagraphs=True, check_finite=True)
    for _ in range(3):
        generate(fast, 0)
    x, t = make_call(0, 0)
    with pytest.raises(pabc.GuardError, match="NaN"):
        fast(x * torch.nan, t)
    assert_equal(generate(fast, 0), generate(compile_eager(model), 0))


def test_what_cannot_be_recorded_says_so(model, monkeypatch):
    def fail(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Tape, "record", fail)
    fast = compile_eager(model, cudagraphs=True)
    with pytest.raises(RuntimeError, match=r"cudagraphs=True: expected .*not permitted"):
        generate(fast, 0) + generate(fast, 0)


def test_refusals(model, monkeypatch):
    for options, message in (
        ({"cudagraphs": 1}, "cudagraphs: expected True or False, found 1"),
        ({"cudagraphs": True, "offload": "cpu"}, "cudagraphs: expected False with offload='cpu'"),
        ({"cudagraphs": True, "backend": "oracle"}, "expected False with backend='oracle'"),
    ):
        with pytest.raises(ValueError, match=message):
            pabc.compile(model, SCHEDULE, **options)
    monkeypatch.undo()
    fast = compile_eager(model, cudagraphs=True)
    with pytest.raises(ValueError, match="on a CUDA device, found input 'x' on cpu"):
        fast(*make_call(0, 0))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_of_a_chain_give_what_the_chain_gives(data):
    def block(number, num_results):
        def run(values):
            total = (number + 1) * sum(values) + len(values)
            values.clear()
            return [total + i for i in range(num_results)]

        return run

    widths = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    count = num_inputs = data.draw(st.integers(1, 3))
    calls = []
    for number in data.draw(st.lists(st.integers(0, len(widths) - 1), min_size=1, max_size=8)):
        places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
        calls.append(BlockCall(number, tuple(places), widths[number]))
        count += widths[number]
    outputs = tuple(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)))
    alone = data.draw(st.sets(st.integers(0, len(widths) - 1)))
    chain = BlockChain(num_inputs, tuple(calls), outputs)
    code = [block(number, width) for number, width in enumerate(widths)]
    values = dict(enumerate(range(10, 10 + num_inputs)))
    pieces = chain.split(alone)
    for piece in pieces:
        results = piece.chain.link(code)([values[place] for place in piece.inputs])
        values.update(zip(piece.results, results, strict=True))
    expected = chain.link(code)(list(range(10, 10 + num_inputs)))
    assert [values[place] for place in outputs] == expected
    assert all(len(piece.chain.calls) == 1 for piece in pieces if piece.is_alone)
    sides = [piece.is_alone for piece in pieces]
    assert (False, False) not in pairwise(sides)
