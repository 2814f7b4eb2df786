"""Models that read Python values from tensor data, and modules that no trace can enter."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import (
    WIDTH,
    Branch,
    Cross,
    Image,
    Mlp,
    Point,
    make_mlp,
    merge_heads,
    run_by_hand,
    split_heads,
)
from torch import nn

import pabc
from pabc.passes import capture
from pabc.passes.tracing.untouched import _function_caches

NUM_STEPS = 4
FULL = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), full=2)


class Plain(Image):
    """No text."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        return super().forward(x_BCHW, t_B, text_BLD)


def make_calls(steps=NUM_STEPS, **others):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0.1, steps)
    return [{"x_BCHW": x * (1 + t), "t_B": t.expand(2), **others} for t in times]


def make(model_class, *blocks):
    torch.manual_seed(1)
    return model_class(*(blocks or (Branch(), Mlp(), Branch()))).eval()


def generate(compiled, calls):
    with torch.no_grad():
        return [compiled(**call) for call in calls]


MASKS = {("full", layer): [bool(step % 2) for step in range(NUM_STEPS)] for layer in range(2)}


class TextLengths(Image):
    """Cross attention of each sample to its own valid text tokens, packed without padding."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_BCHW, t_B, text_BLD, mask_BL):
        lengths = mask_BL.sum(dim=1).tolist()
        packed = text_BLD.masked_select(mask_BL.unsqueeze(-1)).view(-1, WIDTH)
        k, v = (split_heads(y) for y in self.to_kv(packed).chunk(2, dim=-1))
        x, emb = self.patch(x_BCHW).flatten(2).transpose(1, 2), self.time(t_B)
        for block in self.blocks:
            x = block(x, emb)
        q, start, parts = split_heads(self.to_q(x)), 0, []
        for i, length in enumerate(lengths):
            end = start + length
            parts.append((q[i] @ k[:, start:end].mT).softmax(-1) @ v[:, start:end])
            start = end
        x = x + merge_heads(torch.stack(parts))
        return self.head(x).view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(x_BCHW.shape)


def text_and_mask(*lengths):
    text = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"text_BLD": text, "mask_BL": torch.arange(5) < torch.tensor(lengths)[:, None]}


def test_text_lengths_by_tolist():
    model, calls = make(TextLengths, Branch(), Branch()), make_calls(**text_and_mask(3, 5))
    compiled = pabc.compile(model, FULL, backend="eager")
    results = generate(compiled, calls)
    for a, b in zip(results, run_by_hand(model, calls, MASKS, "attention"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    found = compiled.explain()
    assert [line.split(" in ")[0] for line in found.assumed] == [
        "item gives 3",
        "item gives 5",
        "masked_select takes (8,)",
    ]
    assert "test_reads.py" in found.assumed[0] and "assumed: item gives 3" in str(found)
    assert sorted(found.attention.values()) == ["cross", "cross", "full", "full"]


def test_other_values_are_another_capture_and_the_same_ones_none(monkeypatch):
    captures = []
    original = pabc.passes.capture
    monkeypatch.setattr(
        pabc.passes, "capture", lambda *a, **k: captures.append(1) or original(*a, **k)
    )
    model = make(TextLengths, Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none(range(NUM_STEPS, 0, -1)), backend="eager")
    for lengths, expected in (((3, 5), 1), ((2, 4), 2), ((3, 5), 2), ((2, 4), 2)):
        calls = make_calls(**text_and_mask(*lengths))
        for result, call in zip(generate(compiled, calls), calls, strict=True):
            with torch.no_grad():
                assert torch.equal(result, model(**call))
        assert len(captures) == expected


def test_a_mask_changed_in_place_within_a_generation():
    model, others = make(TextLengths, Mlp()), text_and_mask(3, 5)
    compiled = pabc.compile(model, pabc.Schedule.none([2, 1]), backend="eager")
    first, second = make_calls(2, **others)
    compiled(**first)
    others["mask_BL"][0, 2] = False
    with torch.no_grad():
        assert torch.equal(compiled(**second), model(**second))


@functools.lru_cache(maxsize=8)
def make_table(scale, width):
    return torch.linspace(0, scale, width)


class CachedTable(Plain):
    """A table in a function's cache, its key read from a tensor; a branch on a mask."""

    def forward(self, x_BCHW, t_B, height_B, valid_B):
        positions = torch.arange(4) % 3
        scale = float(height_B[0].item()) / (int(positions.max()) + 1)
        x = x_BCHW * valid_B.view(2, 1, 1, 1) if torch.any(~valid_B) else x_BCHW
        return super().forward(x + make_table(scale, 8), t_B)


