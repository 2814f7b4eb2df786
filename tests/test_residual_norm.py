"""Residual adds and norms in one pass: the kernel against float64; without a GPU, interpreted."""

import pytest
import torch
from norms import DEVICE, define, make

from pabc.kernels import residual_norm as module
from pabc.kernels.dtypes import FP8
from pabc.kernels.residual_norm import OP, residual_norm, residual_norm_reference
from pabc.kernels.rows import MAX_CHANNELS, configure_rows, is_split, merge_rows

pytestmark = pytest.mark.kernels
SHAPES = [(2, 7, 72), (3, 130), (1, 1, 5), (2, 3, 5, 96), (5, 1152), (2, 3000), (1, 5120)]
EVERY_BIT_PATTERN = torch.arange(256, dtype=torch.uint8).view(FP8)


def call(function, terms, given):
    x, *parts = terms
    return function(x, *parts, **given)


CASES = [
    "/ layer",
    "/ layer scale shift",
    "/ rms weight scale product",
    "plain / layer weight bias",
    "gated / none y",
    "gated-fp8 / layer scale shift",
    "gated plain-fp8 gated-half / rms weight bias scale shift",
]


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(what, shape):
    layouts = ("", "columns", "gaps") if torch.Size(shape).numel() < 3000 else ("",)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in layouts:
            terms, given = make(shape, dtype, what, layout)
            exact, same = (define(terms, given, d) for d in (torch.float64, dtype))
            found = call(residual_norm, terms, given)
            reference = call(residual_norm_reference, terms, given)
            for x, *others in zip(exact, same, found, reference, strict=True):
                allowed, *errors = ((other.double() - x).abs().max() for other in others)
                assert max(errors) <= 2 * allowed + 2e-6, (dtype, layout)
                assert others[1].dtype == dtype and others[1].is_contiguous()


def test_decodes_every_fp8():
    x, scale = torch.zeros(3, 256, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    cut = EVERY_BIT_PATTERN.to(DEVICE).expand(3, 256)
    (found,) = residual_norm(x, [cut], [scale], [None], [1.0], "none", y_dtype=torch.float32)
    torch.testing.assert_close(found, cut.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["", "columns", "gaps"])
def test_results_may_be_laid_out_like_x(layout):
    terms, given = make((2, 3, 4, 24), torch.float32, "gated / layer", layout)
    expected = call(residual_norm, terms, given)
    for name, at in (("y_like_x", 0), ("n_like_x", 1)):
        found = call(residual_norm, terms, {**given, name: True})
        assert found[at].stride() == torch.empty_like(terms[0]).stride()
        assert found[1 - at].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["", "columns", "gaps"])
def test_results_may_be_in_another_order(layout):
    """Frames of a video beside one another, as temporal attention takes them."""
    terms, given = make((6, 5, 24), torch.float32, "gated plain / layer scale", layout)
    y, n = call(residual_norm, terms, given)
    split, order = [2, 3, 5, 24], [0, 2, 1, 3]
    for name, at in (("y_order", 0), ("n_order", 1)):
        changed = {**given, "split": split, name: order}
        expected = [y, n]
        expected[at] = expected[at].view(split).permute(order).contiguous()
        for function in (residual_norm, residual_norm_reference):
            for a, b in zip(call(function, terms, changed), expected, strict=True):
                assert a.shape == b.shape and a.is_contiguous()
                torch.testing.assert_close(
                    a, b, rtol=0, atol=0 if function is residual_norm else 1e-6
                )


@pytest.mark.parametrize(
    ("split", "shape", "fits"),
    [
        ((2, 3, 5, 8), (6, 5, 8), True),
        ((6, 5, 8), (6, 5, 8), True),
        ((2, 1, 8), (2, 1, 8), True),
        ((1, 4, 2, 8), (1, 8, 8), True),
        ((3, 10, 8), (6, 5, 8), False),
        ((6, 5, 2, 4), (6, 5, 8), False),
        ((6, 5, 5, 8), (6, 5, 8), False),
    ],
)
def test_rows_are_split(split, shape, fits):
    assert is_split(split, shape) == fits


