import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph, ops, trace
from stages import capture_call, compile_flat
from torch import nn

import pabc.passes.onednn as onednn
from pabc.passes import use_onednn_pass
from pabc.passes.ir import aten

OP = torch.ops.mkldnn._linear_pointwise.default

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


class Projections(nn.Module):
    """What may follow a projection, and is fused with it: sums, products, activations."""

    def forward(self, x, w, b, r):
        y = F.linear(x, w, b)
        return (
            y,
            F.silu(F.linear(x * 2, w, b)),
            r + F.linear(x + 1, w, b),
            F.relu(F.linear(x + 2, w) + r),
            r + r[:, :1] * F.linear(x.transpose(0, 1), w, b).transpose(0, 1),
            F.linear(x, w, b) + F.linear(x + 3, w, b),
        )


def make_call(rows=(4, 16), dtype=torch.float32):
    torch.manual_seed(0)
    call = {"x": torch.randn(*rows, 8), "w": torch.randn(24, 8), "b": torch.randn(24)}
    return {name: t.to(dtype) for name, t in {**call, "r": torch.randn(*rows, 24)}.items()}


@pytest.fixture
def faster(monkeypatch):
    """oneDNN is taken, however fast it is here."""
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)


def test_a_projection_becomes_onednns(faster):
    gm = trace(lambda x, w, b: (F.linear(x, w, b), F.linear(x, w)), *[*make_call().values()][:3])
    assert_same_graph(
        use_onednn_pass(gm),
        """
        graph(%x, %w, %b):
            %y = mkldnn._linear_pointwise(%x, %w, %b, 'none', [], '')
            %z = mkldnn._linear_pointwise(%x, %w, None, 'none', [], '')
            return (%y, %z)
        """,
    )


def test_projections_become_onednns(faster):
    call = make_call()
    gm = capture_call(Projections(), call)
    changed = use_onednn_pass(gm)
    assert OP in ops(changed) and aten.linear.default not in ops(changed)
    assert aten.linear.default in ops(gm), "the graph given stays"
    for found, expected in zip(changed(*call.values()), Projections()(**call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("rows", [(4, 16), (16, 4)])
def test_inductor_compiles_them_for_weights_that_change(faster, rows):
    call = make_call(rows)
    gm = use_onednn_pass(capture_call(Projections(), call))
    with torch.no_grad():
        run = compile_flat(gm)
        for _ in range(2):
            for found, expected in zip(run(*call.values()), Projections()(**call), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            call["w"].mul_(1.5)


@pytest.mark.parametrize(
    "call", [make_call((1, 2)), make_call(dtype=torch.bfloat16), make_call(dtype=torch.float64)]
)
def test_few_rows_and_other_dtypes_stay(faster, call):
    gm = capture_call(Projections(), call)
    assert_same_graph(use_onednn_pass(gm), gm)


def test_it_stays_where_onednn_is_not_faster(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    gm = capture_call(Projections(), make_call())
    assert use_onednn_pass(gm) is gm


def test_the_question_has_an_answer():
    assert onednn.onednn_is_faster() in (True, False)
