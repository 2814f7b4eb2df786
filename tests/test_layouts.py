"""Models whose tokens are laid out in other ways: kinds, regions, and reuse against hooks."""

from collections import Counter
from functools import cache

import pytest
import torch
from layouts import LAYOUTS, Layout
from models import run_by_hand
from reuse import STEPS, make_masks, make_schedule
from stages import capture_call, copy_graph, facts_of

import pabc
from pabc import passes


@cache
def build(layout: Layout):
    model = layout.model()
    return model, capture_call(model, layout.call())


@pytest.fixture
def captured_once(monkeypatch):
    """A layout's model, which pabc finds captured already."""

    def get(layout: Layout):
        model, gm = build(layout)
        known = facts_of(gm)[passes.Captured]
        monkeypatch.setattr(passes, "capture", lambda *_, **__: (copy_graph(gm), known))
        return model

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kinds_and_regions(layout: Layout, captured_once):
    found = pabc.explain(captured_once(layout), **layout.call())
    assert sorted(found.attention.values()) == sorted(layout.kinds)
    assert not found.outside
    regions = Counter(region.kind for region in found.regions)
    expected = Counter(kind for kind in layout.kinds if kind != "other")
    assert regions == expected + Counter(mlp=layout.num_mlps)


@pytest.mark.parametrize("cut", ["attention", "branch"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reuse_equals_hooks_by_hand(layout: Layout, cut, captured_once):
    """Every region with a mask of its own, bit for bit; the same where nothing is reused."""
    model = captured_once(layout)
    calls = [layout.call(step) for step in range(STEPS)]
    for masks in ({}, make_masks(model, seed=cut)):
        expected = run_by_hand(model, calls, masks, cut)
        compiled = pabc.compile(model, make_schedule(masks), backend="eager", cut=cut)
        assert all(torch.equal(compiled(**c), e) for c, e in zip(calls, expected, strict=True))
