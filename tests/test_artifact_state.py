"""Loading into a model in another Python state: refused where a graph depends on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved_states
import torch
from saved_states import (
    STEPS,
    TABLE,
    Adapted,
    Config,
    Counter,
    Mode,
    Model,
    Noting,
    check_loads,
    generate,
    save,
    scaled,
)
from torch import nn

import pabc
from pabc import ArtifactError

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: Any) -> Path:
    return save(Model().eval(), tmp_path_factory.mktemp("artifact") / "fast.pabc")


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


@pytest.mark.parametrize(
    ("owner", "name", "value", "difference"),
    [
        (Adapted, "factor", 3.0, "class Adapted.factor: expected 1.5, found 3.0"),
        (Adapted, "factors", (3.0,), r"class Adapted.factors: expected \(1.5\), found \(3.0\)"),
        (Adapted, "forward", lambda self, x: x, "class Adapted.forward: expected def forward"),
        (saved_states, "FACTOR", 3.0, "saved_states.FACTOR: expected 1.5, found 3.0"),
        (saved_states, "by_global", lambda x: x, "saved_states.by_global: expected def by_global"),
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


class Scaled(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Any) -> Any:
        return x * self.config.scale


class Sharing(nn.Module):
    """A module that is called as it is, since it counts, has what another one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.counter.config = Config()
        self.scaled = Scaled(self.counter.config)

    def forward(self, x: Any, t: Any) -> Any:
        return self.scaled(x) * self.counter(t)[:, None]


def test_what_an_opaque_module_shares_with_a_traced_one_is_state(tmp_path: Path) -> None:
    path = save(Sharing().eval(), tmp_path / "fast.pabc")
    other = Sharing().eval()
    other.counter.calls = 7
    check_loads(path, other)
    other.scaled.config.scale = 0.5
    with pytest.raises(ArtifactError, match=r"config.scale: expected 1.0, found 0.5"):
        pabc.load(path, other)


PROGRAM = """
import sys
from saved_states import *
from pathlib import Path
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
            timeout=900,
        )
