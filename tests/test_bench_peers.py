"""The benchmark of whole sampling loops: tiny models, and full sizes without weights."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def workloads():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import workloads
    return workloads


def run(*options, check=True):
    command = [sys.executable, str(BENCH / "peers.py"), "--smoke", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_caches_of_one_schedule_run_the_same_attentions(tmp_path):
    out = tmp_path / "peers.json"
    variants = "diffusers PAB; pabc eager; FirstBlockCache; fewer steps; TaylorSeer, equal calls"
    printed = run("--out", str(out), "--models", "latte", "--variants", variants).stdout
    content = json.loads(out.read_text())
    assert (
        content["versions"]["torch"] == metadata.version("torch")
        and content["settings"]["steps"] == 7
    )
    model = content["models"]["latte"]
    rows = model["rows"]
    assert model["is_done"] and model["latents"] == [2, 4, 3, 12, 12]
    names = ["eager", "diffusers PAB", "pabc eager", "FirstBlockCache", "fewer steps"]
    assert list(rows) == [*names, "TaylorSeer, equal calls"]

    assert rows["eager"]["attentions"] == 7 * 6 and rows["eager"]["is_equal"]
    pab, fast = rows["diffusers PAB"], rows["pabc eager"]
    assert pab["attentions"] == fast["attentions"] == fast["planned_attentions"] < 7 * 6
    assert pab["psnr"] == pytest.approx(fast["psnr"], abs=0.5)
    assert len(fast["step_seconds"]) == 7 and fast["summary"]["median"] > 0
    assert not fast["fallbacks"] and fast["captures"] == 1

    assert "must match the size" in rows["FirstBlockCache"]["error"]  # its hooks expect one list
    assert "FirstBlockCache: does not run: RuntimeError" in printed
    assert "by phase of the plan" in printed and "attentions ran, planned" not in printed

    equal = [rows[name] for name in ("fewer steps", "TaylorSeer, equal calls")]
    assert [row["attentions"] for row in equal] == [3 * 6, 3 * 6]
    assert len(equal[0]["step_seconds"]) == 3 and "equally many computed calls" in printed

    again = run("--out", str(out), "--models", "latte", "--variants", "torchcompile", check=False)
    assert again.returncode == 2 and "found torchcompile" in again.stderr


def test_an_interrupted_run_goes_on_model_by_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import peers

    commit = peers.report.read_commit()
    models = {"demo": {"is_done": True}, "latte": {"is_done": False}}
    settings = {"models": ["demo", "latte"], "steps": 30}
    out = tmp_path / "peers.json"
    peers.report.write_json(out, {"commit": commit, "settings": settings, "models": models})
    assert list(peers.find_done(out, settings)) == ["demo"]
    assert not peers.find_done(out, {**settings, "steps": 20})
    models["latte"]["is_done"] = True
    peers.report.write_json(out, {"commit": commit, "settings": settings, "models": models})
    assert not peers.find_done(out, settings), "a finished run is measured anew"


@pytest.mark.parametrize(
    ("name", "millions"), [("latte", 1057), ("cogvideox", 1694), ("opensora", 1208)]
)
def test_full_sizes_are_the_published_ones(workloads, name, millions):
    workload = workloads.FULL[name]
    with torch.device("meta"):
        model = workload.build()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    blocks = [m for m in model.children() if isinstance(m, torch.nn.ModuleList)]
    for block in blocks:
        del block[1:]  # all alike: one says whether shapes fit
    model = model.to(torch.bfloat16).eval()
    start = workloads.draw(workload, 0, "meta", torch.bfloat16)
    latents = torch.cat([start.latents] * 2)
    with torch.no_grad():
        when = torch.zeros(2, dtype=torch.long, device="meta")
        output = model(**workload.call(latents, when, start.text))
    frames = (output[0] if isinstance(output, tuple) else output).shape
    assert frames[0] == 2 and frames[3:] == latents.shape[3:]


def test_sizes_and_settings_are_those_of_the_schedule(workloads):
    assert set(workloads.SMALL) == set(workloads.TINY)
    assert set(workloads.FULL) < set(workloads.SMALL)
    for workload in workloads.SMALL.values():
        start = workloads.draw(workload, 0)
        assert list(torch.cat([start.latents] * 2).shape) == workload.shapes["latents"]
        assert list(start.text.shape) == workload.shapes["text"]


@pytest.fixture(scope="module")
def skips():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import skips
    return skips


def make_case(skips, workloads, name, num_steps=7):
    workload = workloads.TINY[name]
    schedule = skips.pabc.Schedule.none(workloads.timesteps(workload, num_steps))
    start = workloads.draw(workload, 0)
    return skips.Case(workload, workloads.build(workload), start, schedule, computed=4)


@pytest.mark.parametrize("name", ["demo", "latte"])
def test_blocks_in_pairs_give_the_models_bits(skips, workloads, name):
    case = make_case(skips, workloads, name)
    full = skips.run_full(case)
    paired = skips.prepare_paired(case)
    assert len(paired.model.transformer_blocks) and not isinstance(
        paired.model.temporal_transformer_blocks, torch.nn.ModuleList
    )
    assert torch.equal(skips.run_full(paired), full)
    with skips.counting(paired.model) as calls:
        skips.run_full(paired)
    assert len(calls) == 7


def test_patterns_of_steps_are_those_that_taylorseer_computes(skips, workloads):
    case = make_case(skips, workloads, "latte")
    patterns = skips.find_patterns(7, 4)
    assert patterns and {type(each) for each in patterns} == {skips.Pattern}
    ready = skips.run_taylorseer(case)
    assert ready.note.startswith("4 of 7 calls computed")
    for pattern in patterns:
        assert sum(map(pattern.computes, range(7))) == 4 and pattern.computes(0)
    assert not skips.Pattern(3, 2, 7, 7).computes(3) and skips.Pattern(3, 2, 7, 7).computes(4)


def test_weights_of_taylors_sum_are_taylorseers(skips):
    """Steps 0, 1 and 3 computed: slopes 2 and 3, and their difference over 2 steps, at step 5."""
    rows = skips.weigh([0, 1, 3], 6)
    assert rows[:4] == [[1.0]] * 4
    values = {0: 4.0, 1: 6.0, 3: 12.0}
    expected = 12 + 3 * 2 + (3 - 2) / 2 * 2**2 / 2
    assert sum(w * values[i] for w, i in zip(rows[5], (3, 1, 0), strict=True)) == expected


@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
def test_forecasts_by_hand_are_those_of_pabc(skips, workloads, forecast):
    case = make_case(skips, workloads, "latte")
    schedule = skips.pabc.Schedule.skip(case.schedule.timesteps, 4, forecast=forecast)
    fast = skips.pabc.compile(case.model, schedule, backend="original")
    found = skips.run_full(skips.replace(case, model=fast))
    assert fast.stats.generations == 1
    assert skips.skip_in_loop(case, schedule, found) < 1e-12
    assert skips.skip_in_loop(case, schedule, skips.run_full(case)) > 1e-9


def test_recompiles_and_frames_that_are_given_up_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import workers

    counts = workers.Compiles()
    before = counts.counts()
    add = torch.compile(lambda x, text: x + len(text), backend="eager")
    limit = torch._dynamo.config.recompile_limit
    for length in range(limit + 2):
        add(torch.ones(2), "a" * length)
    found = {name: n - before[name] for name, n in counts.counts().items()}
    assert found["graphs"] == limit and found["limit_hits"] == 1 and found["breaks"] == 0
    torch._dynamo.reset()
    assert limit - 1 <= found["recompiles"] <= limit
