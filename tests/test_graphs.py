"""Comparison of graphs: what counts, and what does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph, text_of, trace
from models import ONE_BLOCK
from stages import capture_call, run_to
from torch import Tensor

from pabc.passes import canonicalize_pass

X, W, B = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
TEXT = """
    graph(%x, %w, %b):
        %l = linear(%x, %w, %b)
        %wide = _to_copy(%l, dtype=torch.float64)
        %parts = split(%wide, 2, -1)
        %first = getitem(%parts, 0)
        %sum = add(%first, 1e-6)
        %g = gelu(%w, approximate='tanh')
        %joined = cat([%w, %g])
        return (%sum, %joined)
"""


def project(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.cat([w, F.gelu(w, approximate="tanh")])
    return F.linear(x, w, b).to(torch.float64).split(2, -1)[0] + 1e-6, joined


def test_a_graph_equals_its_text() -> None:
    gm = canonicalize_pass(trace(project, X, W, B))
    assert_same_graph(gm, TEXT)
    assert_same_graph(gm, text_of(gm))
    assert_same_graph(gm, gm)


def test_called_graphs_are_compared_where_the_text_has_them() -> None:
    gm = run_to(capture_call(ONE_BLOCK.model(), ONE_BLOCK.call()), "cache")
    text = text_of(gm)
    assert_same_graph(gm, text)
    main, *bodies = text.split("\n\n")
    assert [body.split("(")[0] for body in bodies] == ["full_0", "mlp_0", "stack_0", "model_0"]
    assert_same_graph(gm, main)
    with pytest.raises(AssertionError, match=r"\n-    %gelu_0 = gelu\(.*, 'tanh'\)\n\+"):
        assert_same_graph(gm, text.replace("gelu(%linear_0)", "gelu(%linear_0, 'tanh')"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("linear(%x, %w, %b)", "linear(%x, %w)"),
        ("linear(%x, %w, %b)", "linear(%b, %w, %x)"),
        ("linear", "mkldnn._linear_pointwise"),
        ("add(", "add.Scalar("),
        ("1e-6", "1e-5"),
        ("[%w, %g]", "(%w, %g)"),
        ("float64", "float32"),
        ("(%sum, %joined)", "(%joined, %sum)"),
        ("(%sum, %joined)", "(%sum,)"),
        ("(%x, %w, %b):", "(%x, %b, %w):"),
        ("(%x, %w, %b):", "(%x, %w, %b, %c):"),
        ("%g = ", "%unused = sin(%l)\n        %g = "),
        ("gelu(%w, approximate='tanh')", "gelu(%w, approximate='tanh')  # a note"),
    ],
)
def test_a_difference_is_shown(old: str, new: str) -> None:
    assert old in TEXT
    with pytest.raises(AssertionError, match=r"(?s)--- expected\n\+\+\+ found\n.*\n[+-]"):
        assert_same_graph(canonicalize_pass(trace(project, X, W, B)), TEXT.replace(old, new, 1))


def test_names_and_the_order_of_independent_nodes_make_no_difference() -> None:
    first, *lines = TEXT.strip().splitlines()
    *lines, last = lines
    reordered = "\n".join([first, *lines[-2:], *lines[:-2], last])
    assert_same_graph(canonicalize_pass(trace(project, X, W, B)), reordered.replace("%l", "%y"))


def test_no_graph_equals_no_text() -> None:
    with pytest.raises(AssertionError, match="expected the text of a graph, found ''"):
        assert_same_graph(trace(project, X, W, B), "")


def test_notes_are_compared() -> None:
    gm = canonicalize_pass(trace(project, X, W, B))
    text = TEXT.replace("%b)\n", "%b)  # product\n")
    assert_same_graph(gm, text, note=lambda n: "product" if "linear" in str(n.target) else "")
