"""Lowering of attention to the kernel that its lengths are for."""

import pytest
import torch
from graphs import assert_same_graph
from lowering import Attend, lower, make_qkv
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import ENTRIES

import pabc
from pabc.kernels import attention, short_attention, text_attention
from pabc.passes.ir import value

pytestmark = pytest.mark.kernels
OPS = {
    each.OP: each.__name__.rpartition(".")[2]
    for each in (attention, short_attention, text_attention)
}


RESTORED = [
    "%p = permute(%o, [0, 1, 2, 3])",
    "%s = clone(%p, memory_format=torch.contiguous_format)",
    "%a = permute(%s, [0, 1, 2, 3])",
    "return (%a,)",
]
"""Results of the graph are laid out as before."""


def kernels_of(lowered):
    return [OPS[node.target] for node in lowered.graph.nodes if node.target in OPS]


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ({"T": 64, "S": 64}, "short_attention"),
        ({"T": 65, "S": 64}, "text_attention"),
        ({"T": 20, "S": 300}, "text_attention"),
        ({"T": 70, "S": 520}, "attention"),
        ({"T": 3, "S": 300, "D": 128, "dtype": torch.float32}, "attention"),
    ],
    ids=str,
)
def test_each_length_has_its_kernel(sizes, kernel):
    torch.manual_seed(0)
    inputs = make_qkv(**sizes)
    gm, lowered = lower(Attend(scale=0.3), *inputs)
    assert kernels_of(lowered) == [kernel]
    (found,), (expected,) = lowered(*inputs), gm(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("sizes", [{"T": 70, "S": 9}, {"T": 66, "S": 520}], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(sizes, kind):
    torch.manual_seed(0)
    keys = torch.rand(1, sizes["S"]) < 0.7
    keys[:, 0] = True
    mask = keys if kind == "bool" else torch.randn(1, sizes["S"])
    inputs = (*make_qkv(**sizes), mask)
    gm, lowered = lower(Attend(), *inputs)
    assert len(kernels_of(lowered)) == 1
    torch.testing.assert_close(lowered(*inputs), gm(*inputs), atol=1e-5, rtol=1e-5)


class ByFrame(nn.Module):
    """Frames of a video that read the same text."""

    def __init__(self, frames=3, *, later=False):
        super().__init__()
        self.frames, self.later = frames, later

    def forward(self, q, k, v):
        k, v = (self.repeat(x) for x in (k, v))
        return scaled_dot_product_attention(q, k, v)

    def repeat(self, x):
        M, S, H, D = x.shape
        x = x.permute(0, 2, 1, 3)[:, None] if self.later else x[:, None]
        x = x.expand(M, self.frames, *x.shape[2:]).contiguous()
        x = x if self.later else x.transpose(2, 3)
        return x.reshape(M * self.frames, H, S, D)


@pytest.mark.parametrize("later", [False, True])
def test_texts_are_not_repeated(later):
    torch.manual_seed(0)
    q = torch.randn(6, 2, 70, 8)
    k, v = torch.randn(2, 2, 9, 2, 8)
    gm, lowered = lower(ByFrame(later=later), q, k, v)
    order = [0, 1, 2, 3, 4] if later else [0, 1, 3, 2, 4]
    lines = []
    for x in "kv":
        source = x
        if later:
            lines.append(f"%{x}0 = permute(%{x}, [0, 2, 1, 3])")
            source = f"{x}0"
        lines.append(f"%{x}1 = unsqueeze(%{source}, 1)")
        lines.append(f"%{x}2 = permute(%{x}1, {order})")
        lines.append(f"%{x}3 = select.int(%{x}2, 1, 0)")
    lines.append("%o = pabc.text_attention(%q, %k3, %v3, None, None, None)")
    assert_same_graph(lowered, "\n".join(["graph(%q, %k, %v):", *lines, *RESTORED]))
    (call,) = (node for node in lowered.graph.nodes if node.target in OPS)
    assert value(call.args[1]).shape == (2, 2, 9, 8)
    torch.testing.assert_close(lowered(q, k, v), gm(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("Allegro", "short_attention"),
        ("HunyuanVideo", "text_attention"),
        ("Latte", "short_attention"),
    ],
)
def test_real_models(name, kernel):
    model, call = next(entry for entry in ENTRIES if entry.name == name).build()
    forced = pabc.compile(model, pabc.Schedule.none(range(1)), backend="eager", kernels="force")
    with torch.no_grad():
        found, expected = (each(**call)[0] for each in (forced, model))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert any(f"{kernel} lowered" in line for line in forced.explain().lowered)


class Project(nn.Module):
    """Heads beside one another after attention of what was laid out by heads."""

    def __init__(self, *, early=False):
        super().__init__()
        self.early = early

    def forward(self, q, k, v, weight):
        o = scaled_dot_product_attention(q, k, v)
        o = o.view(-1, *o.shape[2:]).unflatten(0, o.shape[:2]) if self.early else o
        return nn.functional.linear(o.transpose(1, 2).flatten(2), weight), o


RESULTS = {
    False: """
        %t = transpose.int(%o, 1, 2)
        %f = _unsafe_view(%t, [2, 70, 24])
        %l = linear(%f, %weight)
    """,
    True: """
        %b = view(%a, [-1, 70, 8])
        %c = view(%b, [2, 3, 70, 8])
        %t = transpose.int(%c, 1, 2)
        %d = clone(%t, memory_format=torch.contiguous_format)
        %f = _unsafe_view(%d, [2, 70, 24])
        %l = linear(%f, %weight)
    """,
}
"""What reads a result; a view that only the former layout had reads the copy that restores it."""


@pytest.mark.parametrize("early", [False, True])
def test_results_are_read_as_they_are_laid_out(early):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 70, 8)
    inputs = (q, k, v, torch.randn(5, 24))
    gm, lowered = lower(Project(early=early), *inputs)
    assert len(kernels_of(lowered)) == 1
    for found, expected in zip(lowered(*inputs), gm(*inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert found.stride() == expected.stride()
    head = "graph(%q, %k, %v, %weight):\n%o = pabc.text_attention(%q, %k, %v, None, None, None)\n"
    copied, result = "\n".join(RESTORED[:-1]), "return (%l, %c)" if early else "return (%l, %a)"
    assert_same_graph(lowered, f"{head}{copied}{RESULTS[early]}{result}")
