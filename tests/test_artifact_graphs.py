"""Graphs that are written as JSON and read again: the same nodes, facts and results."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import CASES, WIDTH, Branch, Case, Experts, Image, Mlp
from phases import inline, specialize
from reading import OnTheHour, Plain, Scaled, TextLengths, make, make_calls
from reading import text_and_mask as make_text
from stages import guarded_of, run_to, with_facts
from torch import nn
from torch.fx import GraphModule

import pabc
from pabc import ArtifactError, passes
from pabc.artifact.analysis import read_guarded, write_guarded
from pabc.artifact.values import decode, encode
from pabc.options import Options
from pabc.passes import Guarded
from pabc.pipeline import analyze
from pabc.runtime.bindings import slot_specs
from pabc.runtime.reads import ReadCheck
from pabc.runtime.weights import Weights


class NothingKept:
    def read(self, slot: int) -> None: ...
    def write(self, slot: int, cuts: Any) -> None: ...


BY_NAME = {case.name: case for case in CASES}
TRIED = [BY_NAME[n] for n in ("Factorized", "Rearranged", "JointImage", "Refined", "Windowed")] + [
    BY_NAME[n] for n in ("attend_einsum", "InPlace", "HalfStream", "FeedsQuery")
]


def through_json(guarded: Guarded, model: nn.Module) -> Guarded:
    content, constants = write_guarded(guarded)
    return read_guarded(json.loads(json.dumps(content)), constants, model)


def layout(val: Any) -> Any:
    if not isinstance(val, torch.Tensor):
        return val
    return val.shape, val.stride(), val.dtype, val.device


def facts(gm: GraphModule) -> list[Any]:
    vals = [torch.utils._pytree.tree_leaves(n.meta.get("val")) for n in gm.graph.nodes]
    layouts = [list(map(layout, leaves)) for leaves in vals]
    return [
        (n.op, n.name, str(n.target), str(n.args), str(n.kwargs), n.meta.get("attention"), found)
        for n, found in zip(gm.graph.nodes, layouts, strict=True)
    ]


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_graphs_and_their_phases_are_the_same_after_a_round_trip(case: Case, captured) -> None:
    model, gm = captured(case)
    guarded = guarded_of(run_to(gm, "cache"))
    again = through_json(guarded, model)
    assert facts(again.graph) == facts(guarded.graph)
    assert facts(again.prologue.graph) == facts(guarded.prologue.graph)
    for name in ("denoised", "marked", "shards", "regions"):
        assert getattr(again, name) == getattr(guarded, name), name
    for name in ("signature", "aliases", "writes", "deleted", "written", "compiled", "sizes"):
        assert getattr(again.captured, name) == getattr(guarded.captured, name), name
    assert again.prologue.steady == guarded.prologue.steady
    assert again.prologue.attentions == guarded.prologue.attentions
    schedule = pabc.Schedule.from_masks(range(3), {k: [False, True, True] for k in case.kinds})
    plan = schedule.plan(slot_specs(guarded.regions))
    call = case.call()
    for phase in plan.phases:
        kept = [torch.randn(s) for slot in phase.reused for s in guarded.regions[slot].shapes]
        outputs = [run_phase(graphs, phase, call, kept) for graphs in (guarded, again)]
        assert all(map(torch.equal, *outputs))
    outputs = [run_all(graphs, [*call.values()]) for graphs in (guarded, again)]
    assert torch.equal(*outputs)


def run_all(guarded: Guarded, inputs: Any) -> torch.Tensor:
    """The first output where nothing is reused."""
    with torch.no_grad():
        hoisted = guarded.prologue.graph(*inputs)
        return guarded.graph(NothingKept(), *inputs, *hoisted)[0]


def run_phase(guarded: Guarded, phase: Any, call: Any, kept: list[Any]) -> list[torch.Tensor]:
    gm = with_facts(guarded.graph, passes.Facts([passes.Regions(guarded.regions)]))
    gm = specialize(gm, reused=phase.reused, stored=phase.stored)
    flat, lifted = passes.lift_weights_pass(inline(gm))
    weights = Weights((guarded.graph,), guarded.captured).get(lifted.weights)
    with torch.no_grad():
        hoisted = guarded.prologue.graph(*call.values())
        return list(flat(*weights, *call.values(), *hoisted, *kept))


def test_explanations_are_the_same(captured) -> None:
    model, gm = captured(BY_NAME["Factorized"])
    guarded = guarded_of(run_to(gm, "cache"))
    again = through_json(guarded, model)
    assert pabc.explanation.describe(again) == pabc.explanation.describe(guarded)


def analyzed(model: nn.Module, *args: Any) -> Guarded:
    return analyze(model.eval(), args, {}, Options())[0]


class Table(nn.Module):
    """Reads constants of its own: a tensor in a list, and one made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Image(Mlp())
        self.offsets = [torch.randn(3, 1, 1)]

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([1.0, float("inf"), -2.0])[[0, 2, 0]]
        return self.inner(x + self.offsets[0] * scale.view(3, 1, 1), t, text)


