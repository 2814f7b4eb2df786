"""Writes the graphs, stages and plan of one kind of call to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pabc.explanation import Explanation
from pabc.runtime.bindings import Binding
from pabc.runtime.program import Program
from pabc.stages import StageRecord, format_records


def write_dump(folder: Path, program: Program, binding: Binding, explanation: Explanation) -> None:
    """Writes the graph after each stage, also of each phase; the plan; and the explanation.

    Files in `folder`:
        stages.txt: a table of stages, nodes and seconds.
        seconds.json: the seconds of each stage.
        <n>_<stage>.py: the graph after that stage.
        region_<name>.py: the graph of a region, which the guarded graph calls.
        phase_<i>/: the same table and graphs for phase i of the plan.
        plan.json: the plan.
        explain.txt: the explanation.
    """
    _write_stages(folder, program.records)
    seconds = {record.name: record.seconds for record in program.records}
    (folder / "seconds.json").write_text(json.dumps(seconds, indent=1))
    for region in program.regions:
        code = program.guarded.graph.get_submodule(region.name).code
        (folder / f"region_{region.name}.py").write_text(str(code))
    for i, phase in enumerate(binding.phases):
        _write_stages(folder / f"phase_{i}", program.phases.trace(phase))
    (folder / "plan.json").write_text(binding.plan.to_json())
    (folder / "explain.txt").write_text(f"{explanation}\n")


def _write_stages(folder: Path, records: Sequence[StageRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.txt").write_text("\n".join(format_records(records)) + "\n")
    for i, record in enumerate(records):
        (folder / f"{i}_{record.name}.py").write_text(record.code)


def write_plan(folder: Path, binding: Binding, explanation: Explanation) -> None:
    """Writes `plan.json` and `explain.txt` of a model of which there are no graphs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(binding.plan.to_json())
    (folder / "explain.txt").write_text(f"{explanation}\n")
