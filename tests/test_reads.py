"""Models that read Python values from tensor data."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch
from models import WIDTH, Branch, Cross, Image, Mlp, run_by_hand
from reading import (
    FULL,
    MASKS,
    NUM_STEPS,
    Plain,
    TextLengths,
    generate,
    make,
    make_calls,
    text_and_mask,
)

import pabc
from pabc.passes import capture
from pabc.passes.tracing.untouched import _function_caches


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
    assert "reading.py" in found.assumed[0] and "assumed: item gives 3" in str(found)
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


def test_not_a_number_equals_itself():
    class Shifted(Plain):
        def forward(self, x_BCHW, t_B, shift_1):
            return super().forward(x_BCHW.nan_to_num(float(shift_1)), t_B)

    model = make(Shifted, Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([2, 1]), backend="eager")
    for call in make_calls(2):
        compiled(**call, shift_1=torch.tensor([math.nan]))
    assert compiled.stats.captures == 1


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


def test_lengths_are_read_where_sizes_were_to_stay_open():
    """As `dynamic=True` falls back to; no mark of the first trace is left on the user's tensors."""
    model = make(TextLengths, Branch())
    compiled = pabc.compile(model, pabc.Schedule.none([1]), backend="eager", dynamic=True)
    for lengths in ((3, 5), (2, 4)):
        (call,) = make_calls(1, **text_and_mask(*lengths))
        with pytest.warns(UserWarning, match="shapes of this call alone"), torch.no_grad():
            assert torch.equal(compiled(**call), model(**call))
        marked = [name for x in call.values() for name in vars(x) if name.startswith("_dynamo")]
        assert not marked
