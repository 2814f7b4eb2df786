"""What the benchmarks share: facts about a run, tables, files."""

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "bench" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_says_device_versions_and_commit(report):
    facts = report.describe_run("cpu", ["no-such-package"])
    assert facts["device"] == "cpu" and facts["cpu"] and facts["threads"] >= 1
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["versions"]["no-such-package"] is None
    assert facts["commit"] is None or facts["commit"].rstrip("+").isalnum()
    json.dumps(facts, allow_nan=False)


def test_medians_carry_their_spread(report):
    found = report.summarize([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert report.format_spread(found, 1) == "2.0 (1.0 to 3.0)"


def test_tables_are_aligned_and_say_where_there_is_nothing(report):
    assert report.format_table(["a", "s"], [["bb", 10], ["c", None]]) == "a    s\nbb  10\nc    -"
    assert report.format_markdown(["a"], [[None]]) == "| a |\n| --- |\n|  |"


def test_a_result_is_written_whole_or_not_at_all(report, tmp_path):
    path = tmp_path / "new" / "result.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_tables_of_documents_follow_the_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FILE.parent))
    import tables

    text = "a\n<!-- table: skips -->\nold\n<!-- end -->\nb"
    assert tables.fill(text, tmp_path) == text, "no result: as it was"
    row = {"model": "demo", "backend": "inductor", "share": 0.0101, "speedup": 1.96}
    seconds = {"full": {"median": 0.02}, "skipped": {"median": 0.0002}}
    content = {"date": "2026-11-29T19", "cpu": "X", "threads": 2}
    content["skips"] = [{**row, "seconds": seconds, "of_bound": 0.98}]
    (tmp_path / "efficiency.json").write_text(json.dumps(content))
    found = tables.fill(text, tmp_path)
    assert "old" not in found and found.startswith("a\n<!-- table: skips -->\n2026-11-29, X, 2 th")
    assert "| demo | inductor | 20.0 ms | 200 us | 1.01% | 1.96x | 0.980 |" in found
    assert tables.fill(found, tmp_path) == found


def test_the_headline_is_about_the_calibrated_variant_if_there_is_one(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    import tables

    row = {"calls": 25, "speedup_by_less_work": 1.9, "speedup_vs_torch_compile": 1.5, "psnr": 50.0}
    names = ("25 steps", "skip 2x", "pabc, no reuse")
    content = {"steps": 50, "cpus": 2, "matmul": {"pabc": "A", "torch": "B"}, "headline": "skip 2x"}
    content["variants"] = dict.fromkeys(names, row)
    found = tables.write_headline(content)
    assert "25 of 50 calls" in found and "at 50.0 dB" in found and "calibrate" not in found
    content["variants"]["calibrated 2x"] = {**row, "psnr": 70.0}
    found = " ".join(tables.write_headline(content).split())
    assert "at 70.0 dB" in found and "`Schedule.skip`'s own rule: 50.0 dB" in found


def test_documents_name_tables_that_there_are(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    import tables

    texts = [(tables.report.ROOT / name).read_text() for name in tables.DOCUMENTS]
    named = [name for text in texts for name in re.findall("<!-- table: (.*?) -->", text)]
    assert sorted(named) == sorted(tables.TABLES)
