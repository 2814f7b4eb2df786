"""Fixtures: one capture per case, a process group, CUDA graphs on a CPU; and tables of results."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Before anything imports Triton: its own functions are made for the interpreter or for a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from models import Case
from stages import capture_call, copy_graph, facts_of
from tapes import Tape
from torch import nn
from torch.fx import GraphModule

import pabc
from pabc import passes
from pabc.runtime import cudagraphs

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # processes that share the cores would wait for one another

Captured = Callable[[Case], tuple[nn.Module, GraphModule]]


def pytest_configure() -> None:
    """Lets assertions in modules that tests share say what they compared."""
    pytest.register_assert_rewrite(
        "attentions", "generations", "graphs", "lowered_norms", "phases", "recordings", "reuse"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that `slow.txt` names, before they are chosen by their marks."""
    slow = {*Path(__file__).with_name("slow.txt").read_text().split()}
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run of the tests have: for what is to be made once."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a folder of its own for recordings of `pabc.auto`, made where it is used."""
    folder = tmp_path_factory.getbasetemp() / "recordings" / uuid.uuid4().hex
    monkeypatch.setenv("PABC_CACHE", str(folder))


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, as a launcher would have made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
        gm = captured(case)[1]
        known = facts_of(gm)[passes.Captured]
        monkeypatch.setattr(passes, "capture", lambda *_, **__: (copy_graph(gm), known))
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
