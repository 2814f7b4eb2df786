"""Provenance is checked against the real ops, run on tensors that hold each axis' coordinate."""

from math import prod

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pabc.passes.ir import Axis, Factor
from pabc.passes.provenance.factors import (
    anonymous,
    blur,
    combine,
    find_position,
    is_join,
    is_learned,
    is_named,
    join,
    length,
    narrow,
    regroup,
    unknown,
    unlearned,
)

X, Y, Z, TEXT = (Axis("x", 0), Axis("x", 1), Axis("x", 2), Axis("text", 1))
SIZES = st.sampled_from([1, 2, 3, 4, 6])
ABSENT = -1


def axes_of(product):
    return {axis for factor in product for axis in factor.axes()}


def coordinates(dims):
    """Per axis: a tensor of the dims' shape that holds the coordinate along the axis.

    Only for dimensions of a single factor each.
    """
    shape = [length(product) for product in dims]
    result = {}
    for d, (factor,) in enumerate(dims):
        if factor.axis is not None:
            index = torch.arange(shape[d]).view([-1 if i == d else 1 for i in range(len(shape))])
            result[factor.axis] = index.expand(shape)
    return result


def varying(tables, dim):
    """The axes whose coordinate changes along `dim`; positions that have none do not count."""
    found = set()
    for axis, table in tables.items():
        rows = table.movedim(dim, 0).reshape(table.shape[dim], -1)
        for column in rows.T:
            if len({int(c) for c in column} - {ABSENT}) > 1:
                found.add(axis)
                break
    return found


@st.composite
def inputs(draw):
    """One to four dimensions, each along an axis of its own or along none."""
    chosen = draw(st.lists(st.sampled_from([X, Y, Z, None]), min_size=1, max_size=4))
    assume(len({a for a in chosen if a}) == sum(a is not None for a in chosen))
    return tuple((Factor(draw(SIZES), axis),) for axis in chosen)


@st.composite
def factorizations(draw, total):
    """A shape of `total` elements."""
    shape = []
    while total > 1 or (draw(st.booleans()) and len(shape) < 5):
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        shape.append(size)
        total //= size
        if len(shape) == 5:
            shape.append(total)
            break
    return shape or [1]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_views_and_permutes_claim_the_axes_that_vary(data):
    dims = data.draw(inputs())
    sizes = {f.axis: f.size for (f,) in dims if f.axis}
    tables = coordinates(dims)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            shape = data.draw(factorizations(prod(length(p) for p in dims)))
            dims = regroup(dims, shape, "lost")
            tables = {axis: table.reshape(shape) for axis, table in tables.items()}
        else:
            order = data.draw(st.permutations(range(len(dims))))
            dims = tuple(dims[d] for d in order)
            tables = {axis: table.permute(order) for axis, table in tables.items()}
        kept = {
            axis: prod(f.size for p in dims for f in p if f.axis == axis) == size
            and not any(axis in p.axes() for q in dims for p in q if p.parts)
            for axis, size in sizes.items()
        }
        for d, product in enumerate(dims):
            claimed = {a for f in product if f.size > 1 for a in f.axes()}
            seen = varying(tables, d)
            assert seen <= axes_of(product), (dims, d)
            assert {a for a in claimed if kept[a]} <= seen, (dims, d)
        shape = next(iter(tables.values())).shape if tables else None
        assert shape is None or [length(p) for p in dims] == list(shape)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_view_and_its_inverse_give_back_the_factors(data):
    dims = tuple(p for p in data.draw(inputs()) if length(p) > 1)
    shape = [length(p) for p in dims]
    axes = [axes_of(p) for p in dims]
    flat = regroup(dims, [prod(shape)], "lost")
    assert [axes_of(p) for p in regroup(flat, shape, "lost")] == axes


@st.composite
def joined(draw):
    """A concatenation, and its parts: (size, axis) each."""
    parts = draw(
        st.lists(st.tuples(SIZES, st.sampled_from([X, TEXT, None])), min_size=2, max_size=4)
    )
    return join([(Factor(size, axis),) for size, axis in parts]), parts


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_slices_of_joins_claim_the_parts_they_touch(data):
    product, parts = data.draw(joined())
    total = length(product)
    assert total == sum(size for size, _ in parts)
    owners = [axis for size, axis in parts for _ in range(size)]
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    taken = narrow(product, start, stop, "lost")
    assert length(taken) == stop - start
    assert axes_of(taken) == {axis for axis in owners[start:stop] if axis}
    again_stop = data.draw(st.integers(1, stop - start))
    again = narrow(taken, 0, again_stop, "lost")
    assert axes_of(again) == {axis for axis in owners[start : start + again_stop] if axis}


def test_regroup_splits_and_merges():
    dims = ((Factor(2, X), Factor(8, Y)), (Factor(16, Z),), anonymous(64))
    assert regroup(dims, [2, 128, 64], "") == (
        (Factor(2, X),),
        (Factor(8, Y), Factor(16, Z)),
        (Factor(64),),
    )
    assert regroup(((Factor(12, X),),), [3, 4], "") == ((Factor(3, X),), (Factor(4, X),))


def test_regroup_that_cuts_across_factors_names_all_axes_and_the_reason():
    dims = ((Factor(4, X),), (Factor(3, Y),))
    first, second = regroup(dims, [6, 2], "view_3 mixes positions")
    for product in (first, second):
        assert axes_of(product) == {X, Y}
        assert product[0].reason == "view_3 mixes positions"


