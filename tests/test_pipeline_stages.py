"""The pipeline as data: its stages, what may be left out, what is recorded."""

from typing import get_args

import pytest
import torch
from models import MODELS
from small_latte import make_inputs, make_latte
from stages import capture_call, facts_of
from torch.fx import Graph, GraphModule

import pabc
from pabc import passes
from pabc.options import DisabledStage, Options
from pabc.pipeline import GUARDING, NAMING, STAGES
from pabc.stages import Compilation, Stage, format_records, run_stages

ALL = tuple(STAGES.values())
OPTIONAL = [stage.name for stage in ALL if stage.is_optional]
FACTORIZED = next(case for case in MODELS if case.name == "Factorized")


def test_each_stage_has_a_name_of_its_own():
    names = [stage.name for stage in ALL]
    assert len(set(names)) == len(names)


def test_options_name_the_stages_that_may_be_left_out():
    assert sorted(get_args(DisabledStage)) == sorted(OPTIONAL)


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_stage_can_be_left_out(name):
    wanted = {"encode": {"cache_dtype": "bf16"}, "offload": {"offload": "cpu"}}.get(name, {})
    assert STAGES[name].is_on(Options(**wanted))
    assert not STAGES[name].is_on(Options(**wanted, disable=(name,)))


@pytest.mark.parametrize("name", OPTIONAL)
def test_results_do_not_depend_on_an_optional_stage(name):
    case = FACTORIZED
    model = case.model()
    schedule = pabc.Schedule.pyramid(range(3), spatial=2, fraction=(0.0, 1.0))
    plain = pabc.compile(model, schedule, backend="eager", kernels="force")
    without = pabc.compile(model, schedule, backend="eager", kernels="force", disable=(name,))
    with torch.no_grad():
        for step in range(3):
            call = case.call(step)
            torch.testing.assert_close(plain(**call), without(**call), rtol=1e-5, atol=1e-5)
    if name == "blocks":
        assert without.stats.blocks < plain.stats.blocks


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"disable: expected one of .*'hoist'.*found 'tag'"):
        pabc.compile(FACTORIZED.model(), pabc.Schedule.none(range(3)), disable=("tag",))
    with pytest.raises(ValueError, match="disable: expected a sequence of names"):
        pabc.compile(FACTORIZED.model(), pabc.Schedule.none(range(3)), disable="hoist")


def add_input(gm: GraphModule, captured: passes.Captured, *, latents: str | None) -> GraphModule:
    """A pass that takes a fact and an option."""
    assert isinstance(captured, passes.Captured) and latents == "x"
    gm.graph.placeholder("added")
    return gm


def fail(gm: GraphModule) -> None:
    raise AssertionError("postcondition")


def test_the_runner_passes_facts_and_options_and_checks(caplog):
    gm = capture_call(FACTORIZED.model(), FACTORIZED.call())
    options = Options(latents="x")
    caplog.set_level("DEBUG", logger="pabc")
    stage = Stage(name="added", run=add_input, verify=fail)
    with pytest.raises(AssertionError, match="postcondition"):
        run_stages([stage], Compilation(gm, facts_of(gm)), options)
    count = len(gm.graph.nodes)
    made = run_stages([Stage(name="added", run=add_input)], Compilation(gm, facts_of(gm)), options)
    (record,) = made.records
    assert record.num_nodes == (count, count + 1) and record.is_on and record.code == ""
    assert f"added: {record.seconds:.3f} s, {count} -> {count + 1} nodes" in caplog.text


def test_a_stage_without_its_fact_says_which():
    empty = Compilation(GraphModule({}, Graph()), passes.Facts())
    with pytest.raises(KeyError, match="Captured"):
        run_stages(NAMING[2:], empty, Options())


def test_what_may_change_bits_is_told():
    latents, text = make_inputs()
    timestep = torch.full((2,), 990)
    model = make_latte(num_layers=1)
    found = pabc.explain(model, latents, timestep, encoder_hidden_states=text)
    assert "may change them: none" in str(found)
    names = [record.name for record in found.stages]
    assert names == [stage.name for stage in (*NAMING, *GUARDING)]
    table = format_records(found.stages)
    assert len(table) == len(names) + 1
    assert any(line.split()[:2] == ["shard", "off"] for line in table)
