"""The benchmark of frontiers: references by brute force, points, counts and tables."""

import importlib
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
BENCH = Path(__file__).parents[1] / "bench"
MODULES = (
    "ablation_regions",
    "ablations",
    "pairs",
    "pareto",
    "pareto_grids",
    "pareto_methods",
    "pareto_plans",
    "pareto_plot",
    "pareto_points",
    "pareto_quality",
    "pareto_samplers",
    "pareto_setups",
    "pareto_table",
    "references.dpcache",
    "references.lemica",
    "references.teacache",
)
NUM_CALLS = 6


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        found = {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}
        yield Namespace(**found)


@pytest.fixture(scope="module", params=["digits", "emoji"])
def subject(request, bench, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    load = bench.pareto_setups.load_subject
    return load(request.param, (1, 2), 1, store, fine_calls=8, is_trained=False)


@pytest.fixture(scope="module")
def setup(bench, subject):
    name = bench.pareto_samplers.name_samplers(subject.model.scheduler)[0]
    return bench.pareto_setups.Setup(subject.model.name, name, NUM_CALLS)


def list_paths(num_calls, computed, first=(0,)):
    """All choices of so many steps that begin with `first` and end with the last one."""
    between = range(first[-1] + 1, num_calls - 1)
    for middle in itertools.combinations(between, computed - len(first) - 1):
        yield (*first, *middle, num_calls - 1)


@pytest.mark.parametrize("computed", [2, 3, 5, 7])
def test_lemicas_path_has_the_smallest_sorted_weights(bench, computed):
    rng = np.random.default_rng(computed)
    weights = {(i, j): float(rng.integers(0, 4)) for i in range(8) for j in range(i + 1, 8)}
    path = bench.lemica.find_path(weights, 8, computed)

    def cost(steps):
        return sorted((weights[edge] for edge in itertools.pairwise(steps)), reverse=True)

    assert len(path) == computed and path[0] == 0 and path[-1] == 7
    assert cost(path) == min(map(cost, list_paths(8, computed)))
    short = {edge: w for edge, w in weights.items() if edge[1] - edge[0] < 2}
    with pytest.raises(ValueError, match="expected a number of calls"):
        bench.lemica.find_path(short, 8, 3)


def test_lemicas_weights_are_errors_of_runs_that_hold_one_segment(bench, subject, setup):
    loop = subject.loop(setup, subject.seen)
    recorded = subject.recorded(setup)
    model = subject.model.transformer
    weights = bench.lemica.measure_segments(loop, model, recorded.outputs, recorded.samples, 3)
    assert set(weights) == {(i, j) for i in range(5) for j in range(i + 1, min(i + 3, 5) + 1)}
    for i, j in ((0, 2), (1, 4), (3, 5)):
        steps = [step for step in range(NUM_CALLS) if not i < step < j]
        schedule = bench.pareto_plans.pabc.Schedule.skip(
            loop.sampler.timesteps, steps, forecast="hold"
        )
        choice = bench.pareto_plans.run_schedule(schedule, "")
        samples, _ = bench.pareto_methods.run_choice(loop, choice)
        error = float((samples - recorded.samples).abs().mean())
        assert weights[i, j] == pytest.approx(error, rel=1e-3) and error > 0
    assert weights[2, 3] == 0


@pytest.mark.parametrize("computed", [3, 4, 6])
def test_dpcaches_path_is_the_cheapest(bench, computed):
    costs = np.random.default_rng(computed).random((8, 8, 8))
    path = bench.dpcache.find_path(costs, computed)

    def cost(steps):
        return sum(costs[triple] for triple in zip(steps, steps[1:], steps[2:], strict=False))

    assert len(path) == computed and path[:2] == (0, 1) and path[-1] == 7
    assert cost(path) == pytest.approx(min(map(cost, list_paths(8, computed, (0, 1)))))


def test_dpcaches_costs_are_errors_of_lines(bench):
    line = [torch.full((4,), 1.0 + step) for step in range(5)]
    costs = bench.dpcache.measure_costs(line, 3)
    assert costs[0, 1, 4] == pytest.approx(0, abs=1e-6) and np.isinf(costs[0, 4, 4])
    square = [torch.full((4,), 1.0 + step**2) for step in range(5)]
    # From steps 0 and 1, the line is 1 + step: it misses 5 by 2, and 10 by 6.
    assert bench.dpcache.measure_costs(square, 4)[0, 1, 4] == pytest.approx(2 / 5 + 6 / 10)


def test_teacache_computes_when_the_sum_reaches_the_threshold(bench, subject, setup):
    loop, model = subject.loop(setup, subject.seen), subject.model.transformer
    with bench.teacache.Inputs(model) as inputs:
        recorded = loop.record()
    assert len(inputs) == NUM_CALLS
    one = np.array([0.0, 1.0])  # each step counts 1 whatever its change
    for threshold, computed in ((0.5, range(6)), (1.5, [0, 2, 4, 5]), (99.0, [0, 5])):
        cache = bench.teacache.TeaCache(model, one, threshold, NUM_CALLS)
        samples = loop.run(cache)
        assert cache.computed == list(computed)
        assert torch.equal(samples, recorded.samples) == (len(cache.computed) == NUM_CALLS)
    coefficients = bench.teacache.fit(inputs, recorded.outputs)
    changes = [bench.teacache.change(b, a) for a, b in itertools.pairwise(inputs)]
    wanted = [bench.teacache.change(b, a) for a, b in itertools.pairwise(recorded.outputs)]
    assert np.polyval(coefficients, changes) == pytest.approx(wanted, rel=1e-2, abs=1e-4)


def test_samplers_make_as_many_calls_as_asked_for(bench, subject, setup):
    base = subject.model.scheduler
    samplers = bench.pareto_samplers
    for name in (*samplers.name_samplers(base), samplers.name_fine(base, "UniPC")):
        sampler = samplers.make_sampler(base, name, 9)
        other = bench.pareto_setups.Setup(subject.model.name, name, 9)
        assert len(sampler.timesteps) == 9
        assert len(subject.recorded(other).outputs) == 9
        assert subject.recorded(other).samples.isfinite().all()
    assert samplers.make_sampler(base, samplers.name_samplers(base)[0], 8).num_steps == 8


def test_settings_are_chosen_on_prompts_and_noise_that_are_not_judged(bench, subject):
    others = [subject.seen, subject.draw_seen(1), subject.draw_seen(2)]
    assert len(set(subject.judged.prompts)) == 2
    for clips in others:
        assert not set(clips.prompts) & set(subject.judged.prompts)
        for noise in subject.judged.noise:
            assert not any(torch.equal(noise, each) for each in clips.noise)
    assert not torch.equal(others[1].noise, others[2].noise)


def test_the_share_of_operations_is_that_of_computed_calls(bench, subject, setup):
    loop = subject.loop(setup, subject.judged)
    model = subject.model.transformer
    full = bench.pareto_methods.Choice("", lambda _: bench.pareto_plans.Ready(model))
    samples, share = bench.pareto_methods.run_choice(loop, full)
    assert share == 1 and torch.equal(samples, subject.full(setup))
    skip = bench.pareto_plans.choose_skip(subject, setup, 3)
    _, stated = bench.pareto_methods.run_choice(loop, skip)
    counted = bench.pareto_methods.Choice("", skip.prepare)
    _, share = bench.pareto_methods.run_choice(loop, counted)
    assert share == stated == 0.5


def test_operations_are_multiplications(bench):
    linear, x = torch.nn.Linear(8, 5), torch.randn(2, 3, 8)
    with bench.pareto_setups.Operations() as counted:
        linear(x)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert counted.total == 2 * 3 * 8 * 5 + 2 * 2 * 3 * 3 * 8


def test_blocks_that_return_their_text_give_the_models_bits(bench, subject, setup):
    if subject.model.name == "digits":
        pytest.skip("the blocks of Latte are without text")
    loop = subject.loop(setup, subject.judged)
    model = bench.pareto_setups.copy.deepcopy(subject.model.transformer)
    whole = bench.pairs.complete_blocks(model)
    assert isinstance(whole.transformer_blocks[-1], bench.pairs.Last)
    assert torch.equal(loop.run(whole), subject.full(setup))


def test_the_best_setting_is_that_of_the_seen_clips_which_costs_no_more(bench, subject, setup):
    plans, methods = bench.pareto_plans, bench.pareto_methods
    timesteps = subject.loop(setup, subject.seen).sampler.timesteps

    def make(subject, setup, computed):
        steps = {"all": range(6), "early": (0, 1, 2), "even": (0, 2, 5), "few": (0, 5)}
        return [
            plans.run_schedule(plans.pabc.Schedule.skip(timesteps, each, forecast="hold"), name)
            for name, each in steps.items()
        ]

    chosen = methods.choose_best("test", make)(subject, setup, 3)
    loop, reference = subject.loop(setup, subject.seen), subject.recorded(setup).samples
    found = {
        choice.setting: bench.pareto_quality.mean_psnr(
            methods.run_choice(loop, choice)[0], reference
        )
        for choice in make(subject, setup, 3)
    }
    del found["all"]
    assert found[chosen.setting] == max(found.values())
    with pytest.raises(methods.NotReached, match="test: no setting"):
        methods.choose_best("test", make)(subject, setup, 1)


@pytest.mark.parametrize("part", ["fidelity", "grids", "guidance"])
def test_points_have_names_of_their_own(bench, subject, part):
    options = Namespace(part=part, smoke=False, samplers=None, calls=None, methods=None)
    names = [point.name for point in bench.pareto_points.list_points(subject, options)]
    assert len(set(names)) == len(names)
    assert bool(names) == (part != "guidance" or subject.model.name == "emoji")


def test_what_cannot_be_run_says_why(bench, subject, setup, monkeypatch):
    def fail(subject, setup, computed):
        raise RuntimeError("no such cache\nand more")

    method = bench.pareto_methods.Method("broken", "", fail)
    monkeypatch.setitem(bench.pareto.METHODS, "broken", method)
    row = bench.pareto.measure(subject, bench.pareto_points.Point(setup, "broken", 3), "fidelity")
    assert row["error"] == "RuntimeError: no such cache" and "psnr" not in row


@pytest.mark.parametrize("name", ["pabc calibrated", "pabc auto", "DPCache"])
def test_what_is_calibrated_computes_as_many_calls_as_it_may(bench, subject, setup, name):
    point = bench.pareto_points.Point(setup, name, 3)
    row = bench.pareto.measure(subject, point, "fidelity")
    assert row["share"] == 0.5 and 10 < row["psnr"] < 149, row
    assert name != "pabc calibrated" or row["predicted"] > 10


def make_row(method, allowed, psnr, worst=None, num_calls=50):
    return {
        "model": "digits",
        "sampler": "DDIM",
        "calls": num_calls,
        "num_calls": num_calls,
        "method": method,
        "allowed": allowed,
        "share": allowed / num_calls,
        "psnr": psnr,
        "psnr_min": psnr if worst is None else worst,
        "fine_psnr": 40.0,
        "fine_psnr_min": 39.0,
    }


def test_verdicts_compare_with_what_costs_no_more(bench):
    rows = [
        make_row("full", 50, 150.0),
        make_row("pabc calibrated", 25, 69.0, 47.0),
        make_row("fewer steps, DDIM", 25, 45.0),
        make_row("TaylorSeer", 17, 64.0),
        make_row("TaylorSeer", 33, 90.0),
        make_row("pabc skip", 25, 80.0),
    ]
    (line,) = bench.pareto_table.list_verdicts(rows)
    assert line.startswith("digits, DDIM 50, 2x, 25 calls: 69.0 (47.0); aim 68 met; worst MISSED")
    assert "+5.0 dB to best peer, TaylorSeer MISSED" in line
    assert "+24.0 dB to fewer steps, DDIM met" in line
    named = {f"{row['method']} {row['allowed']}": row for row in rows}
    assert "69.0 (47.0)" in bench.pareto_table.format_tables(named)
    text = bench.pareto_table.format_documents(named)
    assert line in text and "| TaylorSeer |" in text
    picture = bench.pareto_plot.draw("digits", rows)
    assert picture.startswith("<svg") and picture.count("<circle") == 2 * 5


def test_predictions_are_compared_with_what_was_measured(bench):
    rows = [{"predicted": x, "psnr": x + miss} for x, miss in ((40, 3), (50, 4), (60, -5))]
    found = bench.pareto_table.correlate(rows)
    assert found["largest_miss"] == -5 == found["most_optimistic"] and found["plans"] == 3
    assert found["correlation"] == pytest.approx(np.corrcoef([40, 50, 60], [43, 54, 55])[0, 1])


def make_grid_row(sampler, grid, allowed, fine_psnr, method="pabc calibrated"):
    row = make_row(method, allowed, None, num_calls=grid)
    return {**row, "sampler": sampler, "fine_psnr": fine_psnr, "fine_psnr_min": fine_psnr}


def test_the_fewest_calls_that_reach_the_best_sampler_are_found(bench):
    rows = [
        make_grid_row("DDIM", 50, 50, 45.0, "full"),
        make_grid_row("UniPC", 50, 50, 53.0, "full"),
        make_grid_row("UniPC", 100, 17, 54.0),
        make_grid_row("UniPC", 50, 17, 53.5),
        make_grid_row("UniPC", 100, 12, 44.0),
    ]
    text = bench.pareto_grids.format_grids(dict(enumerate(rows)))
    assert "best of 50 calls: UniPC, 53.0 dB; 17 calls on 100 steps of UniPC give 54.0 dB" in text
    assert "0.34 of them, aim 0.36 met" in text
    del rows[2:4]
    assert "no plan reaches it" in bench.pareto_grids.format_grids(dict(enumerate(rows)))


def test_the_floor_is_where_the_first_plan_falls_below_it(bench):
    rows = [make_row("", calls, psnr) for calls, psnr in ((40, 60), (25, 41), (17, 39), (12, 50))]
    assert bench.pareto_grids.find_floor(rows, "psnr") == "2.00x"


def test_polynomials_continue_what_they_go_through(bench):
    sources = (7, 4, 3)
    weights = bench.ablations._extrapolate(9, sources)
    for power in range(3):
        assert sum(w * s**power for w, s in zip(weights, sources, strict=True)) == 9**power
    assert bench.ablations._extrapolate(9, (7,)) == (1.0,)


@pytest.mark.parametrize(
    "way",
    [
        "all",
        "steps by rule, three fitted weights",
        "growth of errors: measured",
        "regions worth 1 more computed calls",
    ],
)
def test_ways_to_find_a_plan_compute_as_many_calls(bench, subject, setup, way):
    find = bench.ablations.list_ways()[way]
    row = bench.ablations.measure(subject, setup, way, find, 2.0)
    assert row["computed"] == 3 and row["psnr"] > 10, row
    assert 2 < row["operations"] <= 3, row
    table = bench.ablations.format_rows({way: row})
    assert way in table and f"{row['psnr']:.1f}" in table


def test_regions_are_reused_as_pabc_reuses_them(bench, subject, setup):
    regions, model = bench.ablation_regions, subject.model.transformer
    loop = subject.loop(setup, subject.seen)
    timesteps = loop.sampler.timesteps
    base = bench.ablations.find_with_steps(bench.ablations.Trial(subject, setup), 5)
    step = base.computed[2]
    whole = bench.pareto_methods.run_choice(loop, regions.RegionPlan(base, ()).choose(timesteps))
    found = {region.paths[0]: region for region in regions.find_regions(model)}
    parts = {  # a block of pabc is a spatial and a temporal one of Latte
        "digits": {
            "spatial": "transformer_blocks.0.attn1",
            "temporal": "temporal_transformer_blocks.0.attn1",
        },
        "emoji": {"joint": "transformer_blocks.0.attn", "block": "transformer_blocks.0"},
    }[subject.model.name]
    first, second = (found[path] for path in parts.values())
    later = base.computed[3]
    plan = [regions.Reuse(step, first, "linear"), regions.Reuse(later, second, "hold")]
    choice = regions.RegionPlan(base, tuple(plan)).choose(timesteps)
    samples, share = bench.pareto_methods.run_choice(loop, choice)
    schedule = base.schedule(timesteps)
    for reuse, name in zip(plan, parts, strict=True):
        layers = [int(path.split(".")[1]) for path in reuse.region.paths]
        mask = [i == reuse.step for i in range(NUM_CALLS)]
        schedule = schedule.override(kind=name, layers=layers, mask=mask, forecast=reuse.rule)
    fast = bench.pareto_plans.pabc.compile(model, schedule, backend="eager")
    torch.testing.assert_close(samples, loop.run(fast), rtol=1e-4, atol=1e-4)
    assert (samples - whole[0]).abs().max() > 1e-3 and share < whole[1] - 0.02
    assert not any("forward" in vars(module) for module in model.modules()), "undone"


def test_an_interrupted_run_goes_on_point_by_point(tmp_path):
    out = tmp_path / "pareto.json"
    options = ["--smoke", "--models", "emoji", "--out", str(out), "--store", str(tmp_path / "s")]
    command = [sys.executable, str(BENCH / "pareto.py"), *options]

    def run(*more):
        result = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        return result, json.loads(out.read_text())

    first, content = run("--methods", "pabc skip")
    assert len(content["rows"]) == 4 and first.stderr.count("dB") >= 4
    second, content = run("--methods", "pabc skip,TaylorSeer", "--resume")
    assert len(content["rows"]) == 7 and "pabc skip |" not in second.stderr
    assert "TaylorSeer" in second.stdout and (tmp_path / "pareto_emoji_euler_6.svg").exists()
    assert all("error" not in row for row in content["rows"].values())
