"""Lowering of norms that are put one after the other, as text and latents are."""

import pytest
import torch
from graphs import assert_same_graph
from lowered_norms import (
    LATENTS,
    ROWS,
    TEXT,
    C,
    check_same,
    graph_text,
    left,
    lower,
    modulate,
    norms,
    plain,
)
from lowering import matches_of

import pabc
from pabc.kernels.joint_norm import OP
from pabc.kernels.residual_norm import OP as ALONE

pytestmark = pytest.mark.kernels


def count(lowered, op=OP):
    return len(lowered.graph.find_nodes(op="call_function", target=op))


def sums(text, latents, m):
    """Of one tensor's parts; both are read again."""
    both = torch.cat([text, latents], 1)
    text, latents = text + m.gate * both[:, :3], latents + m.weight * both[:, 3:]
    joint = torch.cat([modulate(text, m), modulate(latents, m)], 1)
    return joint, text.abs(), latents.abs()


def one_sum(text, latents, m):
    return torch.cat([plain(text), modulate(latents + m.gate * latents, m)], -2)


END = "1e-06, dim=1, dtype=torch.float32"
EXPECTED = {
    norms: [
        "%r = pabc.joint_norm([%text, %latents], None, None, None, None, [0, 0], 'layer', "
        "[None, None], [None, None], [%scale, %gate], [%shift, None], [1.0, 0.0], "
        f"{END}, writes_y=[False, False])",
        "%n = getitem(%r, 0)",
        "return (%n,)",
    ],
    sums: [
        "%both = cat([%text, %latents], 1)",
        "%a = slice(%both, 1, 0, 3)",
        f"%b = slice(%both, 1, 3, {2**63 - 1})",
        "%r = pabc.joint_norm([%text, %latents], [%a, %b], [None, None], [%gate, %weight], "
        "[1.0, 1.0], [1, 1], 'layer', [None, None], [None, None], [%scale, %scale], "
        f"[%shift, %shift], [1.0, 1.0], {END}, writes_y=[True, True])",
        "%n = getitem(%r, 2)",
        "%y0 = getitem(%r, 0)",
        "%y1 = getitem(%r, 1)",
        "%z0 = abs(%y0)",
        "%z1 = abs(%y1)",
        "return (%n, %z0, %z1)",
    ],
    one_sum: [
        "%r = pabc.joint_norm([%text, %latents], [%latents], [None], [%gate], [1.0], [0, 1], "
        "'layer', [None, None], [None, None], [None, %scale], [None, %shift], [0.0, 1.0], "
        f"{END}, writes_y=[False, False])",
        "%n = getitem(%r, 0)",
        "return (%n,)",
    ],
}


@pytest.mark.parametrize("function", EXPECTED)
def test_norms_become_one_call(function):
    lowered, run = lower(function, TEXT, LATENTS)
    assert_same_graph(lowered, graph_text("%text, %latents", *EXPECTED[function]))
    check_same(run())
    assert [each.kernel for each in matches_of(lowered)] == ["joint_norm"]


APART = {
    "one is no norm": lambda a, b, m: torch.cat([modulate(a, m), b], 1),
    "in channels": lambda a, b, m: torch.cat([modulate(b, m), plain(b)], 2),
    "another epsilon": lambda a, b, m: torch.cat(
        [plain(a), torch.nn.functional.layer_norm(b, [C], None, None, 1e-3)], 1
    ),
    "read by others": lambda a, b, m: (torch.cat([n := modulate(a, m), plain(b)], 1), n),
    "modulated by the other": lambda a, b, m: torch.cat(
        [plain(a), plain(y := b + m.gate * b) * y.mean(1, keepdim=True)], 1
    ),
}


@pytest.mark.parametrize("name", APART)
def test_others_are_norms_of_their_own(name):
    lowered, run = lower(APART[name], TEXT, LATENTS)
    assert count(lowered) == (
        name == "modulated by the other"
    ) and "aten.layer_norm.default" not in left(lowered)
    check_same(run())


def test_what_does_not_gain_is_looked_at_part_by_part():
    inputs = [each.to("meta") for each in (TEXT, LATENTS, *ROWS)]

    def gains(kernel, device, shape):
        return kernel == "residual_norm"

    lowered = lower(norms, *inputs[:2], rows=inputs[2:], kernels="auto", gains=gains)[0]
    assert [(each.kernel, each.reason) for each in matches_of(lowered)] == [
        ("residual_norm", None),
        ("residual_norm", None),
        ("joint_norm", "not faster here"),
    ]
    assert count(lowered, ALONE) == 2 and count(lowered) == 0


@pytest.mark.zoo
def test_a_real_model():
    pytest.importorskip("diffusers")
    from zoo import ENTRIES

    model, call = next(entry for entry in ENTRIES if entry.name == "CogVideoX").build()
    model.requires_grad_(False)
    schedule = pabc.Schedule.none(range(1))
    forced, expected = (
        pabc.compile(model, schedule, kernels=kernels, backend="eager")
        for kernels in ("force", "off")
    )
    torch.testing.assert_close(forced(**call)[0], expected(**call)[0], atol=2e-5, rtol=1e-4)
    assert any("joint_norm lowered" in line for line in forced.explain().lowered)
