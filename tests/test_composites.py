import pytest
import torch
import torch.nn.functional as F
from stages import capture_call
from torch import nn
from torch.export import ExportedProgram

from pabc.passes.ir import aten
from pabc.passes.relations.table import RELATIONS
from pabc.passes.tracing.composites import KEPT, find_unknown_composites


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


class Written(nn.Module):
    """Writes to what nothing else has, and gives equal calls of composites unequal operands."""

    def forward(self, x, y, w):
        table = torch.arange(8, dtype=torch.float64)
        table /= 8.0
        parts = [torch.concat([torch.sin(z), torch.cos(z)], 1) for z in (x, y)]
        return torch.concat(parts, 1) * table, x.sin().mul_(w).flatten(1)


class Shared(nn.Module):
    """Writes to what others have too: a view's base, an operand with another user, an alias."""

    def forward(self, x, y, w):
        a, b, c, d = x.sin(), x.cos(), y.sin(), y.cos()
        a[:, 0].mul_(2.0)
        b.view(-1).add_(1.0)
        kept = c * 3.0
        c.mul_(2.0)
        F.dropout(d, 0.5, training=False).add_(1.0)
        return a, b, c, kept, d


@pytest.mark.parametrize("model", [Written(), Shared()], ids=["alone", "shared"])
def test_writes_keep_bits_and_become_results(model):
    call = {**example(), "w": torch.rand(8)}
    gm = capture_call(model, call)
    for step in range(2):
        call["x"] = call["x"] + step
        assert all(map(torch.equal, gm(*call.values()), model(**call)))
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    ops = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert not any(op._schema.is_mutable for op in ops)


def test_only_writes_that_are_seen_elsewhere_take_another_trace(monkeypatch):
    """A trace of the whole graph is ten times as slow as one of each kind of call."""
    traces = []
    whole = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram,
        "run_decompositions",
        lambda self, *args: traces.append(1) or whole(self, *args),
    )
    for model in (Composites(), Known()):
        capture_call(model, example())
    capture_call(Written(), {**example(), "w": torch.rand(8)})
    assert not traces
    capture_call(Shared(), example())
    assert traces


def test_dtypes_that_only_a_write_keeps_stay():
    class Narrow(nn.Module):
        def forward(self, x, y):
            return x.half().sin().mul_(y)

    call = {"x": torch.randn(4), "y": torch.randn(4)}
    result = capture_call(Narrow(), call)(*call.values())[0]
    assert result.dtype == torch.half and torch.equal(result, Narrow()(**call))


def test_kept_composites_have_a_relation():
    assert KEPT - {aten.dropout.default} <= RELATIONS.keys()