def test_a_functions_cache_and_a_branch_on_a_mask():
    model = make(CachedTable)
    compiled = pabc.compile(model, FULL, backend="eager")
    for height, valid in ((6.0, True), (6.0, False), (9.0, False)):
        others = {"height_B": torch.full((2,), height), "valid_B": torch.tensor([True, valid])}
        calls = make_calls(**others)
        results = generate(compiled, calls)
        make_table.cache_clear()
        expected = run_by_hand(model, calls, MASKS, "attention")
        assert all(map(torch.equal, results, expected))
        assert type(make_table(height / 3, 8)) is torch.Tensor
    names = [line.split(" gives")[0] for line in compiled.explain().assumed]
    assert names == ["item", "__bool__"]  # positions are constant: nothing to assume of them


def test_to_find_functions_caches_disturbs_no_other_thread():
    """A tuple that is being built must not be referred to by anything else."""
    ended, errors = threading.Event(), []

    def build():
        try:
            while not ended.is_set():
                tuple(x for x in range(200))
        except SystemError as error:
            errors.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    for _ in range(5):
        assert make_table in _function_caches()
    ended.set()
    thread.join()
    assert not errors


def test_a_functions_cache_holds_no_fake_tensor_after_a_plain_capture():
    class Tabled(Plain):
        def forward(self, x_BCHW, t_B):
            return super().forward(x_BCHW + make_table(0.5, 8), t_B)

    make_table.cache_clear()
    model, call = make(Tabled), make_calls()[0]
    capture(model, (), call)
    with torch.no_grad():
        assert type(model(**call)) is torch.Tensor


