"""torch.compile and pabc on one model: both work, or an error or a line says which one does not."""

import copy
import logging
import pickle

import pytest
import torch
from loops import compile_eager, loop_call, make_denoiser, make_loop
from pipelines import build, noise, text

import pabc

pytestmark = pytest.mark.runtime
STEPS = (3, 2, 1)
REUSE = pabc.Schedule.from_masks(STEPS, {"full": [False, True, True], "mlp": [False, True, True]})
SKIP = pabc.Schedule.skip(STEPS, (0, 2), forecast="hold")
REFUSED = r"compile: expected a model that pabc calls as it is, .* backend='original'"


class Counting:
    """A backend of torch.compile that counts the calls of what it made."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.count += 1
            return graph(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    return Counting()


@torch.no_grad()
def run(model):
    latents, words = loop_call(num_texts=1)
    return torch.stack([model(latents * t, torch.tensor([t * 1.0]), words) for t in STEPS])


def test_compile_of_a_captured_model_is_refused(backend):
    model = make_denoiser()
    fast = pabc.compile(model, REUSE, backend="eager", inplace=True)
    expected = run(model)
    for each in (model, fast):
        with pytest.raises(ValueError, match=REFUSED):
            each.compile(backend=backend)
    assert torch.equal(run(model), expected) and fast.stats.captures == 1
    copied = copy.deepcopy(model)
    copied.compile(backend=backend)
    run(copied)
    assert backend.count, "a copy has its own"
    fast.undo()
    model.compile(backend=backend)
    assert "compile" not in vars(model)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_compiled_in_place_is_guarded_as_well(make, backend):
    model = make_denoiser()
    pabc.compile(model, REUSE, backend="eager", inplace=True)
    copied = make(model)
    fast = pabc.compile(copied, REUSE, backend="eager", inplace=True)
    with pytest.raises(ValueError, match=REFUSED):
        copied.compile(backend=backend)
    run(copied)
    assert fast.stats.reused


@pytest.mark.parametrize("when", ["before", "after", "not in place"])
def test_what_compile_made_runs_at_computed_steps_of_an_original(when, backend):
    model, plain = make_denoiser(), run(make_denoiser())
    if when == "before":
        model.compile(backend=backend)
    inplace = when != "not in place"
    fast = pabc.compile(model, SKIP, backend="original", inplace=inplace)
    if when != "before":
        (model if inplace else fast).compile(backend=backend)
    found = run(model if inplace else fast)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[0])
    assert backend.count == 2 and fast.stats.reused == 1
    fast.undo()
    assert torch.equal(run(model), plain) and backend.count == 5, "compiled, and no more skipped"


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile_around_a_model_that_follows_a_schedule(inplace, backend):
    """Compiles nothing of it, which is said; what is around it is compiled."""
    model = make_denoiser()
    fast = pabc.compile(model, REUSE, backend="eager", inplace=inplace)
    called = model if inplace else fast
    expected = run(called)

    def scaled(*args):
        return fast(*args) * 2

    for outer, factor in ((called, 1), (scaled, 2)):
        compiled = torch.compile(outer, backend=backend)
        with pytest.warns(UserWarning, match="called within torch.compile, which compiles nothing"):
            assert torch.equal(run(compiled), expected * factor)
    assert backend.count == 3 and fast.stats.captures == 1
    assert fast.stats.reused == 12 and not fast.stats.fallbacks


def test_torch_compile_around_the_component_of_a_pipeline(backend, caplog):
    loop, plain = make_loop(), make_loop()
    with compile_eager(plain) as fast:
        expected = fast(6, *loop_call())
    loop.transformer = torch.compile(loop.transformer, backend=backend)
    with caplog.at_level(logging.WARNING, "pabc"), compile_eager(loop) as fast:
        assert torch.equal(fast(6, *loop_call()), expected)
    assert "what torch.compile made of Image is not used" in caplog.text and not backend.count
    with compile_eager(plain) as fast:
        plain.transformer = torch.compile(plain.transformer, backend=backend)
        with pytest.raises(ValueError, match=r"transformer: expected the .* another OptimizedMod"):
            fast(6, *loop_call())
        plain.transformer = plain.transformer._orig_mod
        torch.nn.Module.compile(plain.transformer, backend=backend)
        with pytest.raises(ValueError, match=r"transformer: expected the .* another call of it"):
            fast(6, *loop_call())


def test_regions_that_are_compiled_are_traced_as_written_and_said_to_be(backend, caplog):
    model, call = build("Wan", num_layers=2), (noise(1, 4, 3, 6, 8), torch.tensor([3]), text(1, 0))
    schedule = pabc.Schedule.none(STEPS)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    before.compile_repeated_blocks(backend=backend)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "pabc"):
        plain = model(*call).sample
        fast = pabc.compile(after, schedule, backend="eager", inplace=True)
        assert torch.equal(after(*call).sample, plain) and not caplog.text
        fast.reset()
        after.compile_repeated_blocks(backend=backend)
        assert torch.equal(after(*call).sample, plain)
        assert "torch.compile made of blocks.0, and 1 more is not used" in caplog.text
        caplog.clear()
        fast = pabc.compile(before, schedule, backend="eager")
        assert torch.equal(fast(*call).sample, plain) and not backend.count
        assert "torch.compile made of blocks.0, and 1 more is not used" in caplog.text
        fast = pabc.compile(before, pabc.Schedule.skip(STEPS, (0, 2)), backend="original")
        assert torch.equal(fast(*call).sample, plain) and backend.count == 2
