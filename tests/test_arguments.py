"""One order of leaves for every way to write a call."""

import functools
import inspect

import pytest
import torch

from pabc.runtime.arguments import Arguments


def forward(x, t=1.0, *rest, flag=False, options=(2, 3), **more):
    """Takes arguments in every way there is."""


CALLS = [
    (("x",), {}),
    ((), {"x": "x"}),
    (("x", 2.0), {}),
    ((), {"t": 2.0, "x": "x"}),
    (("x", 2.0, 5, 6), {"flag": True, "last": None}),
    (("x",), {"options": [4, {"a": 5}]}),
    (("x", ("a", 1)), {"last": {"b": None}, "flag": True}),
]


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_plain_calls_are_flattened_as_all_others(args, kwargs):
    arguments = Arguments(inspect.signature(forward))
    x = torch.zeros(2)
    args = [x if arg == "x" else arg for arg in args]
    kwargs = {name: x if arg == "x" else arg for name, arg in kwargs.items()}
    expected, form = arguments._flatten(*arguments.bind(args, kwargs))
    for _ in range(2):
        leaves, structure = arguments.flatten(args, kwargs)
        assert all(map(lambda a, b: a is b or a == b, leaves, expected))
        assert len(leaves) == len(expected)
        assert structure == form and hash(structure) == hash(form)
        assert structure.unflatten(leaves) == arguments.bind(args, kwargs)


def test_other_values_are_not_remembered():
    arguments = Arguments(inspect.signature(forward))
    assert arguments.flatten((1, 2), {})[0] != arguments.flatten((3, 4), {})[0]
    first, form = arguments.flatten((1,), {"flag": True})
    second, other = arguments.flatten((1,), {"flag": 0.5})
    assert form is other and first != second


def test_what_the_model_does_not_take_is_an_error_each_time():
    arguments = Arguments(inspect.signature(lambda x: None))
    for _ in range(2):
        with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
            arguments.flatten((1,), {"y": 2})
        with pytest.raises(TypeError, match="missing a required argument: 'x'"):
            arguments.flatten((), {})


def test_a_default_that_cannot_be_a_constant_is_an_error():
    class Unhashable:
        __hash__ = None

    def forward(x, options=Unhashable()):  # noqa: B008
        """Has a default that no two calls can be compared by."""

    arguments = Arguments(inspect.signature(forward))
    for _ in range(2):
        with pytest.raises(TypeError, match=r"argument options.*has no hash"):
            arguments.flatten((1,), {})


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def test_spellings_that_a_decorator_can_tell_apart_are_kept():
    arguments = Arguments.of(decorated(forward))
    calls = [((1, 2.0), {}), ((1,), {"t": 2.0}), ((), {"x": 1, "t": 2.0}), ((1,), {})]
    structures = []
    for args, kwargs in calls * 2:
        leaves, structure = arguments.flatten(args, kwargs)
        assert structure.unflatten(leaves) == arguments.bind(args, kwargs) == (args, kwargs)
        structures.append(structure)
    assert len(set(structures)) == len(calls)
    assert len({Arguments.of(forward).flatten(*call)[1] for call in calls}) == 1
    with pytest.raises(TypeError, match="missing a required argument"):
        arguments.check((), {"t": 2.0})