class Routed(nn.Module):
    """Each token goes through one of the experts; how many go where is read on the host."""

    def __init__(self):
        super().__init__()
        self.router, self.norm = nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(make_mlp() for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        counts = chosen.bincount(minlength=2).cpu().numpy()
        out = torch.zeros_like(flat)
        for i, count in enumerate(counts):
            if count:
                (rows,) = (chosen == i).nonzero(as_tuple=True)
                out[rows] = self.experts[i](flat[rows])
        return out.view(x.shape)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe, self.end = nn.LayerNorm(WIDTH), Routed(), Point("mlp")
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, emb_BD, text=None):
        return x + self.gate(emb_BD)[:, None] * self.end(self.moe(self.norm(x)))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_routed_experts_run_as_they_are_and_are_reused(backend):
    model, calls = make(Plain, Branch(), Experts(), Branch()), make_calls()
    schedule = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), full=2, mlp=2)
    compiled = pabc.compile(model, schedule, backend=backend)
    results = generate(compiled, calls)
    masks = {**MASKS, ("mlp", 0): MASKS["full", 0]}
    for a, b in zip(results, run_by_hand(model, calls, masks, "attention"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    found = compiled.explain()
    assert [r.kind for r in found.regions] == ["full", "mlp", "full"]
    (line,) = found.outside
    assert line.startswith("blocks.1.moe runs as it is: ")


def test_weights_of_a_module_that_runs_as_it_is_are_the_models():
    model, (call, *_) = make(Plain, Branch(), Experts()), make_calls()
    compiled = pabc.compile(model, pabc.Schedule.none([1]), backend="eager")
    compiled(**call)
    with torch.no_grad():
        model.blocks[1].moe.experts[0][0].weight.mul_(2)
        assert torch.equal(compiled(**call), model(**call))


class ThroughNumpy(Branch):
    """Attention in a library that PyTorch cannot trace."""

    class Inner(nn.Module):
        def forward(self, q, k, v):
            scores = np.einsum("bhid,bhjd->bhij", q.numpy(), k.numpy())
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            return torch.from_numpy(np.einsum("bhij,bhjd->bhid", weights, v.numpy()))

    def __init__(self):
        super().__init__()
        self.attn.attend = self.Inner()


def test_what_cannot_be_traced_runs_as_it_is_and_the_rest_is_reused():
    model, calls = make(Plain, Branch(), ThroughNumpy(), Mlp()), make_calls()
    compiled = pabc.compile(model, FULL, backend="eager")
    results = generate(compiled, calls)
    masks = {("full", 0): MASKS["full", 0]}
    expected = run_by_hand(model, calls, masks, "attention")
    assert all(map(torch.equal, results, expected))
    (line,) = compiled.explain().outside
    assert line.startswith("blocks.1.attn.attend runs as it is: numpy gives an array of shape")


class OnTheHour(Plain):
    """A branch on the timestep, outside of all blocks."""

    def forward(self, x_BCHW, t_B):
        scale = 2.0 if t_B[0].item() > 0.5 else 1.0
        return super().forward(x_BCHW * scale, t_B)


class Scaled(Plain):
    """A number read from the timestep is a factor, and decides a branch."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        x = x_BCHW * (1 - t / 2)
        return super().forward(x if 2 * t > 0.7 else x + t, t_B)


class ByTheNumber(Plain):
    """The number itself is asked for, in a way that only a number can be."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(x_BCHW * torch.full((1,), round(t, 1)), t_B)


class InTensors(Plain):
    """A number read becomes a tensor again, one that PyTorch makes from Python's numbers."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        scale = torch.full((1,), t) if isinstance(t, float) else 1.0
        return super().forward(x_BCHW * scale + torch.tensor([2 * t, 1.0]).sum(), t_B)


class BehindItsBack(Plain):
    """C code takes the number's value."""

    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(x_BCHW * math.cos(2 * t) + float(f"{t:.3f}"), t_B)


class InOtherFunctions(Plain):
    def forward(self, x_BCHW, t_B, text_BLD=None):
        t = t_B[0].item()
        return super().forward(F.leaky_relu(x_BCHW, t).clamp(min=-t), t_B)


@pytest.mark.parametrize(
    ("model_class", "captures"),
    [
        (OnTheHour, 2),
        (Scaled, 2),
        (InTensors, 1),
        (ByTheNumber, NUM_STEPS),
        (BehindItsBack, NUM_STEPS),
        (InOtherFunctions, NUM_STEPS),
    ],
)
@pytest.mark.filterwarnings("ignore:pabc captured the model anew")
def test_numbers_read_from_the_timestep(model_class, captures, monkeypatch):
    """One capture a side of a branch, not one a value."""
    count = []
    original = pabc.passes.capture
    monkeypatch.setattr(
        pabc.passes, "capture", lambda *a, **k: count.append(1) or original(*a, **k)
    )
    model, calls = make(model_class, Mlp()), make_calls()
    schedule = pabc.Schedule.none(range(NUM_STEPS, 0, -1))
    compiled = pabc.compile(model, schedule, backend="eager")
    for result, call in zip(generate(compiled, calls), calls, strict=True):
        with torch.no_grad():
            assert torch.equal(result, model(**call))
    assert len(count) == captures


def test_a_number_of_the_graph_in_a_compiled_phase():
    model, calls = make(Scaled), make_calls()
    compiled = pabc.compile(model, FULL)
    for a, b in zip(
        generate(compiled, calls), run_by_hand(model, calls, {}, "attention"), strict=True
    ):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0)
    assert [line.split(" in ")[0] for line in compiled.explain().assumed] == [
        "item compares as (False,)"
    ]


def test_a_value_that_changes_at_every_call_is_warned_of():
    class Counts(Plain):
        def forward(self, x_BCHW, t_B):
            return super().forward(x_BCHW * float(t_B[0]), t_B)

    model, calls = make(Counts), make_calls(3)
    compiled = pabc.compile(model, pabc.Schedule.none([3, 2, 1]), backend="eager")
    generate(compiled, calls[:2])
    message = (
        r"reads a value from data that changed: __float__ gives 0\.55.* in the model .*0\.1.* now"
    )
    with pytest.warns(UserWarning, match=message):
        generate(compiled, calls[2:])


def test_values_cannot_be_read_where_there_are_none():
    model = make(TextLengths, Mlp()).to("meta")
    (call, *_) = make_calls(**text_and_mask(3, 5))
    on_meta = {name: value.to("meta") for name, value in call.items()}
    with pytest.raises(ValueError, match="running the model to see which values it reads"):
        pabc.explain(model, **on_meta)


class Failing(Branch):
    """Cannot be traced as a whole: a block that is no residual branch of its own."""

    def forward(self, x, emb_BD, text=None):
        return torch.from_numpy(super().forward(x, emb_BD).numpy() * 1)


def test_a_block_that_cannot_be_traced_hides_the_axes_of_what_follows():
    model, (call, *_) = make(Plain, Failing(), Branch()), make_calls()
    message = r"name the denoised input with latents= \(.*runs outside of the graph\)"
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **call)
    message = r"runs outside of the graph; state it with kinds=\{'blocks.1.attn': "
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **call, latents="x_bchw")
    found = pabc.explain(model, **call, latents="x_bchw", kinds={"blocks.1.attn": "full"})
    assert [r.path for r in found.regions] == ["blocks.1.attn"]
    (line,) = found.outside
    assert line.startswith("blocks.0 runs as it is") and "1 attentions in it" in line


def test_cross_attention_to_a_condition_is_still_hoisted():
    class Scaled(Image):
        def forward(self, x_BCHW, t_B, text_BLD):
            text = text_BLD * 2 if text_BLD.abs().max() > 1 else text_BLD
            return super().forward(x_BCHW, t_B, text)

    model = make(Scaled, Branch(), Cross(), Mlp())
    calls = make_calls(text_BLD=torch.randn(2, 5, WIDTH))
    compiled = pabc.compile(model, FULL, backend="eager")
    results = generate(compiled, calls)
    expected = run_by_hand(model, calls, MASKS, "attention")
    assert all(map(torch.equal, results, expected))
    assert compiled.explain().flops["prologue"] > 0


