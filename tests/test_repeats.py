"""repeats: of equal copies that the prologue computes, one is kept; no bit changes."""

import json

import pytest
import torch
from graphs import assert_same_graph
from stages import capture_call, prologue_of, run_graph, run_to
from torch import nn

import pabc
from pabc import passes
from pabc.artifact.analysis import read_guarded, write_guarded
from pabc.options import Options
from pabc.passes.ir import user_inputs
from pabc.passes.provenance.copies import find_copies
from pabc.passes.repeats import keep_one
from pabc.runtime.prologue import first_copies

B, T, L, D = 2, 3, 5, 8
STEPS = tuple(range(6, 0, -1))


def by_interleaving(text_BLD):
    return text_BLD.repeat_interleave(T, 0)


def by_expanding(text_BLD):
    return text_BLD[:, None].expand(B, T, L, D).reshape(B * T, L, D)


def by_repeating(text_BLD):
    return text_BLD[:, None].repeat(1, T, 1, 1).flatten(0, 1)


def by_stacking(text_BLD):
    return torch.stack([text_BLD] * T, 1).flatten(0, 1)


def by_picking(text_BLD):
    return text_BLD[torch.arange(B).repeat_interleave(T)]


class OverFrames(nn.Module):
    """Cross attention frame by frame, to a text that is repeated over the frames."""

    def __init__(self, repeat=by_interleaving):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.norm = nn.LayerNorm(D)
        self.repeat = repeat

    def forward(self, x_BTSD, t_B, text_BLD):
        x = x_BTSD.flatten(0, 1) + t_B.repeat_interleave(T)[:, None, None]
        e = self.norm(self.repeat(text_BLD))
        projected = (self.q(x), self.k(e), self.v(e))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in projected)
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return (x + self.out(o.transpose(1, 2).flatten(2))).unflatten(0, (B, T))


