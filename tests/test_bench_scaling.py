"""The benchmark of slopes: tiny shapes, and the line through logarithms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import scaling
    return scaling


def run(*options):
    command = [sys.executable, str(BENCH / "scaling.py"), "--smoke", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_factor_has_its_slopes(tmp_path, scaling):
    out = tmp_path / "scaling.json"
    printed = run("--out", str(out))
    content = json.loads(out.read_text())
    assert list(content["rows"]) == ["tokens", "layers", "steps", "batch"]
    for row in content["rows"].values():
        for point in row["points"]:
            assert point["bytes"] == point["planned"] > 0
            assert point["step"]["median"] > 0 and point["plan"]["median"] > 0
    slopes = {(s["factor"], s["what"]): s["slope"] for s in content["slopes"]}
    expected = {"tokens": 1, "layers": 1, "steps": 0, "batch": 1}
    assert {name: slopes[name, "bytes"] for name in expected} == expected
    assert set(slopes) == {(f, w) for f, each in scaling.EXPECTED.items() for w in each}
    assert "steps: plan" in printed and "batch: bytes" in printed

    content["rows"]["tokens"]["points"][0]["step"]["median"] = 12.345
    out.write_text(json.dumps(content))
    assert "12345.00" in run("--out", str(out), "--resume")


def test_a_slope_is_the_power(scaling):
    assert scaling.fit([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert scaling.fit([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
