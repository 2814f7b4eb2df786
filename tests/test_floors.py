"""Modules stand on floors, and import only what stands on their own floor or below.

The imports are read from the source, so those within functions and under `TYPE_CHECKING` count as
well. Two more rules: pabc/ imports passes/ through its front door, `pabc.passes`, and no modules
import one another in a circle. (The kernels have no such door: each module is one kernel, and who
needs one alone need not import Triton for the others.)
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"pabc": "pabc", "passes": "pabc.passes", "kernels": "pabc.kernels"}
"""Folder of the checkout -> the package that it is installed as."""
PASSES = "pabc.passes"
FLOORS = (
    # What is used of PyTorch beyond its public names; data and formulas that everything above
    # shares; models that pabc brings along.
    ("pabc.internals.*", "pabc.base.*", "pabc.models.*"),
    # Kernels, one a module.
    ("pabc.kernels.*",),
    # From a model to graphs; knows neither schedules nor what runs.
    ("pabc.passes.*",),
    # Schedules, and the plans that they are bound to: data alone.
    (
        "pabc.validate",
        "pabc.steps",
        "pabc.forecasts",
        "pabc.lifetimes",
        "pabc.slots",
        "pabc.columns",
        "pabc.plan",
        "pabc.overrides",
        "pabc.schedule",
        "pabc.presets",
        "pabc.budget",
    ),
    # Which passes run, with which options, and what is told about their results.
    (
        "pabc.sharding",
        "pabc.options",
        "pabc.stages",
        "pabc.pipeline",
        "pabc.communication",
        "pabc.explanation",
        "pabc.differences",
    ),
    # What happens at each call.
    ("pabc.runtime.*",),
    # A compiled model: as a file, in place of a module, and by itself.
    ("pabc.artifact.*", "pabc.wrapper", "pabc.inplace", "pabc.dumps", "pabc.compiled"),
    ("pabc.planning",),
    # What follows from recorded generations: data alone.
    (
        "pabc.calibration.recording",
        "pabc.calibration.digests",
        "pabc.calibration.hearing",
        "pabc.calibration.steps",
        "pabc.calibration.clipping",
        "pabc.calibration.replay",
        "pabc.calibration.updates",
        "pabc.calibration.growth",
        "pabc.calibration.fit",
        "pabc.calibration.paths",
        "pabc.calibration.compensation",
        "pabc.calibration.refinement",
        "pabc.calibration.candidates",
        "pabc.calibration.search",
    ),
    # What users call.
    ("pabc.api",),
    ("pabc.pipelines.*",),
    ("pabc.calibration.*",),
    # Plans that make themselves.
    ("pabc.automatic.*",),
    # Nodes for a host that runs models and samplers of its own.
    ("pabc.comfyui.*",),
    ("pabc",),
    # Programs that use pabc as any user does.
    ("pabc.demo.*", "pabc.commands.*", "pabc.__main__"),
)
"""From the bottom to the top; `.*` stands for a package and all that is in it."""


@dataclass(frozen=True)
class Arrow:
    """One import: `source` imports `target`, in this line of its file."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, imports {self.target}"


def find_modules(root: Path) -> dict[str, Path]:
    """Returns the modules of a checkout, by the name under which they are imported."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def find_arrows(modules: Mapping[str, Path]) -> list[Arrow]:
    """Returns the imports of modules by one another."""
    return [
        Arrow(name, target, line)
        for name, path in modules.items()
        for line, target in _imports(name, path, modules)
        if target in modules and target != name
    ]


def _imports(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            home = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{home}.{alias.name}"
                yield node.lineno, inner if inner in modules else home


def find_faults(root: Path, floors: Iterable[Iterable[str]] = FLOORS) -> list[str]:
    """Returns what breaks the rules in a checkout, each in one line."""
    modules = find_modules(root)
    height = {name: _height(name, floors) for name in modules}
    faults = [f"{name} is on no floor" for name, floor in height.items() if floor is None]
    arrows = find_arrows(modules)
    for arrow in arrows:
        source, target = height[arrow.source], height[arrow.target]
        if source is not None and target is not None and target > source:
            faults.append(f"{arrow}, which is on a floor above")
        if arrow.target.startswith(f"{PASSES}.") and not f"{arrow.source}.".startswith(
            f"{PASSES}."
        ):
            faults.append(f"{arrow}, past the front door of passes")
    return faults + [f"in a circle: {' -> '.join(circle)}" for circle in find_circles(arrows)]


def _height(name: str, floors: Iterable[Iterable[str]]) -> int | None:
    for height, patterns in enumerate(floors):
        for pattern in patterns:
            package = pattern.removesuffix(".*")
            if name == package or (package != pattern and name.startswith(f"{package}.")):
                return height
    return None


def find_circles(arrows: Iterable[Arrow]) -> list[list[str]]:
    """Returns one circle of imports through each module that a search finds one from."""
    targets: dict[str, list[str]] = {}
    for arrow in arrows:
        targets.setdefault(arrow.source, []).append(arrow.target)
    done: set[str] = set()
    circles: list[list[str]] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circles.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in targets.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in targets:
        visit(name, ())
    return circles


def test_no_import_breaks_a_rule() -> None:
    assert find_faults(ROOT) == []


# ---- the check itself ----


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        (
            "passes/tag.py",
            "from pabc.plan import KINDS",
            "pabc.passes.tag, line 1, imports pabc.plan, which is on a floor above",
        ),
        (
            "pabc/runtime/guards.py",
            "def check():\n    import pabc.api",
            "pabc.runtime.guards, line 2, imports pabc.api, which is on a floor above",
        ),
        (
            "pabc/base/format.py",
            "if TYPE_CHECKING:\n    from ..plan import Plan",
            "pabc.base.format, line 2, imports pabc.plan, which is on a floor above",
        ),
        (
            "pabc/base/format.py",
            "from pabc import passes",
            "pabc.base.format, line 1, imports pabc.passes, which is on a floor above",
        ),
        (
            "pabc/api.py",
            "from pabc.passes.tag import tag",
            "pabc.api, line 1, imports pabc.passes.tag, past the front door of passes",
        ),
        (
            "pabc/api.py",
            "from pabc.passes import tag",
            "pabc.api, line 1, imports pabc.passes.tag, past the front door of passes",
        ),
        ("pabc/attic.py", "", "pabc.attic is on no floor"),
        (
            "pabc/plan.py",
            "def lazily():\n    from pabc import schedule",
            "in a circle: pabc.plan -> pabc.schedule -> pabc.plan",
        ),
    ],
)
def test_each_rule_is_checked(path: str, line: str, fault: str, tmp_path: Path) -> None:
    files = {
        "pabc/__init__.py": "from pabc.api import compile",
        "pabc/api.py": "from pabc import passes",
        "pabc/base/__init__.py": "",
        "pabc/base/kinds.py": "import torch",
        "pabc/plan.py": "from pabc.base.kinds import KINDS",
        "pabc/runtime/guards.py": "from pabc.passes import tag_pass",
        "pabc/schedule.py": "from pabc.plan import Plan",
        "passes/__init__.py": "from .tag import tag_pass",
        "passes/tag.py": "from pabc.base.kinds import KINDS",
    }
    write_files(tmp_path, files)
    assert find_faults(tmp_path) == []
    write_files(tmp_path, {path: line})
    assert find_faults(tmp_path) == [fault]


def write_files(root: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