def make_call():
    torch.manual_seed(1)
    names = ("x_BTSD", "t_B", "text_BLD")
    values = (torch.randn(B, T, 4, D), torch.rand(B), torch.randn(B, L, D))
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    "repeat", [by_interleaving, by_expanding, by_repeating, by_stacking, by_picking]
)
def test_keys_and_values_are_kept_once_for_all_frames(repeat):
    model, call = OverFrames(repeat).eval(), make_call()
    gm = run_to(capture_call(model, call), "repeats")
    kept = prologue_of(gm)(*call.values())
    assert [tuple(t.shape) for t in kept] == [(B, 1, L, 2, D // 2)] * 2
    assert torch.equal(run_graph(gm, call), model(**call))


REPEATED = """
    graph(%x, %t, %text, %k, %v):
        %folded = view(%x, [6, 4, 8])
        %times = repeat_interleave.self_int(%t, 3)
        %row = unsqueeze(%times, 1)
        %rows = unsqueeze(%row, 2)
        %h = add(%folded, %rows)
        %r = call_module[cross_0](%h, %k, %v)
        %c = getitem(%r, 0)
        %sum = add(%h, %c)
        %y = view(%sum, [2, 3, 4, 8])
        return (%y,)

    cross_0(%h, %k, %v):
        %w_q = get_attr[q.weight]
        %b_q = get_attr[q.bias]
        %q = linear(%h, %w_q, %b_q)
        %q_heads = view(%q, [6, 4, 2, 4])
        %q_turned = transpose.int(%q_heads, 1, 2)
        %k_repeated = expand(%k, [2, 3, 5, 2, 4])
        %k_copies = clone(%k_repeated, memory_format=torch.contiguous_format)
        %k_turned = permute(%k_copies, [0, 1, 3, 2, 4])
        %k_whole = view(%k_turned, [6, 2, 5, 4])
        %v_repeated = expand(%v, [2, 3, 5, 2, 4])
        %v_copies = clone(%v_repeated, memory_format=torch.contiguous_format)
        %v_turned = permute(%v_copies, [0, 1, 3, 2, 4])
        %v_whole = view(%v_turned, [6, 2, 5, 4])
        %o = scaled_dot_product_attention(%q_turned, %k_whole, %v_whole)
        %tokens = transpose.int(%o, 1, 2)
        %merged = view(%tokens, [6, 4, 8])
        %w = get_attr[out.weight]
        %b = get_attr[out.bias]
        %p = linear(%merged, %w, %b)
        return (%p,)
"""


def test_they_are_repeated_within_the_region_that_reads_them():
    model, call = OverFrames().eval(), make_call()
    gm = run_to(capture_call(model, call), "outline")
    assert_same_graph(gm, REPEATED)
    fast = pabc.compile(model, pabc.Schedule.pyramid(STEPS, cross=2), backend="eager")
    fast(**call)
    reusing = next(p for p in fast.phases if "cross_0" in user_inputs(p.graph)[-1].name)
    assert not any("expand" in str(n.target) for n in reusing.graph.nodes)


class Masked(OverFrames):
    """Two layers that share weights and a mask that is repeated over frames."""

    def forward(self, x_BTSD, t_B, text_BLD, mask_BL):
        x = x_BTSD.flatten(0, 1) + t_B.repeat_interleave(T)[:, None, None]
        e = by_interleaving(text_BLD)
        bias = ((1 - mask_BL) * -1e4).repeat_interleave(T, 0)[:, None, None]
        for _ in range(2):
            projected = (self.q(x), self.k(e), self.v(e))
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in projected)
            o = nn.functional.scaled_dot_product_attention(q, k, v, bias)
            x = x + self.out(o.transpose(1, 2).flatten(2))
        return x.unflatten(0, (B, T))


def test_what_several_regions_read_stays_whole():
    model, call = Masked().eval(), {**make_call(), "mask_BL": torch.ones(B, L)}
    gm = run_to(capture_call(model, call), "repeats")
    # both layers have the same weights here: keys, values and mask are read in two regions
    assert not any(n.target is keep_one for n in prologue_of(gm).graph.nodes)
    assert torch.equal(run_graph(gm, call), model(**call))


def test_copies_that_differ_in_some_bit_are_kept_whole(monkeypatch):
    model, call = OverFrames().eval(), make_call()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    fast(**call)
    monkeypatch.undo()
    (branch,) = fast._default._branches.values()
    assert [tuple(t.shape) for t in branch.hoisted.values] == [(B, T, L, 2, D // 2)] * 2
    assert torch.equal(fast(**call), model(**call))
    prologue = fast._captured("test")[0].prologue.graph
    first = first_copies(prologue, branch.hoisted.values)
    assert [tuple(t.shape) for t in first] == [(B, 1, L, 2, D // 2)] * 2


def test_compiled_code_takes_the_first_copy():
    model, call = OverFrames().eval(), make_call()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="inductor")
    for _ in range(2):
        torch.testing.assert_close(fast(**call), model(**call))
    (branch,) = fast._default._branches.values()
    assert [tuple(t.shape) for t in branch.hoisted.values] == [(B, 1, L, 2, D // 2)] * 2


def test_changed_texts_are_seen():
    model, call = OverFrames().eval(), make_call()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    fast(**call)
    call["text_BLD"].mul_(2)
    assert torch.equal(fast(**call), model(**call))


def test_they_can_be_saved():
    model, call = OverFrames().eval(), make_call()
    guarded, _ = pabc.pipeline.analyze(model, (), call, Options())
    content, constants = write_guarded(guarded)
    again = read_guarded(json.loads(json.dumps(content)), constants, model)
    kept = again.prologue.graph(*call.values())
    assert [tuple(t.shape) for t in kept] == [(B, 1, L, 2, D // 2)] * 2


def test_graphs_for_any_sizes_keep_the_whole():
    model, call = OverFrames().eval(), make_call()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager", dynamic=True)
    assert torch.equal(fast(**call), model(**call))


def copies_of(function, *inputs):
    """Which factors of the result's dimensions are copies, as find_copies tells."""
    call = dict(zip("xyz", inputs, strict=False))
    gm = passes.canonicalize_pass(capture_call(Function(function), call))
    found = find_copies(gm.graph)
    return found[next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0][0]]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y=None, z=None):
        given = [tensor for tensor in (x, y, z) if tensor is not None]
        return self.function(*given)


X = torch.randn(2, 1, 4)
Y = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda x: x.expand(2, 3, 4) * 2, (X,), [[2], ["3"], [4]]),
        (lambda x, y: x.expand(2, 3, 4) * y, (X, Y), [[2], [3], [4]]),
        (lambda x, y: x.expand(2, 3, 4) * y[:, :1], (X, Y), [[2], ["3"], [4]]),
        (lambda x: x.expand(2, 6, 4).reshape(2, 2, 3, 4).relu(), (X,), [[2], ["2"], ["3"], [4]]),
        (lambda x: x.expand(2, 3, 4).reshape(6, 4), (X,), [[2, "3"], [4]]),
        (lambda x: x.expand(2, 3, 4).reshape(3, 2, 4), (X,), [[3], [2], [4]]),
        (lambda x: x.expand(2, 3, 4).softmax(1), (X,), [[2], [3], [4]]),
        (lambda x: x.expand(2, 3, 4).softmax(2), (X,), [[2], ["3"], [4]]),
        (lambda x: x.expand(2, 3, 4).sum(2), (X,), [[2], ["3"]]),
        (lambda x: x.expand(2, 3, 4).cumsum(1), (X,), [[2], [3], [4]]),
        (lambda x: x.expand(2, 3, 4) @ x.mT, (X,), [[2], ["3"], []]),
        (lambda x, y: torch.cat([x.expand(2, 3, 4), y], -1), (X, Y), [[2], [3], [8]]),
        (lambda x: torch.cat([x, x], 1) + 1, (X,), [[2], ["2"], [4]]),
        (lambda x: x.expand(2, 3, 4)[:, :2] + 1, (X,), [[2], ["2"], [4]]),
        (
            lambda x, y: nn.functional.scaled_dot_product_attention(x.expand(2, 3, 4), y, y),
            (X, Y),
            [[2], ["3"], [4]],
        ),
        (
            lambda x, y: nn.functional.scaled_dot_product_attention(
                x.expand(2, 3, 4), y, y, is_causal=True
            ),
            (X, Y),
            [[2], [3], [4]],
        ),
        (
            lambda x, y: nn.functional.scaled_dot_product_attention(
                x.expand(2, 3, 4), x, x, y[..., :1]
            ),
            (X, Y),
            [[2], [3], [4]],
        ),
    ],
)
def test_copies_are_told_from_dataflow(function, inputs, expected):
    found = copies_of(function, *inputs)
    spelled = [[str(n) if is_copy else n for n, is_copy in product] for product in found]
    assert spelled == expected
    result = function(*inputs)  # and it is so
    sizes = [n for product in found for n, _ in product]
    places = [is_copy for product in found for _, is_copy in product]
    split = result.reshape(sizes)
    for dim, is_copy in enumerate(places):
        if is_copy:
            assert torch.equal(split, split.narrow(dim, 0, 1).expand_as(split))