def test_other_dtypes_of_results_and_operands():
    (x, *parts), given = make((2, 7, 72), torch.float32, "gated / layer weight scale", "")
    exact = define((x, *parts), given, torch.float64)
    given = {**given, "y_dtype": torch.float16, "n_dtype": torch.bfloat16}
    y, n = call(residual_norm, (x, *parts), given)
    assert (y.dtype, n.dtype) == (torch.float16, torch.bfloat16)
    torch.testing.assert_close(y.double(), exact[0], rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(n.double(), exact[1], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_no_more(shape, monkeypatch):
    terms, given = make(shape, torch.float32, "gated plain / layer shift")
    expected = call(residual_norm, terms, given)
    buffers = []

    def allocate(given):
        x = given.x
        buffers.extend(torch.full((x.numel() + 200,), float("nan"), device=DEVICE) for _ in "yn")
        return [buffer[100:-100].view(x.shape) for buffer in buffers]

    monkeypatch.setattr(module, "_allocate", allocate)
    found = call(residual_norm, terms, given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(b[:100].isnan().all() and b[-100:].isnan().all() for b in buffers)


def test_nothing_to_compute():
    (n,) = residual_norm(torch.ones(0, 8, device=DEVICE), [], [], [], [], n_dtype=torch.float32)
    assert n.shape == (0, 8)


def test_is_an_op():
    terms, given = make((2, 7, 72), torch.float32, "gated plain / layer scale shift")
    torch.library.opcheck(OP, terms, given)  # which has no way to compare fp8
    for what in ("gated plain / layer scale shift", "gated-fp8 / none y"):
        terms, given = make((2, 7, 72), torch.float32, what)
        found, expected = OP(*terms, **given), call(residual_norm, terms, given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_are_merged_where_all_operands_allow_it():
    x = torch.empty(2, 3, 1, 5, 8)
    assert merge_rows(x.shape, [x]) == ([30], [(8, 1)])
    assert merge_rows(x.shape, [x, torch.empty(2, 1, 1, 1, 8)]) == (
        [2, 15],
        [(120, 8, 1), (8, 0, 1)],
    )
    assert merge_rows(x.shape, [x, torch.empty(3, 1, 1, 8), None])[0] == [2, 3, 5]
    assert merge_rows((1, 8), [torch.empty(8)]) == ([], [(1,)])


@pytest.mark.parametrize("C", [1, 16, 17, 1152, 5120, MAX_CHANNELS])
def test_programs_hold_whole_rows(C):
    taken = configure_rows(C)
    assert taken["COLUMNS"] >= C and taken["num_warps"] in (4, 8, 16)
    assert taken["ROWS"] * taken["COLUMNS"] // taken["num_warps"] <= 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm: expected one of .*, found batch"),
        (
            {"x": torch.ones(2, 3, 4, dtype=torch.float64)},
            "x: expected dtype torch.float32 or .*, found torch.float64",
        ),
        (
            {"x": torch.ones(1, MAX_CHANNELS + 1), "cuts": [torch.ones(1)]},
            "x: expected up to 16384 channels",
        ),
        ({"cuts": [torch.ones(2, 4, 4)]}, r"cuts: expected a shape that broadcasts to \(2, 3, 4\)"),
        ({"cuts": [torch.ones(2, 3, 4).to(FP8)]}, "cut_scales: expected given for fp8"),
        ({"gates": []}, "gates: expected one for each cut, 1, found 0"),
        (
            {"scale": torch.ones(5)},
            r"scale: expected a shape that broadcasts to \(2, 3, 4\), found \(5,\)",
        ),
        ({"weight": torch.ones(1, 4)}, r"weight: expected shape \(4,\), found \(1, 4\)"),
        ({"split": [3, 2, 4]}, r"split: expected \(2, 3, 4\) with dimensions of rows split"),
        ({"split": [2, 3, 4], "n_order": [0, 2, 1]}, r"n_order: expected an order of \[0, 1, 2\]"),
        ({"n_order": [1, 0, 2]}, r"n_order: expected an order of \[\]"),
        ({"n_dtype": None}, "n_dtype: expected a dtype where y_dtype is None"),
        ({"n_dtype": torch.int32}, "n_dtype: expected one of"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "x": torch.ones(2, 3, 4),
        "cuts": [torch.ones(2, 3, 4)],
        "cut_scales": [None],
        "gates": [None],
        "factors": [1.0],
        "n_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=r"^residual_norm\." + message):
        residual_norm(**{**arguments, **change})