class PaddedTo(Plain):
    """Writes and reads slices whose bounds are tensors, and looks a row up by one."""

    def forward(self, x_BCHW, t_B, text_BLD, mask_BL):
        lengths = mask_BL.sum(dim=1, dtype=torch.int)
        valid = torch.zeros(2, 5)
        for i in range(2):
            valid[i, : lengths[i]] = 1
        row = text_BLD[0, lengths[0] - 1] + text_BLD[1][: lengths[1]].sum(0)
        x = x_BCHW * valid.mean(dim=1).view(2, 1, 1, 1) + row.mean()
        return super().forward(x, t_B)


def test_slices_bounded_by_tensors():
    model = make(PaddedTo, Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([2, 1]), backend="eager")
    for lengths in ((3, 5), (1, 2)):
        for call in make_calls(2, **text_and_mask(*lengths)):
            with torch.no_grad():
                assert torch.equal(compiled(**call), model(**call))


def test_a_write_into_a_part_whose_size_follows_from_data():
    class Fills(Plain):
        def forward(self, x_BCHW, t_B, n_1):
            table = torch.zeros(8)
            table.narrow(0, 0, n_1).fill_(2.0)
            return super().forward(x_BCHW + table, t_B)

    model = make(Fills, Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([1]), backend="eager")
    for n in (3, 5, 3):
        (call,) = make_calls(1, n_1=torch.tensor(n))
        with torch.no_grad():
            assert torch.equal(compiled(**call), model(**call))


@dataclasses.dataclass
class Mixed:
    tokens: torch.Tensor
    counts: list
    label: str = "mixed"


class GivesDataclass(Routed):
    """An untraceable module with a dataclass among its arguments and for its result."""

    def forward(self, mixed):
        y = super().forward(mixed.tokens)
        return Mixed(y.transpose(0, 1).contiguous().transpose(0, 1), [y.sum()], mixed.label)


class ThroughDataclass(Experts):
    def __init__(self):
        super().__init__()
        self.moe = GivesDataclass()

    def forward(self, x, emb_BD, text=None):
        mixed = self.moe(Mixed(self.norm(x), []))
        return x + self.end(mixed.tokens * 2 + mixed.counts[0] * len(mixed.label))


def test_dataclasses_into_and_out_of_a_module_that_runs_as_it_is():
    model, calls = make(Plain, Branch(), ThroughDataclass()), make_calls()
    compiled = pabc.compile(model, FULL, backend="eager")
    masks = {("full", 0): MASKS["full", 0]}
    expected = run_by_hand(model, calls, masks, "attention")
    assert all(map(torch.equal, generate(compiled, calls), expected))


def test_a_module_that_cannot_be_traced_and_writes_to_its_arguments_is_refused():
    class Writes(Routed):
        def forward(self, x):
            return super().forward(x.mul_(2))

    block = Experts()
    block.moe = Writes()
    model, (call, *_) = make(Plain, block), make_calls()
    with pytest.raises(ValueError, match=r"blocks\.0\.moe cannot be .* writes to its argum"):
        pabc.explain(model, **call)


class ByMask(Plain):
    """Latents picked by a mask of two dimensions: the size of what is picked follows from it."""

    def forward(self, x_BCHW, t_B, mask_BL):
        picked = x_BCHW.flatten(1)[:, :5][mask_BL]
        return super().forward(x_BCHW + picked.sum() + mask_BL.nonzero().sum(), t_B)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_a_mask_picks_from_the_latents(backend):
    model, mask = make(ByMask, Mlp()), text_and_mask(3, 5)["mask_BL"]
    compiled = pabc.compile(model, pabc.Schedule.none([2, 1]), backend=backend)
    for call in make_calls(2, mask_BL=mask):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**call), model(**call), atol=1e-5, rtol=0)


def test_a_mask_that_leaves_nothing_out():
    """As where valid tokens are moved to the front: what is picked may be empty."""

    class ValidFirst(Plain):
        def forward(self, x_BCHW, t_B, text_BLD, mask_BL):
            pairs = zip(text_BLD, mask_BL, strict=True)
            rows = [torch.cat([text[m], torch.zeros_like(text[~m])]) for text, m in pairs]
            weights = torch.linspace(0, 1, 5).view(1, 5, 1)
            return super().forward(x_BCHW + (torch.stack(rows) * weights).mean(), t_B)

    model = make(ValidFirst, Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([1]), backend="eager")
    for lengths in ((5, 5), (3, 5)):
        (call,) = make_calls(1, **text_and_mask(*lengths))
        with torch.no_grad():
            assert torch.equal(compiled(**call), model(**call))
