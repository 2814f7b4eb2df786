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
