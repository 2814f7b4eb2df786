import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph, ops
from stages import capture_call
from torch import nn

from pabc.passes import rewrite_formulas_pass
from pabc.passes.ir import aten, value


class Gelu(nn.Module):
    def __init__(self, approximate):
        super().__init__()
        self.approximate = approximate

    def forward(self, x):
        return F.gelu(x, approximate=self.approximate)


def test_gelu_becomes_a_sigmoid():
    gm = capture_call(Gelu("tanh"), {"x": torch.randn(4)})
    assert_same_graph(
        rewrite_formulas_pass(gm),
        """
        graph(%x):
            %square = mul(%x, %x)
            %scaled = mul(%square, 0.07135481627260025)
            %slope = add(%scaled, 1.5957691216057308)
            %u = mul(%slope, %x)
            %s = sigmoid(%u)
            %g = mul(%x, %s)
            return (%g,)
        """,
    )


def test_gelu_is_as_near_to_its_formula_as_pytorchs():
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    gm = rewrite_formulas_pass(capture_call(Gelu("tanh"), {"x": x}))
    assert aten.gelu.default not in ops(gm) and aten.sigmoid.default in ops(gm)
    exact = F.gelu(x.double(), approximate="tanh")
    found, theirs = gm(x)[0], F.gelu(x, approximate="tanh")
    assert torch.isfinite(found).all()
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (found - exact).abs().le(1e-6 + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_layouts_stay(dtype):
    x = torch.randn(3, 4, dtype=dtype).t()
    gm = capture_call(Gelu("tanh"), {"x": x})
    rewritten = rewrite_formulas_pass(gm)
    for node in rewritten.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        assert value(node).dtype == dtype
    found, expected = rewritten(x)[0], gm(x)[0]
    assert found.dtype == dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_the_exact_gelu_stays():
    gm = capture_call(Gelu("none"), {"x": torch.randn(4)})
    assert_same_graph(rewrite_formulas_pass(gm), gm)
