"""Graphs before and after lowering, each op forced to the kernel that computes it."""

import torch
from stages import facts_of, with_facts
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pabc.passes import Facts, KernelMatches, lower_pass


def unmeasured(kernel, device, shape):
    return None


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, *mask):
        return scaled_dot_product_attention(q, k, v, *mask, **self.options).transpose(1, 2)


def export(model, *inputs):
    return torch.export.export(model, inputs, strict=False).run_decompositions({}).graph_module


def make_qkv(N=2, H=3, T=6, S=6, D=8, dtype=torch.float32):
    q = torch.randn(N, T, H, D, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, N, S, H, D, dtype=dtype).transpose(2, 3)
    return q, k, v


def lower(model, *inputs, kernels="force", gains=unmeasured):
    gm = export(model, *inputs)
    lowered, matches = lower_pass(gm, kernels=kernels, gains=gains)
    lowered.graph.lint()
    return gm, with_facts(lowered, Facts([matches]))


def matches_of(lowered):
    """Returns what kernels may compute in a graph that was lowered."""
    return facts_of(lowered)[KernelMatches].all
