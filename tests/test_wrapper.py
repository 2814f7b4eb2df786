"""What `pabc.compile` returns stands for its model, as torch.compile's wrapper does."""

import copy

import pytest
import torch
from loops import loop_call, make_denoiser
from torch import nn

import pabc

STEPS = (3, 2, 1)


@pytest.fixture
def model():
    with torch.no_grad():
        yield make_denoiser()


def run(model):
    latents, text = loop_call(num_texts=1)
    return torch.stack([model(latents * t, torch.tensor([t * 1.0]), text) for t in STEPS])


def compile_plainly(model):
    return pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")


def double(module):
    for parameter in module.parameters(recurse=False):
        parameter.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "patch", copy.deepcopy(m.patch).apply(double)),
        lambda m: m.apply(double),
        lambda m: m.load_state_dict({k: x * 2 for k, x in m.state_dict().items()}),
        lambda m: m.to(torch.float64).to(torch.float32),
        lambda m: m.requires_grad_(False),
        lambda m: m.train().eval(),
    ],
    ids=["module", "apply", "state_dict", "to", "requires_grad", "train"],
)
def test_what_is_done_to_it_is_done_to_the_model(model, change):
    other = copy.deepcopy(model)
    fast = compile_plainly(model)
    run(fast)
    change(fast)
    change(other)
    assert torch.equal(run(fast), run(other)) and torch.equal(run(model), run(other))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]


def test_attributes_are_set_on_the_model_and_deleted_from_it(model):
    fast, other = compile_plainly(model), pabc.Schedule.none((5, 4))
    fast.note, fast.extra = 3, nn.Identity()
    assert model.note == fast.note == 3 and dict(model.named_children())["extra"] is fast.extra
    assert {"note", "extra", "schedule"} <= set(dir(fast))
    del fast.note, fast.extra
    assert not hasattr(model, "note") and not hasattr(fast, "extra")
    with pytest.raises(AttributeError):
        del fast.note
    fast.schedule = other
    assert fast.schedule is other and not hasattr(model, "schedule"), "its own stay its own"
    fast.train()
    assert model.training and fast.training
    with pytest.raises(TypeError, match="has no len"):
        len(fast)


def test_hooks_of_its_own_get_what_is_called(model):
    fast, seen = compile_plainly(model), []
    fast.register_forward_hook(lambda module, args, result: seen.append(module))
    run(fast)
    assert seen == [fast] * 3
