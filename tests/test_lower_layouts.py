"""Layouts after lowering: a stream whose channels lie apart does not stay so."""

import pytest
from graphs import assert_same_graph
from lowered_norms import CUT, OTHER, B, C, T, X, calls, check_same, draw, graph_text, lower, plain

pytestmark = pytest.mark.kernels
APART = draw(B, C, T).mT
"""Channels T elements apart, as a convolution yields them."""


def add_twice(x, cut, other, m):
    y = x + m.gate * cut
    return y, y + m.gate * other


def strides_read(lowered):
    return [call.args[0].meta["val"].stride() for call in calls(lowered)]


def test_a_stream_is_written_with_channels_side_by_side():
    def function(*inputs):
        y, z = add_twice(*inputs)
        return plain(z), y.reshape(B * T, C).abs()

    lowered, run = lower(function, APART, CUT, OTHER)
    expected = graph_text(
        "%x, %c, %d",
        "%r = pabc.residual_norm(%x, [%c], [None], [%gate], [1.0], norm='none', "
        "y_dtype=torch.float32, y_like_x=False, n_like_x=False)",
        "%y = getitem(%r, 0)",
        "%s = pabc.residual_norm(%y, [%d], [None], [%gate], [1.0], norm='layer', offset=0.0, "
        "eps=1e-06, n_dtype=torch.float32)",
        "%n = getitem(%s, 0)",
        "%a = clone(%y, memory_format=torch.contiguous_format)",
        "%b = _unsafe_view(%a, [10, 24])",
        "%z = abs(%b)",
        "return (%n, %z)",
    )
    assert_same_graph(lowered, expected)
    assert strides_read(lowered) == [APART.stride(), (T * C, C, 1)]
    check_same(run())


def test_results_and_views_get_what_they_had():
    def function(x, cut, other, m):
        y, z = add_twice(x, cut, other, m)
        a, b = z + m.scale * cut, z + m.shift * other
        return y, a.mT.view(B, C * T), b.abs()

    lowered, run = lower(function, APART, CUT, OTHER)
    assert strides_read(lowered) == [APART.stride(), *[(T * C, C, 1)] * 3]
    assert run()[1][0].stride() == APART.stride()
    check_same(run())


def test_one_kernel_is_not_worth_a_copy():
    lowered, run = lower(lambda *inputs: add_twice(*inputs)[0], APART, CUT, OTHER)
    expected = graph_text(
        "%x, %c, %d",
        "%r = pabc.residual_norm(%x, [%c], [None], [%gate], [1.0], norm='none', "
        "y_dtype=torch.float32, y_like_x=True)",
        "%y = getitem(%r, 0)",
        "return (%y,)",
    )
    assert_same_graph(lowered, expected)
    check_same(run())


def test_where_a_copy_could_not_restore_it_all_stays():
    def function(*inputs):
        y, z = add_twice(*inputs)
        return plain(z), y[:, ::2]

    lowered, run = lower(function, APART, CUT, OTHER)
    assert strides_read(lowered) == [APART.stride()] * 2
    check_same(run())


def test_other_layouts_are_not_touched():
    def function(*inputs):
        return add_twice(*inputs)[1].abs()

    lowered, run = lower(function, CUT, OTHER, X)
    assert strides_read(lowered) == [(T * C, C, 1)]
    check_same(run())
