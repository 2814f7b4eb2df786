"""hoist: what is steady over a generation runs once, and again when it has changed."""

import pytest
import torch
from graphs import assert_same_graph
from phases import inline
from stages import facts_of, prologue_of, run_to, with_facts
from torch import nn

import pabc
from pabc import passes
from pabc.passes import Facts, ModelCall, PrologueGraph
from pabc.passes.ir import user_inputs

STEPS = tuple(range(6, 0, -1))


class Crossed(nn.Module):
    """One cross attention: keys and values depend on the text alone."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.text = nn.Linear(5, width)

    def forward(self, x, t, text):
        e = self.text(text)
        h = x + t[:, None, None]
        projected = (self.q(h), self.k(e), self.v(e))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in projected)
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.out(o.transpose(1, 2).flatten(2))


@pytest.fixture
def model():
    return Crossed().eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 6, 8), torch.tensor([0.1, 0.2]), torch.randn(2, 3, 5)


def hoisted(model, inputs):
    gm, captured = passes.capture(model, inputs, {})
    return run_to(
        with_facts(gm, Facts([captured, ModelCall(model=model, args=inputs, kwargs={})])), "hoist"
    )


PROLOGUE = """
    graph(%x, %t, %text):
        %w = get_attr[text.weight]
        %b = get_attr[text.bias]
        %e = linear(%text, %w, %b)
        %w_k = get_attr[k.weight]
        %b_k = get_attr[k.bias]
        %k = linear(%e, %w_k, %b_k)
        %k_heads = view(%k, [2, 3, 2, 4])
        %k_turned = transpose.int(%k_heads, 1, 2)
        %w_v = get_attr[v.weight]
        %b_v = get_attr[v.bias]
        %v = linear(%e, %w_v, %b_v)
        %v_heads = view(%v, [2, 3, 2, 4])
        %v_turned = transpose.int(%v_heads, 1, 2)
        return (%k_turned, %v_turned)
"""
HOISTED = """
    graph(%x, %t, %text, %k, %v):
        %row = unsqueeze(%t, 1)
        %rows = unsqueeze(%row, 2)
        %h = add(%x, %rows)
        %w_q = get_attr[q.weight]
        %b_q = get_attr[q.bias]
        %q = linear(%h, %w_q, %b_q)
        %q_heads = view(%q, [2, 6, 2, 4])
        %q_turned = transpose.int(%q_heads, 1, 2)
        %o = scaled_dot_product_attention(%q_turned, %k, %v)
        %tokens = transpose.int(%o, 1, 2)
        %merged = view(%tokens, [2, 6, 8])
        %w = get_attr[out.weight]
        %b = get_attr[out.bias]
        %p = linear(%merged, %w, %b)
        %y = add(%h, %p)
        return (%y,)
"""


def test_projections_of_the_text_move_to_the_prologue(model, inputs):
    gm = hoisted(model, inputs)
    prologue = prologue_of(gm)
    assert_same_graph(prologue, PROLOGUE)
    assert_same_graph(gm, HOISTED)
    assert [n.name for n in user_inputs(gm.graph)[3:]] == ["hoisted_0", "hoisted_1"]
    assert facts_of(gm)[PrologueGraph].steady == (2,)
    (output,) = gm(*inputs, *prologue(*inputs))
    assert torch.equal(output, model(*inputs))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.lin(x)


class Conditioned(nn.Module):
    """Everything that stays the same over a generation, each made with an op of its own."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross = Crossed(width)
        self.refine = nn.MultiheadAttention(width, 2, batch_first=True)
        self.text = nn.Linear(5, width)
        self.time = nn.Linear(4, width)

    def forward(self, x, t, text, mask):
        n, width = x.shape[1:]
        places = torch.arange(n, dtype=x.dtype)
        x = x + torch.sin(places[:, None] / 10.0 ** torch.arange(width))  # a position table
        angles = places[:, None] * torch.exp2(-torch.arange(width // 2))  # a rotary table
        turns = torch.polar(torch.ones_like(angles), angles)
        frequencies = torch.exp(-torch.linspace(0, 3, 4))
        x = x + self.time(t[:, None] * frequencies)[:, None]
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns).flatten(2)
            for y in (q, k)
        )
        window = (places[:, None] - places).abs() < 3  # a mask
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, window))
        e = self.text(text)
        q, k, v = nn.functional.linear(
            e, self.refine.in_proj_weight, self.refine.in_proj_bias
        ).chunk(3, -1)
        e = e + self.refine.out_proj(
            nn.functional.scaled_dot_product_attention(q, k, v, torch.logical_not(mask)[:, None])
        )
        q, k, v = self.cross.q(x), self.cross.k(e), self.cross.v(e)
        bias = (1 - mask.to(x.dtype))[:, None] * -1e4
        return x + self.cross.out(nn.functional.scaled_dot_product_attention(q, k, v, bias))


def make_conditions():
    torch.manual_seed(1)
    text, mask = torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 0]])
    return torch.randn(2, 6, 8), torch.tensor([0.1, 0.2]), text, mask


@pytest.fixture(scope="module")
def compiled():
    schedule = pabc.Schedule.pyramid(STEPS, cross=2, full=3)
    fast = pabc.compile(Conditioned().eval(), schedule, backend="eager")
    fast(*make_conditions())
    return fast


def ops(gm):
    return [str(n.target).split(".")[1] for n in gm.graph.nodes if "aten" in str(n.target)]


