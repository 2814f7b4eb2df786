"""Forecasts: weights of polynomials, and what is accepted as weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pabc.base.kinds import KINDS
from pabc.forecasts import HOLD, as_forecast, as_forecasts, extrapolate, format_forecast, keep_rows

POSITIONS = st.lists(st.integers(-1000, 1000), min_size=1, max_size=3, unique=True)


@given(POSITIONS, st.integers(-1000, 1000), st.data())
def test_weights_reproduce_polynomials(known, position, data):
    """A polynomial of a degree below the number of values is continued without an error."""
    coefficients = data.draw(st.lists(st.integers(-9, 9), min_size=len(known), max_size=len(known)))

    def polynomial(x):
        return sum(c * x**power for power, c in enumerate(coefficients))

    weights = extrapolate(position, known)
    terms = [w * polynomial(x) for w, x in zip(weights, known, strict=True)]
    scale = sum(map(abs, terms)) + abs(polynomial(position))
    assert math.isclose(sum(terms), polynomial(position), rel_tol=1e-9, abs_tol=1e-9 * scale)


@pytest.mark.parametrize(
    ("position", "known", "weights"),
    [
        (5, (4,), (1.0,)),
        (5, (4, 3), (2.0, -1.0)),
        (6, (4, 2), (2.0, -1.0)),
        (5, (4, 2), (1.5, -0.5)),
        (3, (2, 1, 0), (3.0, -3.0, 1.0)),
        (250.0, (500.0, 1000.0), (1.5, -0.5)),
        (4, (4, 2), (1.0, 0.0)),
    ],
)
def test_weights_of_lines_and_parabolas(position, known, weights):
    assert extrapolate(position, known) == weights
    assert math.copysign(1, extrapolate(position, known)[-1]) == math.copysign(1, weights[-1])


@pytest.mark.parametrize("known", [(3, 3), (3, 2, 3), (5e-324, 0.0)])
def test_equal_positions_have_no_weights(known):
    assert extrapolate(4, known) is None


ROWS = ((), (1.0,), (2.0, -1.0))


@pytest.mark.parametrize(
    "value",
    [
        [[], [1], [2, -1]],
        ((), (1, 0.0), (2, -1.0, 0)),
        [[], np.array([1, 0]), torch.tensor([2.0, -1.0])],
    ],
)
def test_weights_from_nested_sequences(value):
    assert as_forecast(value, "forecast", num_steps=3) == ROWS


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_weights_from_arrays(make):
    rows = [[0.0, 0.0], [1.0, 0.0], [2.0, -1.0]]
    assert as_forecast(make(rows), "forecast") == ((0.0,), (1.0,), (2.0, -1.0))


def test_minus_zero_is_zero():
    assert str(as_forecast([[-0.0]], "forecast")) == "((0.0,),)"


def test_one_forecast_stands_for_all_kinds():
    assert as_forecasts("linear", "forecast") == dict.fromkeys(KINDS, "linear")


def test_a_mapping_is_put_in_the_order_of_kinds():
    found = as_forecasts({"model": "quadratic", "spatial": [[1, 2]]}, "forecast", num_steps=1)
    assert list(found.items()) == [("spatial", ((1.0, 2.0),)), ("model", "quadratic")]


def test_rows_of_steps_that_do_not_reuse_are_dropped():
    assert keep_rows(((5.0,), (2.0, -1.0)), (False, True)) == ((), (2.0, -1.0))
    assert keep_rows(((5.0,), (1.0,), (1.0,)), (False, True, True)) == HOLD
    assert keep_rows("linear", (False, False)) == "linear"
    missing = ((1.0,), (), (1.0,))
    assert keep_rows(missing, (False, True, True)) == ((), (), (1.0,)), "the plan says so"


def test_in_a_few_words():
    assert format_forecast([[1.0]]) == "weights"
    assert format_forecast({"model": "linear", "mlp": [[1.0]]}) == "model:linear,mlp:weights"


EXPECTED = "expected one of hold, linear, quadratic, or weights [num_steps, k]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cubic", f"forecast: {EXPECTED}, found 'cubic'"),
        (3, f"forecast: {EXPECTED}, found 3"),
        (None, f"forecast: {EXPECTED}, found None"),
        (b"ab", f"forecast: {EXPECTED}, found b'ab'"),
        ([[1.0]], "forecast: expected one row of weights per step (2), found 1"),
        ([[1.0], 2.0], "forecast: expected a row of weights per step, found 2.0 at step 1"),
        (np.ones(2), "forecast: expected a row of weights per step, found 1.0 at step 0"),
        ([[1.0], ["1"]], "forecast: expected weights, found '1' at step 1"),
        ([[1.0], [True]], "forecast: expected weights, found True at step 1"),
        ([[1.0], [[1.0]]], "forecast: expected weights, found [1.0] at step 1"),
        ([[1.0], [1j]], "forecast: expected weights, found 1j at step 1"),
        ([[math.nan], [1.0]], "forecast: expected finite weights, found nan at step 0"),
        ([[1.0], [1.0, math.inf]], "forecast: expected finite weights, found inf at step 1"),
    ],
)
def test_bad_weights_are_named(value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        as_forecast(value, "forecast", num_steps=2)
    assert str(error.value) == message


def test_a_bad_forecast_of_a_kind_is_named():
    with pytest.raises(ValueError, match=f"forecast of 'mlp': {EXPECTED[:20]}"):
        as_forecasts({"mlp": "cubic"}, "forecast")
    with pytest.raises(ValueError, match=r"forecast: expected a kind, one of .*, found 'space'"):
        as_forecasts({"space": "linear"}, "forecast")
