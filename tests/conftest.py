"""What the tests of the passes share: one capture per case, and graphs that are copies of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Before anything imports Triton: its own functions are made for the interpreter or for a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from models import Case, run_by_hand
from tapes import Tape
from torch import nn
from torch.fx import Graph, GraphModule

import pabc
from pabc import passes
from pabc.passes.ir import copy_into, derived
from pabc.pipeline import ANALYSIS, Config, run_stages
from pabc.runtime import cudagraphs
from pabc.runtime.chain import Chain

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # processes that share the cores would wait for one another

Captured = Callable[[Case], tuple[nn.Module, GraphModule]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run of the tests have: for what is to be made once."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, as a launcher would have made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def copy_graph(gm: GraphModule) -> GraphModule:
    graph = Graph()
    copy_into(graph, gm.graph.nodes, {})
    return derived(gm, graph)


def run_to(gm: GraphModule, last: str, **config: Any) -> GraphModule:
    """Runs the pipeline on a captured graph up to and including the stage named `last`."""
    names = [stage.name for stage in ANALYSIS]
    return run_stages(ANALYSIS[: names.index(last) + 1], gm, Config(**config))[0]


def capture_call(model: nn.Module, call: Mapping[str, Any]) -> GraphModule:
    return passes.capture(model.eval(), (), dict(call))


def run_graph(gm: GraphModule, call: Mapping[str, Any], *state: Any) -> torch.Tensor:
    """The first output of a graph that takes `state`, the call's arguments and what is hoisted."""
    with torch.no_grad():
        outputs = gm(*state, *with_hoisted(gm, call))
    return outputs[0]


def with_hoisted(gm: GraphModule, call: Mapping[str, Any]) -> list[Any]:
    """The call's arguments, and what the graph's prologue makes of them, where it has one."""
    with torch.no_grad():
        hoisted = gm.meta["prologue"](*call.values()) if "prologue" in gm.meta else ()
    return [*call.values(), *hoisted]


def compile_flat(flat: GraphModule) -> Callable[..., list[torch.Tensor]]:
    """A flat graph, block by block, with Inductor."""
    chain, blocks = Chain.of(passes.split_blocks_pass(flat))
    run = chain.link(passes.compile_blocks(blocks))
    return lambda *inputs: run([*inputs])


def compare_with_hand(
    model: nn.Module, case: Case, kinds: Mapping[str, str] | None = None
) -> pabc.Explanation:
    """Nothing reused: the model's bits. A pyramid: what the cache written by hand gives.

    Returns what was found in the model.
    """
    calls = [case.call(step) for step in range(5)]
    found = pabc.explain(model, kinds=kinds, **calls[0])
    reused = sorted(set(found.attention.values()) - {"other"})
    none = pabc.compile(model, pabc.Schedule.none(range(5)), backend="eager", kinds=kinds)
    mask = [False, True, True, False, True]
    schedule = pabc.Schedule.from_masks(range(5), dict.fromkeys(reused, mask))
    fast = pabc.compile(model, schedule, backend="eager", kinds=kinds)
    masks = {(kind, layer): mask for kind in reused for layer in range(9)}
    expected = run_by_hand(model, calls, masks, "attention")
    with torch.no_grad():
        for call, reference in zip(calls, expected, strict=True):
            assert torch.equal(none(**call), model(**call))
            assert torch.equal(fast(**call), reference)
    assert not torch.equal(expected[1], none(**calls[1])), "nothing was reused"
    return found


@pytest.fixture(scope="session")
def captured() -> Captured:
    """A case's model and its captured graph: captured once, a copy each time."""
    kept: dict[str, tuple[nn.Module, GraphModule]] = {}

    def get(case: Case) -> tuple[nn.Module, GraphModule]:
        if case.name not in kept:
            model = case.model()
            kept[case.name] = model, capture_call(model, case.call())
        model, gm = kept[case.name]
        return model, copy_graph(gm)

    return get


@pytest.fixture
def compile_captured(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`pabc.compile` of a case's model, with the capture that exists already."""

    def compile_case(case: Case, schedule: pabc.Schedule, **options: Any) -> pabc.CompiledModel:
        model, _ = captured(case)
        monkeypatch.setattr(passes, "capture", lambda *_, **__: captured(case)[1])
        return pabc.compile(model, schedule, **options)

    return compile_case


@pytest.fixture
def add_row(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a row, a value per column, to a table that is printed after the tests."""

    def add(title: str, **columns: object) -> None:
        record_property(f"table: {title}", {name: str(value) for name, value in columns.items()})

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables, whichever processes the rows come from."""
    tables: dict[str, list[dict[str, str]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, row in report.user_properties:
            if name.startswith("table: "):
                tables.setdefault(name.removeprefix("table: "), []).append(row)
    for title, rows in tables.items():
        terminalreporter.section(title)
        lines = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line("  ".join(cells).rstrip())


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs for models on the CPU."""
    monkeypatch.setattr(cudagraphs, "Tape", Tape)
    monkeypatch.setattr(cudagraphs, "DEVICE_TYPE", "cpu")
