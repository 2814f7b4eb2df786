"""The model of scaling: its arithmetic, and its script on what is explained, not measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import scaling_model
    return scaling_model


def run(script, *options):
    command = [sys.executable, str(BENCH / script), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_one_rank_takes_its_own_seconds(model):
    alone = model.Cost([2, 3], [100.0, 50.0], [0, 0], [0, 0])
    none = model.Link(0.0, float("inf"))
    assert model.predict([0.5, 0.2], alone, alone, none) == pytest.approx(2 * 0.5 + 3 * 0.2)


def test_ranks_divide_what_they_compute_and_add_what_they_send(model):
    """A quarter of the FLOPs in half of the steps; 4 collectives of 10 bytes in each of them."""
    alone = model.Cost([1, 1], [100.0, 50.0], [0, 0], [0, 0])
    cost = model.Cost([1, 1], [25.0, 50.0], [4, 0], [40, 0])
    link = model.Link(latency=0.25, bandwidth=20.0, agreement=0.5)
    expected = (1.0 / 4 + 4 * 0.25 + 40 / 20 + 0.5) + (0.6 + 0.5)
    assert model.predict([1.0, 0.6], alone, cost, link) == pytest.approx(expected)
    crowded = model.predict([1.0, 0.6], alone, cost, link, crowding=2.0)
    assert crowded == pytest.approx(expected + 0.25 + 0.6)


def test_a_line_through_exchanges_is_a_link(model):
    times = {size: 1e-3 + size / 1e9 for size in (8, 4096, 10**6, 10**8)}
    link = model.fit_link(times, 2e-4)
    assert link.latency == pytest.approx(1e-3)
    assert link.bandwidth == pytest.approx(1e9)
    assert link.agreement == 2e-4


def test_predictions_follow_from_what_is_explained(tmp_path):
    """With free links, more ranks never take longer, and two no less than half as long as one."""
    out = tmp_path / "parallel.json"
    free = ["--latency", "0", "--bandwidth", "1e30", "--agreement", "0"]
    printed = run("parallel.py", "--smoke", "--ranks", "1,2,4", "--out", str(out), *free)
    assert "predicted seconds of a generation, latte (tiny)" in printed
    found = json.loads(out.read_text())["predictions"]
    assert found["2/4/6"]["1"] < found["no reuse"]["1"]
    for seconds in found.values():
        assert seconds["1"] / 2 <= seconds["2"] < seconds["1"]
        assert seconds["1"] / 4 <= seconds["4"] <= seconds["2"]


def test_bytes_are_predicted_and_the_table_says_so(tmp_path):
    out = tmp_path / "communication.json"
    options = ["--smoke", "--models", "latte", "--ranks", "", "--predict", "2", "--steps", "6"]
    printed = run("communication.py", *options, "--out", str(out))
    assert "predicted, published size" in printed
    (row,) = json.loads(out.read_text())["rows"].values()
    assert 0 < row["2/4/6"]["bytes"] < row["no reuse"]["bytes"]
    assert row["no reuse"]["bytes"] == 6 * sum(row["kinds"].values())


@pytest.mark.parametrize("script", ["communication.py", "parallel.py"])
def test_help_says_how_it_is_measured(script):
    assert "explain(ranks=...)" in run(script, "--help")
