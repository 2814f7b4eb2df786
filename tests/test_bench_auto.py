"""The benchmark of plans that make themselves: two processes, and what a recording costs."""

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def auto():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import auto
    return auto


def test_the_second_process_records_nothing(auto):
    first, second = auto.measure_processes(smoke=True, backend="original")
    assert [row["recorded"] for row in first["generations"]] == [1, 0, 0]
    assert [row["recorded"] for row in second["generations"]] == [0, 0, 0]
    assert first["generations"][0]["computed"] == 16
    assert all(row["computed"] < 16 for row in second["generations"])
    assert "$PABC_CACHE" in second["plan_source"]
    printed = auto.format_processes([first, second])
    assert "2, generation 3" in printed and "exact" in printed


def test_what_a_recording_costs(auto):
    rows = [auto.measure_recording(size, smoke=True) for size in auto.find_sizes()]
    latte = rows[0]
    elements = 2 * 4 * 2 * 2 * 2
    assert latte["bytes"] == 4 * 2 * (elements + 2 * elements), "inputs, and twice the channels"
    assert all(row["product_seconds"] > 0 for row in rows)
    assert latte["share"] < 1e-3 and rows[1]["share"] is None
    assert "Latte-1" in auto.format_recordings(rows)