@pytest.mark.parametrize(
    ("thing", "op", "times"),
    [
        ("text projection, refiner, keys and values", "linear", 5),
        ("text refiner", "scaled_dot_product_attention", 1),
        ("position table", "sin", 1),
        ("rotary table", "polar", 1),
        ("frequencies of the timestep", "exp", 1),
        ("mask made of constants", "lt", 1),
        ("mask that is an input", "logical_not", 1),
        ("bias made of a mask", "rsub", 1),
    ],
)
def test_it_is_done_in_the_prologue_and_in_no_phase(thing, op, times, compiled):
    program, _ = compiled._captured("test")
    assert ops(program.prologue.graph).count(op) == times
    steps = 5 if op == "linear" else 2 if op.startswith("scaled") else 0  # of the latents
    counts = [ops(inline(phase)).count(op) for phase in compiled.phases]
    assert max(counts) == steps


def test_whatever_of_the_conditions_changes_is_seen():
    model, (x, t, text, mask) = Conditioned().eval(), make_conditions()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    assert torch.equal(fast(x, t, text, mask), model(x, t, text, mask))
    mask.fill_(1)
    assert torch.equal(fast(x, t, text, mask), model(x, t, text, mask))  # in place
    text, mask = text + 1, mask.clone()
    assert torch.equal(fast(x, t, text, mask), model(x, t, text, mask))  # others
    longer, mask = torch.cat([text, text], 1), torch.cat([mask, 1 - mask], 1)
    assert torch.equal(fast(x, t, longer, mask), model(x, t, longer, mask))  # of another shape


class Framewise(Crossed):
    """A time per frame, with two dimensions: nothing tells it from a text."""

    def forward(self, x, t, text):
        e = self.text(text)
        h = x + torch.sin(t)[:, :, None]
        o = nn.functional.scaled_dot_product_attention(self.q(h), self.k(e), self.v(e))
        return h + self.out(o)


def test_only_what_follows_from_what_changed_is_done_again(inputs):
    model, (x, _, text) = Framewise().eval(), inputs
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    values = []
    for step in range(3):
        t = torch.full((2, 6), 0.1 * step)
        assert torch.equal(fast(x, t, text), model(x, t, text))
        (branch,) = fast._default._branches.values()
        values.append(branch.hoisted.values)
    same = [[a is b for a, b in zip(values[0], later, strict=True)] for later in values[1:]]
    assert same == [[False, True, True]] * 2  # times; keys and values
    text.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))
    (branch,) = fast._default._branches.values()
    kept = [a is b for a, b in zip(values[-1], branch.hoisted.values, strict=True)]
    assert kept == [True, False, False]
    with torch.no_grad():
        model.k.weight.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))


def test_parts_of_the_prologue_follow_replaced_weights(inputs):
    model, (x, _, text) = Framewise().eval(), inputs
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    t = torch.zeros(2, 6)
    fast(x, t, text)
    text.mul_(2)
    fast(x, t, text)  # in part
    model.k.weight = nn.Parameter(model.k.weight * 2)
    text.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))
    text.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))


class Noisy(Plain):
    """Adds noise of the shape of a weight."""

    def forward(self, x):
        return super().forward(x) + torch.randn_like(self.lin.bias)


def test_random_numbers_are_drawn_at_every_step():
    model, x = Noisy().eval(), torch.randn(2, 3, 4)
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    first, second = fast(x), fast(x)
    assert not torch.equal(first, second)


def test_nothing_to_hoist():
    model, x = Plain().eval(), torch.randn(2, 3, 4)
    gm = hoisted(model, (x,))
    assert prologue_of(gm)(x) == ()
    assert [n.name for n in user_inputs(gm.graph)] == ["x"]
    assert torch.equal(gm(x)[0], model(x))


class Quantized(nn.Module):
    """A projection of the text whose weight is kept as bytes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.arange(64, dtype=torch.int8).view(8, 8))
        self.register_buffer("scale", torch.ones(8, 1))

    def forward(self, x, text):
        weight = self.values.to(x.dtype) * self.scale
        return nn.functional.linear(x, weight) + nn.functional.linear(text, weight).sum(1)[:, None]


def test_unpacked_weights_are_not_kept_for_a_generation():
    model, x, text = Quantized().eval(), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    gm = hoisted(model, (x, text))
    (kept,) = prologue_of(gm)(x, text)  # what is made of the text, and not the weight
    assert kept.shape == (2, 1, 8)
    assert torch.equal(gm(x, text, kept)[0], model(x, text))


SCHEDULE = pabc.Schedule.pyramid(STEPS, cross=2)


def count_prologues(fast, monkeypatch):
    program, _ = fast._captured("test")
    assert program.prologue.graph.code  # its forward is made with it
    calls, original = [], program.prologue.graph.forward
    monkeypatch.setattr(
        program.prologue.graph, "forward", lambda *args: calls.append(1) or original(*args)
    )
    return calls


def test_prologue_runs_once_a_generation(model, inputs, monkeypatch):
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=(inputs, {}))
    calls = count_prologues(fast, monkeypatch)
    for _ in range(2):
        for _ in STEPS:
            fast(*inputs)
    assert len(calls) == 2


def test_changed_text_or_weights_are_seen_at_once(model, inputs, monkeypatch):
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    x, t, text = inputs
    fast(x, t, text)
    calls = count_prologues(fast, monkeypatch)
    assert torch.equal(fast(x, t, text * 2), model(x, t, text * 2))  # another tensor
    text.mul_(3)
    assert torch.equal(fast(x, t, text), model(x, t, text))  # changed in place
    with torch.no_grad():
        model.k.weight.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))  # a weight
    assert len(calls) == 3
    fast(x, t, text)
    assert len(calls) == 3


def test_inference_tensors_are_never_trusted(model, inputs):
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    with torch.inference_mode():
        x, t, text = (tensor.clone() for tensor in inputs)
        fast(x, t, text)
        text.mul_(2)
        assert torch.equal(fast(x, t, text), model(x, t, text))
