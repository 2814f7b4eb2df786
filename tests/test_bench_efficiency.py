"""The benchmark of what remains in a phase: its module written by hand, and its table."""

import functools
from pathlib import Path

import pytest
import torch

import pabc
from pabc.options import Options
from pabc.pipeline import PHASE

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def efficiency():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import efficiency
    return efficiency


def test_modules_by_hand_give_what_the_phases_give(efficiency, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(pabc, "compile", functools.partial(pabc.compile, backend="eager"))
    with torch.no_grad():
        model = efficiency.measure(efficiency.workloads.TINY["latte"], rounds=1)
    assert model["max_error"] < 1e-5
    steps = [row["steps"] for row in model["phases"]]
    assert sum(steps) == efficiency.NUM_STEPS and len(steps) == 5
    for row in model["phases"]:
        assert all(row[name]["median"] > 0 for name in ("pabc", "by_hand", "shipped"))
    printed = efficiency.format_model(model)
    assert "nothing" in printed and "as shipped" in printed


def test_plain_ops_are_those_of_the_model(efficiency):
    """The stages that it leaves out are those that write other ops where Inductor compiles."""
    options = Options(disable=efficiency.OTHER_OPS)
    left_out = {stage.name for stage in PHASE if not stage.is_on(options)}
    assert left_out == {"formulas", "onednn"}


@pytest.mark.parametrize("backend", ["eager", "original"])
def test_skipped_calls_are_told_from_computed_ones(efficiency, monkeypatch, backend):
    skipped = efficiency.skipped_calls
    monkeypatch.setattr(skipped, "BACKENDS", (backend,))
    (row,) = skipped.measure(efficiency.workloads.TINY["latte"], num_steps=6, rounds=3)
    assert (row["calls"], row["computed"]) == (6, 3)
    assert row["share"] > 0 and row["of_bound"] == pytest.approx(row["speedup"] / 2, abs=1e-3)
    assert {name: each["median"] > 0 for name, each in row["seconds"].items()} == {
        "full": True,
        "computed": True,
        "skipped": True,
    }
    assert backend in skipped.format_rows([row])


def test_missed_aims_are_marked(efficiency):
    skipped = efficiency.skipped_calls
    seconds = {name: {"median": 0.1} for name in ("full", "computed", "skipped")}
    row = {"model": "m", "backend": "b", "seconds": seconds, "share": 0.01, "speedup": 1.95}
    assert "!" not in skipped.format_rows([{**row, "of_bound": 0.975}])
    assert skipped.format_rows([{**row, "share": 0.03, "of_bound": 0.9}]).count("!") == 2