def test_regroup_loses_the_order_only_between_boundaries_of_both_shapes():
    dims = ((Factor(2, X),), (Factor(4, Y),), (Factor(6, Z),), (Factor(5, TEXT),))
    batch, outer, inner, last = regroup(dims, [2, 6, 4, 5], "lost")
    assert (batch, last) == (dims[0], dims[3])
    assert axes_of(outer) == axes_of(inner) == {Y, Z}
    rotary = ((Factor(24, X),), (Factor(8), Factor(3, Y), Factor(2)))
    tokens, heads, features = regroup(rotary, [24, 3, 16], "lost")
    assert tokens == rotary[0]
    assert axes_of(heads) == axes_of(features) == {Y}


def test_size_one_factors_go_to_dimensions_of_size_one():
    dims = ((Factor(2, X),), (Factor(1, Y),), (Factor(4, Z),))
    assert regroup(dims, [2, 1, 4], "") == dims
    assert regroup(dims, [2, 4], "")[0] == (Factor(2, X), Factor(1, Y))
    back = regroup(regroup(dims, [8], ""), [2, 1, 4], "")
    assert [axes_of(p) for p in back] == [{X}, {Y}, {Z}]


def test_joins_of_joins_are_flat_and_split_exactly():
    text, tokens = (Factor(3, TEXT),), (Factor(4, X), Factor(2, Y))
    once = join([text, tokens])
    assert is_join(once[0]) and length(once) == 11
    assert join([once, text])[0].parts == (text, tokens, text)
    assert narrow(once, 0, 3, "") == text
    assert narrow(once, 3, 11, "") == tokens
    assert narrow(once, 0, 11, "") == once


def test_join_of_nothing_named_is_anonymous():
    assert join([anonymous(2), anonymous(3)]) == anonymous(5)


def test_slice_within_a_part_keeps_its_axis():
    assert narrow((Factor(8, X),), 2, 5, "lost") == (Factor(3, X),)
    mixed = narrow((Factor(4, X), Factor(2, Y)), 1, 6, "lost")
    assert axes_of(mixed) == {X, Y} and length(mixed) == 5 and mixed[0].reason == "lost"


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_slices_of_products_claim_the_axes_that_vary(data):
    factors = data.draw(st.permutations([X, Y, Z]).map(lambda axes: axes[:2]))
    sizes = [data.draw(SIZES) for _ in factors]
    product = tuple(map(Factor, sizes, factors))
    grid = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, 2).T
    start = data.draw(st.integers(0, length(product) - 1))
    stop = data.draw(st.integers(start + 1, length(product)))
    step = data.draw(st.integers(1, 4))
    taken = narrow(product, start, stop, "lost", step)
    rows = [row[start:stop:step] for row in grid]
    assert length(taken) == len(rows[0])
    varying = {axis for axis, row in zip(factors, rows, strict=True) if len(set(row.tolist())) > 1}
    assert varying <= axes_of(taken)
    if not any(factor.parts for factor in taken):
        assert varying == {axis for factor in taken if factor.size > 1 for axis in factor.axes()}
    found = find_position(product, start, stop)
    if found is not None and stop - start > 1:
        outer, position = found
        assert outer == product[:1] and {position} == set(grid[0][start:stop].tolist())


def test_slices_within_one_position_of_outer_factors_are_of_the_inner_ones():
    packed = (Factor(2, X), Factor(24, Y))
    assert narrow(packed, 0, 24, "lost") == narrow(packed, 24, 48, "lost") == packed[1:]
    assert narrow(packed, 30, 36, "lost") == (Factor(6, Y),)
    assert narrow(packed, 5, 48, "lost", 24) == (Factor(2, X),)
    assert narrow((Factor(4, X), Factor(3, Y)), 3, 9, "lost") == (Factor(2, X), Factor(3, Y))
    samples = (Factor(2, X), *join([(Factor(5, TEXT),), (Factor(4, Y),)]))
    assert narrow(samples, 9, 14, "lost") == (Factor(5, TEXT),)
    assert narrow(samples, 14, 18, "lost") == (Factor(4, Y),)
    assert axes_of(narrow(samples, 10, 16, "lost")) == {TEXT, Y}


def test_what_has_lost_its_order_is_no_join():
    """Even where it is as large as it has axes."""
    lost = blur((Factor(4, X), Factor(2, Y)), 2, "lost")
    assert not is_join(lost[0])
    assert axes_of(narrow(lost, 0, 1, "lost")) == {X, Y}


def test_constants_stay_constants():
    constant = (Factor(3, learned=True),)
    assert is_learned(narrow(constant, 0, 2, "lost"))
    assert is_learned(join([constant, constant]))
    assert not is_learned(join([constant, anonymous(2)]))
    assert is_learned(blur((*constant, Factor(2, X, learned=True)), 5, "lost"))
    assert not is_learned(unlearned(constant))
    text, zeros = (Factor(3, TEXT),), (Factor(3, TEXT, learned=True),)
    assert not is_learned(combine((3,), [(zeros,), (text,)])[0])


def test_blur_without_axes_keeps_the_reason():
    assert blur(anonymous(4), 3, "why") == (Factor(3, reason="why"),)
    assert unknown((2, 3), "why") == ((Factor(2, reason="why"),), (Factor(3, reason="why"),))


def test_combine_takes_the_operand_that_knows_most():
    stream, table = ((Factor(2, X),), anonymous(4)), (anonymous(2), (Factor(4, Y),))
    assert combine((2, 4), [table, stream]) == ((Factor(2, X),), (Factor(4, Y),))
    assert combine((2, 4), [((Factor(4, Y),),)]) == (anonymous(2)[0:1], (Factor(4, Y),))
    assert combine((2, 4), [((Factor(1, X),), (Factor(1, Y),))]) == (anonymous(2), anonymous(4))
    assert not is_named(combine((3,), [])[0])
