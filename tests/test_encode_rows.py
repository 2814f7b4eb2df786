"""Encoding as fp8: the kernel, bit for bit; without a GPU, in the interpreter."""

import pytest
import torch

from pabc.kernels import encode_rows as module
from pabc.kernels.dtypes import FP8
from pabc.kernels.encode_rows import OP, encode_rows, encode_rows_reference
from pabc.passes.encode import encode

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5, 24), (2, 7), (9,), (4, 1152), (2, 2, 3, 40), (1, 5120)]


def make(shape, dtype, layout=""):
    """Rows of many magnitudes; as they lie, channels far apart, or with gaps."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 8
    x = (x * torch.logspace(-4, 4, x[..., :1].numel()).reshape(x[..., :1].shape)).to(DEVICE, dtype)
    if layout == "apart":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    return torch.cat([x, x], -1)[..., : shape[-1]] if layout == "gaps" else x


def bits(kept):
    return [kept[0].view(torch.uint8), kept[1]]


def are_equal(found, expected):
    return all(map(torch.equal, bits(found), bits(expected)))


@pytest.mark.parametrize("layout", ["", "apart", "gaps"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_ops(shape, layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = make(shape, dtype, layout)
        found, expected = encode_rows(x), encode(x, "fp8")
        assert are_equal(found, expected) and are_equal(encode_rows_reference(x), expected)
        assert found[0].stride() == torch.empty_like(x).stride() and found[1].is_contiguous()


def test_every_value_that_is_between_two():
    kinds = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    sorted_ = kinds[kinds.isfinite()].sort().values.to(DEVICE)
    between = (sorted_[1:] + sorted_[:-1]) / 2
    up, down = (torch.nextafter(between, torch.full_like(between, s)) for s in (1e9, -1e9))
    x = torch.cat([sorted_, between, up, down, sorted_.new_tensor([448.0])])[None]
    found = encode_rows(x)
    assert found[1].item() == 1.0
    assert torch.equal(found[0].view(torch.uint8), x.to(FP8).view(torch.uint8))


def test_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 0, 0], [1, nan, 2], [1, inf, -2], [1e-40, 0, -1e-40], [-0.0, 1, 2]])
    found, expected = encode_rows(x.to(DEVICE)), encode(x.to(DEVICE), "fp8")
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    torch.testing.assert_close(found[1], expected[1], equal_nan=True, atol=0, rtol=0)
    rows = [0, 3, 4]
    assert torch.equal(found[0][rows].view(torch.uint8), expected[0][rows].view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_no_more(shape, monkeypatch):
    x = make(shape, torch.float32)
    expected = encode_rows(x)
    buffers = []

    def allocate(given):
        (x,) = given
        sizes = (x.numel(), x.numel() // x.shape[-1])
        made = [torch.full((n + 64,), float("nan"), device=DEVICE) for n in sizes]
        made[0] = made[0].to(FP8)
        buffers.extend(made)
        shapes = x.shape, (*x.shape[:-1], 1)
        return tuple(b[32:-32].view(s) for b, s in zip(made, shapes, strict=True))

    monkeypatch.setattr(module, "_allocate", allocate)
    assert are_equal(encode_rows(x), expected)
    for buffer in buffers:
        assert buffer[:32].isnan().all() and buffer[-32:].isnan().all()


def test_is_an_op():
    x = make(SHAPES[0], torch.float32)
    torch.library.opcheck(OP, (x,), test_utils=("test_schema", "test_faketensor"))
    assert are_equal(OP(x), encode_rows(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.ones(3, 4, dtype=torch.int64),
            "expected dtype torch.float32 or .*, found torch.int64",
        ),
        (torch.ones(()), r"expected shape \(\.\.\., C\), found \(\)"),
        (torch.ones(1, 16385), "expected 1 to 16384 channels, found 16385"),
        (torch.ones(2, 3, 4, 5, 6).permute(3, 2, 1, 0, 4), "at most 3 dimensions of rows"),
    ],
)
def test_refusals(x, message):
    with pytest.raises(ValueError, match=r"^encode_rows\.x: .*" + message):
        encode_rows(x.to(DEVICE))
