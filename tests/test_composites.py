import torch
import torch.nn.functional as F
from conftest import capture_call
from torch import nn

from pabc.passes.ir import aten
from pabc.passes.tracing.composites import find_unknown_composites


class Composites(nn.Module):
    """Composite ops that no pass has a rule for; some are made of others."""

    def forward(self, x, y, w):
        return (
            torch.concat([x, y], 1),
            torch.hstack([x, y]),
            torch.tile(x, (1, 2, 1)),
            torch.tensordot(x, w, dims=([2], [0])),
            F.conv1d(x, w[:3, :3, None], padding="same"),
            F.instance_norm(x),
            F.adaptive_avg_pool1d(x, 4),
            torch.take_along_dim(x, x.argsort(-1), -1),
        )


class Known(nn.Module):
    def forward(self, x, y, w):
        x = F.layer_norm(F.linear(x, w), (8,))
        return F.scaled_dot_product_attention(x, y, y).softmax(-1)


def example():
    torch.manual_seed(0)
    return {"x": torch.randn(2, 3, 8), "y": torch.randn(2, 3, 8), "w": torch.randn(8, 8)}


def test_composites_without_a_rule_are_taken_apart_bit_for_bit():
    model, call = Composites(), example()
    gm = capture_call(model, call)
    assert not find_unknown_composites(gm.graph)
    outputs = zip(gm(*call.values()), model(**call), strict=True)
    assert all(torch.equal(a, b) for a, b in outputs)


def test_composites_that_passes_know_stay_whole():
    gm = capture_call(Known(), example())
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert targets == [
        aten.linear.default,
        aten.layer_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.softmax.int,
    ]
