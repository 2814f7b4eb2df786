"""Norms, sums and the rows that modulate them, lowered to kernels."""

from typing import NamedTuple

import torch
from lowering import export, unmeasured
from stages import with_facts
from torch import nn
from torch.nn.functional import layer_norm

from pabc.kernels.residual_norm import OP
from pabc.passes import Facts, canonicalize_pass, lower_pass

B, T, C = 2, 5, 24


class Rows(NamedTuple):
    """Rows that modulate, one for many tokens, and learned weights."""

    gate: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class Call(nn.Module):
    """A function of tensors and rows as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        found = self.function(*inputs[:-5], Rows(*inputs[-5:]))
        return found if isinstance(found, tuple) else (found,)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, CUT, OTHER = (draw(B, T, C, seed=seed) for seed in range(3))
MODULATION = draw(B, 1, 3 * C, seed=10).chunk(3, -1)
ROWS = (*MODULATION, draw(C, seed=20), draw(C, seed=21))


def lower(function, *inputs, rows=ROWS, kernels="force", gains=unmeasured):
    """Returns the lowered graph of a function, and what runs it and the graph before."""
    gm = canonicalize_pass(export(Call(function), *inputs, *rows))
    lowered, matches = lower_pass(gm, kernels=kernels, gains=gains)
    lowered = with_facts(lowered, Facts([matches]))
    lowered.graph.lint()
    return lowered, lambda: (lowered(*inputs, *rows), gm(*inputs, *rows))


def graph_text(inputs, *lines):
    """Returns the text of an expected graph of inputs and rows, see :mod:`graphs`."""
    head = f"graph({inputs}, {', '.join(f'%{name}' for name in Rows._fields)}):"
    return "\n    ".join([head, *lines])


def calls(lowered):
    return lowered.graph.find_nodes(op="call_function", target=OP)


def left(lowered):
    """Returns the ops that are left beside the kernel's calls."""
    skipped = {OP, getattr}
    return {
        str(n.target)
        for n in lowered.graph.nodes
        if n.op == "call_function" and n.target not in skipped and "getitem" not in str(n.target)
    }


def check_same(results, rtol=1e-5, atol=1e-6):
    found, expected = results
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def plain(x):
    return layer_norm(x, [C], None, None, 1e-6)


TEXT, LATENTS = draw(B, 3, C), draw(B, T, C, seed=1)


def modulate(x, m):
    return plain(x) * (1 + m.scale) + m.shift


def norms(text, latents, m):
    return torch.cat([modulate(text, m), plain(latents) * m.gate], 1)