def test_constants_are_saved_and_weights_are_the_models() -> None:
    torch.manual_seed(0)
    model = Table()
    call = torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 5, WIDTH)
    guarded = analyzed(model, *call)
    other = Table()
    other.load_state_dict(model.state_dict())
    again = through_json(guarded, other.eval())
    results = [run_all(each, call) for each in (guarded, again)]
    assert torch.equal(*results)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert not torch.equal(run_all(again, call), results[0])


def test_a_plain_tensor_of_a_module_is_the_models_as_a_weight_is() -> None:
    class Plain(Table):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.randn(3, 1, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.offset, t, text)

    model, call = Plain(), (torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 5, WIDTH))
    other = copy.deepcopy(model)
    other.offset = torch.randn(3, 1, 1)
    again = through_json(analyzed(model, *call), other.eval())
    with torch.no_grad():
        assert torch.equal(run_all(again, call), other(*call))


def read_check(guarded: Guarded) -> ReadCheck:
    reads = guarded.captured.reads
    graphs = (guarded.graph, guarded.prologue.graph, reads.graph)
    return ReadCheck(reads, Weights(graphs, guarded.captured))


def test_what_is_read_from_data_is_checked_as_before() -> None:
    model, (call, *_) = make(TextLengths, Branch()), make_calls(**make_text(3, 5))
    guarded = analyzed(model, *call.values())
    loaded = through_json(guarded, model)
    reads, again = guarded.captured.reads, loaded.captured.reads
    assert reads and again.entries == reads.entries and again.inputs == reads.inputs
    assert again.used == reads.used and again.weights == reads.weights
    found, expected = read_check(loaded), read_check(guarded)
    assert found.difference([*call.values()]) is None
    other = [*{**call, **make_text(3, 4)}.values()]
    assert found.difference(other) is not None
    assert str(found.difference(other)) == str(expected.difference(other))


@pytest.mark.parametrize("kind", [OnTheHour, Scaled])
def test_numbers_read_from_the_timestep_are_compared_as_before(kind: Any) -> None:
    model, (call, *_) = make(kind, Branch()), make_calls()
    guarded = analyzed(model, *call.values())
    found, expected = read_check(through_json(guarded, model)), read_check(guarded)
    for time in (1.0, 0.5, 0.0, 900.0, -3.0):
        moved = [torch.full_like(x, time) if name == "t_B" else x for name, x in call.items()]
        assert str(found.difference(moved)) == str(expected.difference(moved))


def test_modules_outside_of_the_graph_are_called_as_before() -> None:
    model, (call, *_) = make(Plain, Branch(), Experts()), make_calls()
    guarded = analyzed(model, *call.values())
    assert guarded.captured.calls
    again = through_json(guarded, model)
    results = [run_all(each, [*call.values()]) for each in (guarded, again)]
    assert torch.equal(*results)
    assert list(map(str, again.captured.calls)) == list(map(str, guarded.captured.calls))


@dataclass
class Known:
    x: Any


VALUES = [
    *(None, True, 3, -0.0, 0.1, float("inf"), -float("inf"), 1 - 2j, "text", 10**30),
    *((), (1, (2.5, [None])), {"a": 1, 2: (3,)}, slice(None, 3), range(3), ..., frozenset({1})),
    *(torch.float32, torch.device("cpu"), torch.strided, torch.channels_last, torch.Size([2])),
    *(list, dict, Known),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value))))
    assert again == value and type(again) is type(value)
    assert str(again) == str(value)


def test_nan_stays_nan() -> None:
    assert str(decode(json.loads(json.dumps(encode(float("nan")))))) == "nan"


@pytest.mark.parametrize("value", [object(), lambda: 0, torch.zeros(1), {1, 2}, nn.Linear])
def test_what_is_no_data_is_refused(value: Any) -> None:
    with pytest.raises(ArtifactError, match="expected data that can be saved, found"):
        encode(value)


@pytest.mark.parametrize(
    "content",
    [
        {"class": "os:system"},
        {"class": "subprocess:Popen"},
        {"class": "not_imported:Thing"},
        {"enum": ["os:system", "x"]},
        {"dtype": "load"},
        {"fact": ["Region"]},
        {"new": 1},
        {"a": 1, "b": 2},
    ],
)
def test_reading_makes_data_only(content: Any) -> None:
    with pytest.raises((ArtifactError, ValueError)):
        decode(content)
