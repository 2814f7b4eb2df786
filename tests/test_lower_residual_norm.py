"""Lowering of residual adds, norms and modulation: what becomes one call, and what does not."""

import pytest
import torch
from graphs import assert_same_graph
from lowered_norms import (
    CUT,
    OTHER,
    ROWS,
    B,
    C,
    T,
    X,
    calls,
    check_same,
    draw,
    graph_text,
    left,
    lower,
    plain,
)
from lowering import matches_of
from torch.nn.functional import layer_norm, rms_norm

import pabc
from pabc.kernels.dtypes import FP8
from pabc.kernels.rows import MAX_CHANNELS

pytestmark = pytest.mark.kernels


def num_terms(call):
    return len(call.args[1] or ())


def by_op(x, weight):
    return rms_norm(x, [C], weight, 1e-6)


def by_hand(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


NORMS = {  # the function, and what the call of the kernel says of it
    "layer": (lambda x, m: plain(x), "norm='layer', offset=0.0, eps=1e-06"),
    "learned": (
        lambda x, m: layer_norm(x, [C], m.weight, m.bias),
        "norm='layer', weight=%weight, bias=%bias, offset=0.0, eps=1e-05",
    ),
    "modulated": (
        lambda x, m: plain(x) * (1 + m.scale) + m.shift,
        "norm='layer', scale=%scale, shift=%shift, offset=1.0, eps=1e-06",
    ),
    "commuted": (
        lambda x, m: m.shift + (m.scale + 1) * plain(x),
        "norm='layer', scale=%scale, shift=%shift, offset=1.0, eps=1e-06",
    ),
    "no shift": (
        lambda x, m: by_op(x, m.weight) * (1 + m.scale),
        "norm='rms', weight=%weight, scale=%scale, offset=1.0, eps=1e-06",
    ),
    "no scale": (
        lambda x, m: plain(x) + m.shift,
        "norm='layer', shift=%shift, offset=0.0, eps=1e-06",
    ),
    "product": (
        lambda x, m: plain(x) * m.scale + m.shift,
        "norm='layer', scale=%scale, shift=%shift, offset=0.0, eps=1e-06",
    ),
    "by hand": (
        lambda x, m: by_hand(x, m.weight) * (1 + m.scale) + m.shift,
        "norm='rms', weight=%weight, scale=%scale, shift=%shift, offset=1.0, eps=1e-06",
    ),
    "all": (
        lambda x, m: (layer_norm(x, [C], m.weight) + m.bias) * (1 + m.scale) + m.shift,
        "norm='layer', weight=%weight, bias=%bias, "
        "scale=%scale, shift=%shift, offset=1.0, eps=1e-05",
    ),
    "in place of a sum": (
        lambda x, m: m.shift + m.gate * plain(x),
        "norm='layer', scale=%gate, shift=%shift, offset=0.0, eps=1e-06",
    ),
    "of all tokens": (
        lambda x, m: plain(x) * (1 + 2 * x) + x,
        "norm='layer', scale=%twice, shift=%x, offset=1.0, eps=1e-06",
    ),
    "epsilon by default": (
        lambda x, m: rms_norm(x, [C], m.weight),
        f"norm='rms', weight=%weight, offset=0.0, eps={torch.finfo(torch.float32).eps}",
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_become_one_call(name):
    function, said = NORMS[name]
    lowered, run = lower(function, X)
    expected = graph_text(
        "%x",
        "%twice = mul(%x, 2)" if "%twice" in said else "",
        f"%r = pabc.residual_norm(%x, None, None, None, None, {said}, n_dtype=torch.float32)",
        "%n = getitem(%r, 0)",
        "return (%n,)",
    )
    assert_same_graph(lowered, expected)
    check_same(run())
    assert [each.reason for each in matches_of(lowered)] == [None]
    assert matches_of(lowered)[0].shape == (B * T, C, 8)


SUMS = {  # the function; x, cuts, their scales, gates and factors of the call
    "gate": (lambda x, c, d, m: x + m.gate * c, "%x, [%c], [None], [%gate], [1.0]"),
    "commuted": (lambda x, c, d, m: c * m.gate + x, "%x, [%c], [None], [%gate], [1.0]"),
    "plain": (lambda x, c, d, m: c + x, "%c, [%x], [None], [None], [1.0]"),
    "two": (
        lambda x, c, d, m: x + m.gate * c + d,
        "%x, [%c, %d], [None, None], [%gate, None], [1.0, 1.0]",
    ),
    "three": (
        lambda x, c, d, m: (x + m.gate * c) + m.shift * d + 0.5 * (m.scale * c),
        "%x, [%c, %d, %c], [None, None, None], [%gate, %shift, %scale], [1.0, 1.0, 0.5]",
    ),
    "inner": (
        lambda x, c, d, m: m.gate * d + (x + c),
        "%x, [%c, %d], [None, None], [None, %gate], [1.0, 1.0]",
    ),
    "gates of tokens": (lambda x, c, d, m: x + c * d[..., :1], "%x, [%c], [None], [%first], [1.0]"),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read"])
def test_sums_are_taken_with_the_norm_after_them(name, is_read):
    sum_of, terms = SUMS[name]

    def function(*inputs):
        y, m = sum_of(*inputs), inputs[-1]
        n = plain(y) * (1 + m.scale) + m.shift
        return (n, y.abs()) if is_read else n

    lowered, run = lower(function, X, CUT, OTHER)
    said = "norm='layer', scale=%scale, shift=%shift, offset=1.0, eps=1e-06, n_dtype=torch.float32"
    expected = graph_text(
        "%x, %c, %d",
        "%first = slice(%d, 2, 0, 1)" if "%first" in terms else "",
        f"%r = pabc.residual_norm({terms}, {said}{', y_dtype=torch.float32' * is_read})",
        *(["%y = getitem(%r, 0)", "%z = abs(%y)"] if is_read else []),
        f"%n = getitem(%r, {int(is_read)})",
        f"return (%n,{' %z' * is_read})",
    )
    assert_same_graph(lowered, expected)
    check_same(run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_in_fp8_are_read_as_they_are_kept(dtype):
    first, second, scale = (CUT * 9).to(FP8), OTHER.to(FP8), draw(B, T, 1).abs()

    def read(x, first, second, scale, m):
        return x + m.gate * (first.to(torch.float32) * scale).to(dtype)

    def read_two(x, first, second, scale, m):
        y = read(x, first, second, scale, m) + (scale * second.to(torch.float32)).to(dtype)
        return plain(y), y

    for function in (read, read_two):
        rows = [each.to(dtype) for each in ROWS]
        lowered, run = lower(function, X.to(dtype), first, second, scale, rows=rows)
        (call,) = calls(lowered)
        assert not left(lowered) and {n.meta["val"].dtype for n in call.args[1]} == {FP8}
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        check_same(run(), rtol=tolerance, atol=tolerance)


def test_casts_between_sum_and_norm_are_not_computed():
    """The sum is written in bfloat16, of which others make a wider form again."""

    def function(x, cut, other, m):
        y = (x.float() + cut * m.gate).to(x.dtype)
        n = (plain(y.float()) * (1 + m.scale) + m.shift).to(x.dtype)
        z = (y.float() + other * m.gate).to(x.dtype)
        return n, by_hand(z, m.weight.bfloat16())

    lowered, run = lower(function, *(each.bfloat16() for each in (X, CUT, OTHER)))
    assert left(lowered) == {"aten._to_copy.default"} and len(calls(lowered)) == 2
    assert [each.dtype for each in calls(lowered)[0].meta["val"]] == [torch.bfloat16] * 2
    check_same(run(), rtol=2**-6, atol=2**-5)


def test_a_sum_that_is_needed_for_the_modulation():
    def function(x, cut, m):
        y = x + m.gate * cut
        return plain(y) * (1 + y.mean(1, keepdim=True)), y

    lowered, run = lower(function, X, CUT)
    assert [num_terms(call) for call in calls(lowered)] == [1, 0], "the sum, then the norm"
    check_same(run())


def test_what_others_read_is_left():
    def function(x, cut, m):
        product = m.gate * cut
        normed = plain(x + product)
        scaled = normed * (1 + m.scale)
        return scaled + m.shift, scaled, normed, product

    lowered, run = lower(function, X, CUT)
    assert left(lowered) == {"aten.mul.Tensor", "aten.add.Tensor"}
    (call,) = calls(lowered)
    assert call.args[3] == [None] and len(call.meta["val"]) == 1
    check_same(run())


def test_four_terms_are_two_calls():
    def function(x, cut, m):
        for by in (m.gate, m.scale, m.shift, m.weight):
            x = x + by * cut
        return plain(x)

    lowered, run = lower(function, X, CUT)
    assert sorted(map(num_terms, calls(lowered))) == [1, 3] and not left(lowered)
    check_same(run())


def test_results_are_laid_out_as_before():
    """A stream whose channels lie apart, as after a convolution."""

    def function(x, cut, m):
        y = x + m.gate * cut
        return by_hand(y, m.weight), plain(x) + cut, y

    x = draw(B, C, T).mT
    lowered, run = lower(function, x, CUT)
    assert run()[1][2].stride() == x.stride() and not left(lowered)
    check_same(run())


FRAMES, PLACES = 3, 4
VIDEO = draw(B * FRAMES, PLACES, C)


def by_place(x):
    """From (B T) S C to (B S) T C."""
    split = x.view(B, FRAMES, PLACES, C)
    return split.permute(0, 2, 1, 3).reshape(B * PLACES, FRAMES, C)


COPIES = {
    "sum": (
        lambda x, c, m: by_place(x + m.weight * c),
        "%r = pabc.residual_norm(%x, [%c], [None], [%weight], [1.0], norm='none', "
        "split=[2, 3, 4, 24], y_dtype=torch.float32, y_order=[0, 2, 1, 3])",
        "%y = getitem(%r, 0)",
        "%z = _unsafe_view(%y, [8, 3, 24])",
        "return (%z,)",
    ),
    "norm": (
        lambda x, c, m: (x + c, by_place(plain(x + c))),
        "%r = pabc.residual_norm(%x, [%c], [None], [None], [1.0], norm='layer', offset=0.0, "
        "eps=1e-06, split=[2, 3, 4, 24], y_dtype=torch.float32, n_dtype=torch.float32, "
        "n_order=[0, 2, 1, 3])",
        "%y = getitem(%r, 0)",
        "%n = getitem(%r, 1)",
        "%z = _unsafe_view(%n, [8, 3, 24])",
        "return (%y, %z)",
    ),
    "sum and norm": (
        lambda x, c, m: (by_place(x + c), by_place(plain(x + c))),
        "%r = pabc.residual_norm(%x, [%c], [None], [None], [1.0], norm='layer', offset=0.0, "
        "eps=1e-06, split=[2, 3, 4, 24], y_dtype=torch.float32, y_order=[0, 2, 1, 3], "
        "n_dtype=torch.float32, n_order=[0, 2, 1, 3])",
        "%y = getitem(%r, 0)",
        "%n = getitem(%r, 1)",
        "%a = _unsafe_view(%y, [8, 3, 24])",
        "%b = _unsafe_view(%n, [8, 3, 24])",
        "return (%a, %b)",
    ),
    "transposed": (
        lambda x, c, m: plain(x).transpose(0, 1).contiguous(),
        "%r = pabc.residual_norm(%x, None, None, None, None, norm='layer', offset=0.0, "
        "eps=1e-06, split=[6, 4, 24], n_dtype=torch.float32, n_order=[1, 0, 2])",
        "%n = getitem(%r, 0)",
        "return (%n,)",
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_to_another_order_are_not_made(name):
    function, *lines = COPIES[name]
    lowered, run = lower(function, VIDEO, VIDEO * 2)
    assert_same_graph(lowered, graph_text("%x, %c", *lines))
    check_same(run())


KEPT_COPIES = {
    "of channels": (
        lambda x, c, m: plain(x).mT.contiguous(),
        "%a = transpose.int(%n, -2, -1)",
        "%b = clone(%a, memory_format=torch.contiguous_format)",
        "return (%b,)",
    ),
    "read by others": (
        lambda x, c, m: (by_place(n := plain(x)), n),
        "%a = view(%n, [2, 3, 4, 24])",
        "%b = permute(%a, [0, 2, 1, 3])",
        "%c = clone(%b, memory_format=torch.contiguous_format)",
        "%d = _unsafe_view(%c, [8, 3, 24])",
        "return (%d, %n)",
    ),
    "of rows that are merged": (
        lambda x, c, m: plain(x).view(B, -1, C).transpose(0, 1).contiguous(),
        "%a = view(%n, [2, -1, 24])",
        "%b = transpose.int(%a, 0, 1)",
        "%c = clone(%b, memory_format=torch.contiguous_format)",
        "return (%c,)",
    ),
}


@pytest.mark.parametrize("name", KEPT_COPIES)
def test_other_copies_are_made(name):
    function, *lines = KEPT_COPIES[name]
    lowered, run = lower(function, VIDEO, VIDEO * 2)
    said = "norm='layer', offset=0.0, eps=1e-06, n_dtype=torch.float32"
    norm = f"%r = pabc.residual_norm(%x, None, None, None, None, {said})"
    assert_same_graph(lowered, graph_text("%x, %c", norm, "%n = getitem(%r, 0)", *lines))
    check_same(run())


def test_a_product_with_the_norm_itself():
    def function(x, m):
        n = plain(x)
        return n * n

    lowered, run = lower(function, X)
    assert left(lowered) == {"aten.mul.Tensor"} and len(calls(lowered)) == 1
    check_same(run())


NOT_ONE = {
    "a sum of two": lambda x, c, m: x + c,
    "a product": lambda x, c, m: x * m.gate,
    "two products": lambda x, c, m: x * m.gate + c * m.scale,
    "a product of two as large": lambda x, c, m: x + x * c,
    "a row for all": lambda x, c, m: x + m.gate,
    "over two dimensions": lambda x, c, m: layer_norm(x, [T, C]),
    "integers": lambda x, c, m: (x > 0).long() + 2 * (c > 0).long(),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_other_things_are_not_looked_at(name):
    lowered, run = lower(NOT_ONE[name], X, CUT)
    assert matches_of(lowered) == () and not calls(lowered)
    check_same(run())


WIDE = torch.zeros(1, 1, MAX_CHANNELS + 1)
SPREAD = torch.zeros(3, 3, 3, 3, 8)[::2, ::2, ::2, ::2]


@pytest.mark.parametrize(
    ("x", "function", "reason"),
    [
        (X.double(), lambda x, m: plain(x), "torch.float64"),
        (X, lambda x, m: plain(x) * (1 + m.scale.double()), "torch.float64"),
        (WIDE, lambda x, m: layer_norm(x, x.shape[-1:]), f"{MAX_CHANNELS + 1} channels: at most"),
        (SPREAD, lambda x, m: layer_norm(x, [8]), "4 dimensions of rows: at most 3"),
        (X.bfloat16(), lambda x, m: rms_norm(x, [C]), "an epsilon of its dtype"),
    ],
    ids=["dtype", "scale", "channels", "dimensions", "epsilon"],
)
def test_what_the_kernel_does_not_compute_is_left_alone(x, function, reason):
    lowered, run = lower(function, x)
    (each,) = matches_of(lowered)
    assert reason in each.reason and not calls(lowered)
    assert all(map(torch.equal, *run()))


def test_parts_of_what_is_not_lowered_are_not_listed():
    def function(x, cut, m):
        y = x + m.gate * cut
        return plain(y) * (1 + m.scale) + m.shift, y

    inputs = [each.to("meta") for each in (X, CUT, *ROWS)]
    found = matches_of(lower(function, *inputs[:2], rows=inputs[2:], kernels="auto")[0])
    assert [(each.shape, each.reason) for each in found] == [
        ((B * T, C, 16), "not measured on this device")
    ]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["Latte", "Wan"])
def test_real_models(name):
    pytest.importorskip("diffusers")
    from zoo import ENTRIES

    model, call = next(entry for entry in ENTRIES if entry.name == name).build()
    model.requires_grad_(False)
    found = sorted(set(pabc.explain(model, **call).attention.values()) - {"other"})
    schedule = pabc.Schedule.from_masks(range(2), {kind: [False, True] for kind in found})
    options = {"backend": "eager", "cache_dtype": "fp8"}
    forced, plain = (
        pabc.compile(model, schedule, kernels=kernels, **options) for kernels in ("force", "off")
    )
    for _ in range(2):
        torch.testing.assert_close(forced(**call)[0], plain(**call)[0], atol=2e-5, rtol=1e-4)
    assert any("residual_norm lowered" in line for line in forced.explain().lowered)
