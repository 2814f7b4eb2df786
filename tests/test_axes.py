import pytest
import torch
import torch.nn.functional as F
from conftest import capture_call, run_to
from torch import nn

from pabc.passes import Axis, Factor, name_axes_pass, verify_axes
from pabc.passes.ir import output_node


class Function(nn.Module):
    """f(x) beside x itself, which makes x the latents."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y=None):
        return x * 2, self.function(x) if y is None else self.function(x, y)


X_SHAPE, Y_SHAPE = (2, 4, 3, 6), (2, 5, 3, 6)


def axes_after(function, *, with_y=False):
    """Per dimension of the result, the axes it runs along: `2` is dimension 2 of x, `y2` of y."""
    call = {"x": torch.randn(X_SHAPE)} | ({"y": torch.randn(Y_SHAPE)} if with_y else {})
    gm = run_to(capture_call(Function(function), call), "axes")
    result = output_node(gm.graph).args[0][1]
    names = {"x": "", "y": "y"}
    return [
        "".join(f"{names[a.source]}{a.dim}" for f in product for a in f.axes()) or "-"
        for product in result.meta["axes"]
    ]


WEIGHT, KERNEL = torch.randn(7, 6), torch.randn(5, 4, 1, 2)
INDEX = torch.tensor([2, 0])
NO_RULE = "the op has no rule, and loses the axes"
EXPECTED = {
    "view merges": (lambda x: x.view(8, 18), ["01", "23"]),
    "view splits": (lambda x: x.view(2, 2, 2, 18), ["0", "1", "1", "23"]),
    "view cuts across": (lambda x: x.view(2, 6, 2, 6), ["0123"] * 4),
    "reshape after permute": (lambda x: x.permute(0, 2, 1, 3).reshape(6, 24), ["02", "13"]),
    "transpose": (lambda x: x.transpose(1, -1), ["0", "3", "2", "1"]),
    "unsqueeze": (lambda x: x[:, None], ["0", "-", "1", "2", "3"]),
    "squeeze": (lambda x: x[:, :1].squeeze(1), ["0", "2", "3"]),
    "expand": (lambda x: x[:, :, :1].expand(-1, -1, 5, -1), ["0", "1", "-", "3"]),
    "slice": (lambda x: x[:, 1:3], ["0", "1", "2", "3"]),
    "strided slice": (lambda x: x[..., ::2], ["0", "1", "2", "3"]),
    "slice of a product": (lambda x: x.flatten(1, 2)[:, 1:], ["0", "12", "3"]),
    "select": (lambda x: x[:, 1], ["0", "2", "3"]),
    "unbind": (lambda x: x.unbind(2)[1], ["0", "1", "3"]),
    "split": (lambda x: x.split([1, 3], 1)[1], ["0", "1", "2", "3"]),
    "chunk": (lambda x: x.chunk(2, -1)[0], ["0", "1", "2", "3"]),
    "roll": (lambda x: x.roll((1, 1), (1, 2)), ["0", "1", "2", "3"]),
    "flip": (lambda x: x.flip(1), ["0", "1", "2", "3"]),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), ["0", "1", "2", "3"]),
    "repeat adds dimensions": (lambda x: x.repeat(5, 1, 1, 1, 1), ["-", "0", "1", "2", "3"]),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), ["0", "1", "2", "3"]),
    "index_select": (lambda x: x.index_select(2, INDEX), ["0", "1", "2", "3"]),
    "stack": (lambda x: torch.stack([x, x + 1], 1), ["0", "-", "1", "2", "3"]),
    "mean": (lambda x: x.mean(2), ["0", "1", "3"]),
    "mean keeps": (lambda x: x.mean(2, keepdim=True), ["0", "1", "-", "3"]),
    "sum": (lambda x: x.sum((1, 2)), ["0", "3"]),
    "linear": (lambda x: F.linear(x, WEIGHT), ["0", "1", "2", "-"]),
    "matmul by a weight": (lambda x: x @ WEIGHT.T, ["0", "1", "2", "-"]),
    "matmul of the latents": (lambda x: x @ x.transpose(-1, -2), ["0", "1", "2", "2"]),
    "norms": (lambda x: F.layer_norm(x, (6,)), ["0", "1", "2", "3"]),
    "group norm": (lambda x: F.group_norm(x, 2), ["0", "1", "2", "3"]),
    "softmax": (lambda x: x.softmax(-1), ["0", "1", "2", "3"]),
    "conv": (lambda x: F.conv2d(x, KERNEL, stride=(1, 2)), ["0", "-", "2", "3"]),
    "transposed conv": (
        lambda x: F.conv_transpose1d(x.flatten(2), KERNEL[:4, :, 0], stride=2),
        ["0", "-", "23"],
    ),
    "concat with nothing": (lambda x: torch.cat([x, x[..., 6:]], -1), ["0", "1", "2", "3"]),
    "broadcast": (lambda x: torch.ones(6) + x, ["0", "1", "2", "3"]),
    "where": (lambda x: torch.where(torch.ones(3, 1).bool(), x, 0.0), ["0", "1", "2", "3"]),
    "embedding": (
        lambda x: F.embedding(x[:, :, 0].long().clamp(0, 5), WEIGHT.T),
        ["0", "1", "3", "-"],
    ),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 1)), ["0", "1", "2", "3"]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (1, 2)), ["0", "1", "2", "3"]),
    "up": (lambda x: F.interpolate(x, scale_factor=2), ["0", "1", "2", "3"]),
    "index": (lambda x: x[:, :, [2, 0]], ["0", "1", "2", "3"]),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), ["0", "1", "2", "3"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_axes_after_one_op(name):
    function, expected = EXPECTED[name]
    assert axes_after(function) == expected


@pytest.mark.xfail(strict=True, reason=NO_RULE)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda x: x.unfold(3, 2, 2), ["0", "1", "2", "3", "3"], id="tensor unfold"),
        pytest.param(
            lambda x: F.pixel_unshuffle(x.transpose(2, 3)[:, :, :, :2], 2),
            ["0", "132", "3", "2"],
            id="pixel_unshuffle",
        ),
        pytest.param(
            lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2)))),
            ["0", "1", "2", "3", "3"],
            id="complex",
        ),
    ],
)
def test_axes_after_one_op_to_do(function, expected):
    assert axes_after(function) == expected


def test_in_place_writes_into_an_empty_tensor_keep_axes():
    def rotate(x):
        result = torch.empty_like(x)
        result[..., 0::2], result[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return result

    assert axes_after(rotate) == ["0", "1", "2", "3"]


def test_concatenation_keeps_each_part():
    joined = axes_after(lambda x, y: torch.cat([y, x], 1), with_y=True)
    assert joined == ["0", "y11", "2", "3"]
    back = axes_after(lambda x, y: torch.cat([y, x], 1)[:, 5:], with_y=True)
    assert back[1] == "1"
    split = axes_after(lambda x, y: torch.cat([y, x], 1).split([5, 4], 1)[0], with_y=True)
    assert split[1] == "y1"


def test_axes_through_patches_and_back():
    def patch_and_back(x):
        tokens = x.view(2, 4, 3, 3, 2).permute(0, 2, 3, 1, 4).reshape(2, 9, 8)
        tokens = F.linear(tokens, torch.ones(8, 8))
        return tokens.view(2, 3, 3, 4, 2).permute(0, 3, 1, 2, 4).reshape(2, 4, 3, 6)

    assert axes_after(patch_and_back) == ["0", "-", "2", "3"]


def test_a_lost_axis_says_which_node_lost_it():
    call = {"x": torch.randn(2, 4, 3, 6)}
    gm = run_to(capture_call(Function(lambda x: x.cumsum(1).view(2, 6, 2, 6)), call), "axes")
    result = output_node(gm.graph).args[0][1]
    assert result.meta["axes"][1][0].reason == "view (aten.view.default) mixes positions"


def test_each_factor_of_an_input_is_its_own_axis():
    gm = run_to(capture_call(Function(lambda x: x + 1), {"x": torch.randn(2, 4, 3)}), "axes")
    (x,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    assert x.meta["axes"] == tuple((Factor(s, Axis("x", i)),) for i, s in enumerate((2, 4, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, text, x):
        return (x @ self.weight) * (text @ self.weight).mean(1, keepdim=True)


def test_the_latents_are_the_input_that_comes_out_again():
    call = {"text": torch.randn(2, 5, 6), "x": torch.randn(2, 4, 6)}
    assert run_to(capture_call(TwoInputs(), call), "axes").meta["latents"] == "x"


def test_stated_latents_win():
    call = {"text": torch.randn(2, 4, 6), "x": torch.randn(2, 4, 6)}
    gm = run_to(capture_call(TwoInputs(), call), "axes", latents="text")
    assert gm.meta["latents"] == "text"


def test_unknown_latents_are_refused():
    gm = capture_call(TwoInputs(), {"text": torch.randn(2, 4, 6), "x": torch.randn(2, 4, 6)})
    with pytest.raises(ValueError, match=r"latents: expected one of the inputs .*'x'.*found 'z'"):
        name_axes_pass(gm, latents="z")


def test_no_latents_is_an_error():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean((1, 2))

    gm = capture_call(Pooled(), {"x": torch.randn(2, 4, 6)})
    with pytest.raises(ValueError, match=r"axes come out again.*found none among \['x'\]"):
        name_axes_pass(gm)


def test_verify_catches_factors_that_do_not_multiply_to_the_shape():
    gm = run_to(capture_call(Function(lambda x: x + 1), {"x": torch.randn(2, 4, 3)}), "axes")
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["axes"] = ((Factor(5),), *node.meta["axes"][1:])
    with pytest.raises(AssertionError, match="multiply to"):
        verify_axes(gm)
