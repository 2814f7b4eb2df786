"""Models compiled in place: the module stays what it is, and its call follows a schedule."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from loops import loop_call, make_denoiser
from pipelines import build, noise, text
from torch import nn

import pabc
from pabc.inplace import is_installed
from pabc.passes.tracing.alone import calling_forward_alone

STEPS = (3, 2, 1)
SCHEDULE = pabc.Schedule.from_masks(
    STEPS, {"full": [False, True, True], "mlp": [False, True, True]}
)


@pytest.fixture
def model():
    with torch.no_grad():
        yield make_denoiser()


def compile_in_place(model, schedule=SCHEDULE, **options):
    return pabc.compile(model, schedule, backend="eager", inplace=True, **options)


def run(model, scale=1.0):
    latents, text = loop_call(num_texts=1)
    return torch.stack([model(latents * scale * t, torch.tensor([t * 1.0]), text) for t in STEPS])


def run_compiled(model):
    return run(pabc.compile(copy.deepcopy(model), SCHEDULE, backend="eager"))


def test_the_model_stays_what_it_is(model):
    names, kind, before = list(dict(model.named_modules())), type(model), dict(vars(model))
    plain, expected = run(model), run_compiled(model)
    fast = compile_in_place(model)
    assert torch.equal(run(model), expected) and not torch.equal(expected, plain)
    assert type(model) is kind and list(dict(model.named_modules())) == names
    assert fast.stats.captures == 1 and fast.stats.reused > 0
    assert torch.equal(run(fast), expected), "what is returned can be called as well"
    fast.undo()
    fast.undo()
    assert vars(model) == before and torch.equal(run(model), plain)


def test_copies_and_pickles_are_plain(model):
    class Named(type(model)):
        def cache_context(self, name):
            return name, self

    model.__class__ = Named
    plain = run(model)
    with torch.no_grad():
        compile_in_place(model)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), plain)
    assert copied.cache_context("cond") == ("cond", copied)
    model.__class__ = Named.__mro__[1]  # a local class cannot be pickled
    del vars(model)["cache_context"]
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), plain)


def test_names_of_calls_reach_the_model_and_the_schedule(model):
    entered = []

    class Named(type(model)):
        def cache_context(self, name, **where):
            entered.append((name, where))
            return torch.no_grad()

    model.__class__ = Named
    latents, text = loop_call(num_texts=1)
    fast = compile_in_place(model)
    for t in STEPS:
        for scale, name in enumerate(("cond", "uncond")):
            with model.cache_context(name, step_index=STEPS.index(t)):
                model(latents * (scale + 1), torch.tensor([t * 1.0]), text)
    assert entered == [(n, {"step_index": i}) for i in range(3) for n in ("cond", "uncond")]
    assert fast.stats.reused > 0 and not fast.stats.fallbacks
    fast.undo()
    assert "cache_context" not in vars(model)


def test_names_that_come_later_recapture_nothing():
    model, latents, states = build("Wan", num_layers=1), noise(1, 4, 3, 6, 8), text(1, 0)
    with torch.no_grad():
        fast = compile_in_place(model, pabc.Schedule.none(STEPS))
        for name in (None, "cond", "uncond"):
            with model.cache_context(name) if name else nullcontext():
                model(latents, torch.tensor([3]), states)
    assert fast.stats.captures == 1


def test_the_last_one_is_called_or_that_of_the_trajectory(model):
    first = compile_in_place(model, pabc.Schedule.none(STEPS))
    plain = run(model)
    second = compile_in_place(model)
    reusing = run(model)
    assert not torch.equal(reusing, plain) and first.stats.captures == second.stats.captures == 1
    with first.trajectory():
        assert torch.equal(run(model), plain)
    second.undo()
    assert torch.equal(run(model), plain)
    first.undo()
    assert "_compiled_call_impl" not in vars(model)


def test_what_torch_compiled_in_place_is_refused(model):
    plain = run(model)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"inplace: expected .* torch.nn.Module.compile compiled"):
        compile_in_place(model)
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    assert torch.equal(run(fast), plain), "the forward within is compiled"
    assert isinstance(model, nn.Module) and model._compiled_call_impl is not None


def test_a_trace_in_another_thread_leaves_it_installed(model):
    fast = compile_in_place(model)
    assert is_installed(fast, model)
    with calling_forward_alone(model):
        assert is_installed(fast, model)
        assert not is_installed(compile_in_place(nn.Linear(2, 2)), model)
    assert vars(model)["_compiled_call_impl"].current is fast
    fast.undo()
    with calling_forward_alone(model):
        assert not is_installed(fast, model)
