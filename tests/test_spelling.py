"""The user's call reaches forward as it is written, wherever that can be told."""

import functools

import pytest
import torch
from torch import nn

import pabc

STEPS = (3, 2, 1)


def scaled(forward):
    """Looks at keywords alone, as diffusers' decorator for the scales of LoRA does."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        scale = (kwargs.get("options") or {}).get("scale", 1.0)
        return forward(self, *args, **kwargs) * scale

    return wrapper


def counting(forward):
    """Tells how many arguments are positional."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) + len(args)

    return wrapper


def taking_more(forward):
    """Takes an argument that the forward which it names as its own does not."""

    @functools.wraps(forward)
    def wrapper(self, *args, shift=0.0, **kwargs):
        return forward(self, *args, **kwargs) + shift

    return wrapper


def plain(forward):
    return forward


def make_model(decorator):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.query = nn.LayerNorm(16), nn.Linear(16, 16)

        @decorator
        def forward(self, x, t, options=None):
            h = self.query(self.norm(x)).unflatten(-1, (2, 8)).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(h, h, h)
            return x + y.transpose(1, 2).flatten(2) * t.view(-1, 1, 1)

    torch.manual_seed(0)
    return Model().eval()


X, T = torch.randn(1, 6, 16), torch.tensor([3.0])
CALLS = [
    ((X, T), {}),
    ((X, T, {"scale": 0.5}), {}),
    ((X, T), {"options": {"scale": 0.5}}),
    ((X,), {"t": T, "options": {"scale": 0.25}}),
    ((), {"options": None, "t": T, "x": X}),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("decorator", [scaled, counting])
def test_every_spelling_gives_what_it_gives_without(decorator, inplace):
    model, expected = make_model(decorator), make_model(decorator)
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager", inplace=inplace)
    called = model if inplace else fast
    with torch.no_grad():
        for args, kwargs in CALLS * 2:
            assert torch.equal(called(*args, **kwargs), expected(*args, **kwargs))
            fast.reset()
    assert fast.stats.captures == len(CALLS)


def test_one_capture_serves_all_spellings_where_none_can_be_told():
    model = make_model(plain)
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    with torch.no_grad():
        for args, kwargs in [((X, T), {}), ((X,), {"t": T}), ((), {"t": T, "x": X})]:
            assert torch.equal(fast(*args, **kwargs), model(X, T))
            fast.reset()
    assert fast.stats.captures == 1


def test_a_decorator_may_take_what_its_function_does_not():
    model = make_model(taking_more)
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    with torch.no_grad():
        for shift in (1.0, -2.0):
            assert torch.equal(fast(X, T, shift=shift), model(X, T, shift=shift))
            fast.reset()
        with pytest.raises(TypeError, match="missing a required argument: 't'"):
            fast(X)


def test_explain_takes_the_call_as_it_is_written():
    model = make_model(scaled)
    assert pabc.explain(model, X, t=T, options={"scale": 0.5}).regions
