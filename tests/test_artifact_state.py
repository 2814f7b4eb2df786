"""Loading into a model in another Python state: refused where a graph depends on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pabc
from pabc import ArtifactError

pytestmark = pytest.mark.runtime
STEPS = [900.0, 500.0, 100.0]
FACTOR = 1.5
TABLE = {"factor": 1.5}


class Mode(Enum):
    SLOW = 1
    FAST = 2


@dataclass
class Config:
    scale: float = 1.0
    modes: frozenset[Mode] = frozenset(Mode)
    _bias: float = field(default=0.0, compare=False, repr=False)
    _note: str = field(default="", compare=False, repr=False)


class Holder:
    def __init__(self) -> None:
        self.scale = 1.0
        self._scale = 1.0


def scaled(x: Any, by: float) -> Any:
    return x * by


def by_global(x: Any) -> Any:
    return x * FACTOR * TABLE["factor"]


def biased(x: Any, config: Config) -> Any:
    return x + config._bias


class Adapted(nn.Module):
    factor = 1.5
    factors = (1.5,)

    def __init__(self) -> None:
        super().__init__()
        self.base, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.enabled, self._scale, self.mode = True, 1.0, Mode.SLOW

    def set_adapter(self, enabled: bool, scale: float = 1.0, mode: Mode = Mode.SLOW) -> None:
        self.enabled, self._scale, self.mode = enabled, scale, mode

    def forward(self, x: Any) -> Any:
        if not self.enabled or self.mode is Mode.FAST:
            return self.base(x)
        return self.base(x) * self.factor * self.factors[0] + self._scale * self.up(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapted, self.head, self.other = Adapted(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.config, self.held, self.names = Config(), (Holder(), [Holder()], Holder()), {"a"}
        self.array, self.tensors = np.ones(2), [torch.ones(4)]
        self.part = partial(scaled, by=1.5)
        self.close_over(1.0)
        self.active = self.held[2]

    def close_over(self, scale: float) -> None:
        own, config = self.other, {"scale": scale}
        self.__dict__["call_other"] = lambda x: own(x) * config["scale"]

    def forward(self, x: Any, t: Any) -> Any:
        y = self.head(self.adapted(x)) * self.config.scale + float(self.array[0])
        y = y * self.active.scale
        y = y * self.held[0]._scale * self.held[1][0].scale + ("b" in self.names)
        return (
            self.call_other(self.part(by_global(biased(y, self.config))) * self.tensors[0])
            * (t / 1000)[:, None]
        )


def generate(model: Any) -> list[Any]:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(x, torch.full((2,), t)) for t in STEPS]


def save(model: nn.Module, path: Path) -> Path:
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    generate(fast)
    fast.save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: Any) -> Path:
    return save(Model().eval(), tmp_path_factory.mktemp("artifact") / "fast.pabc")


def check_loads(path: Path, model: nn.Module) -> None:
    expected = generate(model)
    loaded = pabc.load(path, model)
    assert all(map(torch.equal, generate(loaded), expected))
    assert loaded.stats.captures == 0


def test_a_model_in_the_same_state_is_taken(artifact: Path) -> None:
    check_loads(artifact, Model().eval())


def test_a_state_that_was_left_and_set_again_is_taken(artifact: Path) -> None:
    model = Model().eval()
    model.adapted.set_adapter(False)
    model.config.scale = 3.0
    model.adapted.set_adapter(True)
    model.config.scale = 1.0
    check_loads(artifact, model)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a flag that a method sets": (
        lambda m: m.adapted.set_adapter(False),
        "adapted.enabled: expected True, found False",
    ),
    "a number that a method sets": (
        lambda m: m.adapted.set_adapter(True, 0.5),
        "adapted._scale: expected 1.0, found 0.5",
    ),
    "an enum that a method sets": (
        lambda m: m.adapted.set_adapter(True, mode=Mode.FAST),
        "adapted.mode: expected Mode.'SLOW', found Mode.'FAST'",
    ),
    "a configuration": (
        lambda m: setattr(m.config, "scale", 0.5),
        "config.scale: expected 1.0, found 0.5",
    ),
    "an object in a tuple": (
        lambda m: setattr(m.held[0], "_scale", 0.5),
        r"held\[0\]._scale: expected 1.0, found 0.5",
    ),
    "what a function alone reads": (
        lambda m: setattr(m.config, "_bias", 0.5),
        "config._bias: expected 0.0, found 0.5",
    ),
    "which of two equal objects is meant": (
        lambda m: setattr(m, "active", m.held[0]),
        r"held: expected .*, 2 at active, found .*, 0 at active",
    ),
    "an object in a list": (
        lambda m: setattr(m.held[1][0], "scale", 0.5),
        r"held\[1\]\[0\].scale: expected 1.0, found 0.5",
    ),
    "a replaced forward": (
        lambda m: setattr(m.head, "forward", lambda x: x * 3),
        r"head.forward: expected nothing, found def <lambda>",
    ),
    "a hook": (
        lambda m: m.head.register_forward_hook(lambda a, b, o: o * 3),
        r"head._forward_hooks: expected nothing, found def <lambda>",
    ),
    "a variable of a function": (
        lambda m: m.close_over(0.5),
        r"call_other: config\['scale'\]: expected 1.0, found 0.5",
    ),
    "an argument of a partial": (
        lambda m: setattr(m, "part", partial(scaled, by=3.0)),
        r"part: expected partial\(def scaled .*'by', 1.5.*found partial",
    ),
    "an array": (
        lambda m: m.array.__setitem__(0, 3.0),
        "array: expected values .*, found values",
    ),
    "a tensor in a list": (
        lambda m: m.tensors[0].mul_(2),
        r"tensors\[0\]: expected a tensor \(4,\) torch.float32 .*, found a tensor",
    ),
    "a set": (lambda m: m.names.add("b"), r"names\['b'\]: expected nothing, found 'b'"),
    "training": (lambda m: m.head.train(), "head.training: expected False, found True"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_model_in_another_state_is_refused(kind: str, artifact: Path) -> None:
    edit, difference = EDITS[kind]
    model = Model().eval()
    edit(model)
    with pytest.raises(ArtifactError, match=f"fast.pabc: model: {difference}.*; set the model as"):
        pabc.load(artifact, model)


THIS = sys.modules[__name__]


@pytest.mark.parametrize(
    ("owner", "name", "value", "difference"),
    [
        (Adapted, "factor", 3.0, "class Adapted.factor: expected 1.5, found 3.0"),
        (Adapted, "factors", (3.0,), r"class Adapted.factors: expected \(1.5\), found \(3.0\)"),
        (Adapted, "forward", lambda self, x: x, "class Adapted.forward: expected def forward"),
        (THIS, "FACTOR", 3.0, "test_artifact_state.FACTOR: expected 1.5, found 3.0"),
        (THIS, "by_global", lambda x: x, "test_artifact_state.by_global: expected def by_global"),
    ],
)
def test_another_class_attribute_or_global_is_refused(
    owner: Any, name: str, value: Any, difference: str, artifact: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ArtifactError, match=f"model: {difference}"):
        pabc.load(artifact, Model().eval())


def test_another_entry_of_a_global_table_is_refused(artifact: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(TABLE, "factor", 3.0)
    with pytest.raises(ArtifactError, match=r"TABLE\['factor'\]: expected 1.5, found 3.0"):
        pabc.load(artifact, Model().eval())


def test_the_state_at_the_time_of_saving_counts(tmp_path: Path) -> None:
    model = Model().eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    for state in ((True, 1.0), (False, 1.0), (True, 0.5)):
        model.adapted.set_adapter(*state)
        generate(fast)
    fast.save(tmp_path / "fast.pabc")
    other = Model().eval()
    with pytest.raises(ArtifactError, match=r"_scale: expected 0.5, found 1.0"):
        pabc.load(tmp_path / "fast.pabc", other)
    other.adapted.set_adapter(True, 0.5)
    loaded = pabc.load(tmp_path / "fast.pabc", other)
    for scale in (0.5, 1.0, 0.5):
        other.adapted.set_adapter(True, scale)
        assert all(map(torch.equal, generate(loaded), generate(other)))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x


class Noting(Model):
    """Counts its calls, builds a table at the first one, and has notes that differ each time."""

    def __init__(self) -> None:
        super().__init__()
        self.counter, self.memo, self.tables = Counter(), None, {}
        self.held[0].address, self.config._note = id(self), f"made as {object()!r} by {id(self)}"

    @cached_property
    def size(self) -> int:
        return 4

    def forward(self, x: Any, t: Any) -> Any:
        if self.memo is None:
            self.memo = (torch.ones(self.size),)
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.ones(4)
        return super().forward(x, self.counter(t)) * self.memo[0] * self.tables[x.shape]


@pytest.mark.parametrize("ran", [False, True])
def test_what_a_forward_only_writes_is_no_state(ran: bool, tmp_path: Path) -> None:
    model, other = Noting().eval(), Noting().eval()
    if ran:
        generate(model)
    path = save(model, tmp_path / "fast.pabc")
    loaded = pabc.load(path, other)
    assert all(map(torch.equal, generate(loaded), generate(other)))
    assert loaded.stats.captures == 0
    check_loads(path, other)


PROGRAM = """
import sys
from test_artifact_state import *
path = Path(sys.argv[2])
model = Noting().eval()
save(model, path) if sys.argv[1] == "save" else check_loads(path, model)
"""


def test_another_process_has_the_same_state(tmp_path: Path) -> None:
    for seed, action in (("0", "save"), ("1", "load"), ("7", "load")):
        subprocess.run(
            [sys.executable, "-c", PROGRAM, action, str(tmp_path / "fast.pabc")],
            cwd=Path(__file__).parent,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            check=True,
            timeout=300,
        )
