"""Compiled models that are saved and loaded again: in this process, without a compiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import BY_NAME, NUM_STEPS, SCHEDULE, STEPS, saved
from models import WIDTH, Branch, Experts, Image, Mlp
from reading import OnTheHour, Plain, TextLengths, generate, make, make_calls, text_and_mask
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pabc
from pabc import ArtifactError
from pabc.artifact import compatibility
from pabc.artifact.container import read_container, write_container

pytestmark = pytest.mark.runtime
OTHER = pabc.Schedule.pyramid(STEPS, full=4, spatial=4, temporal=2, cross=2, joint=4)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("recaptured")


@pytest.mark.parametrize("name", ["Factorized", "JointImage", "Refined", "ClassImage"])
def test_a_loaded_model_gives_the_same_bits(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    case = BY_NAME[name]
    calls = [case.call(step) for step in range(NUM_STEPS)]
    fast = saved(case.model(), calls, tmp_path / "fast.pabc")
    monkeypatch.setattr(pabc.runtime.program, "analyze", never)
    loaded = pabc.load(tmp_path / "fast.pabc", case.model())
    assert all(map(torch.equal, generate(loaded, calls), generate(fast, calls)))
    assert loaded.stats.captures == 0 and loaded.stats.reused > 0
    assert str(loaded.explain()) == str(fast.explain())
    assert loaded.plan == fast.plan and loaded.schedule == fast.schedule
    fast.schedule = loaded.schedule = OTHER
    assert all(map(torch.equal, generate(loaded, calls), generate(fast, calls)))
    assert str(loaded.explain()) == str(fast.explain())


def test_a_loaded_model_follows_the_weights_of_the_model_given(tmp_path: Path) -> None:
    case = BY_NAME["Factorized"]
    calls = [case.call(step) for step in range(NUM_STEPS)]
    saved(case.model(), calls, tmp_path / "fast.pabc")
    other = case.model(seed=1)
    loaded = pabc.load(tmp_path / "fast.pabc", other)
    expected = pabc.compile(other, SCHEDULE, backend="eager")
    assert all(map(torch.equal, generate(loaded, calls), generate(expected, calls)))
    loaded.load_state_dict(case.model().state_dict())
    assert all(map(torch.equal, generate(loaded, calls), generate(expected, calls)))


def test_calls_of_another_form_are_captured(tmp_path: Path) -> None:
    case = BY_NAME["Factorized"]
    calls = [case.call(step) for step in range(NUM_STEPS)]
    saved(case.model(), calls, tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", case.model())
    other = {name: torch.cat([x, x]) for name, x in calls[0].items()}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**other)[:2], loaded._orig_mod(**calls[0]))
    assert loaded.stats.captures == 1
    loaded.save(tmp_path / "both.pabc")
    both = pabc.load(tmp_path / "both.pabc", case.model())
    generate(both, [other, *calls])
    assert both.stats.captures == 0


def test_reads_and_modules_outside_are_saved(tmp_path: Path) -> None:
    for kind, blocks, others in (
        (TextLengths, (Branch(),), text_and_mask(3, 5)),
        (OnTheHour, (Branch(),), {}),
        (Plain, (Branch(), Experts()), {}),
    ):
        model, calls = make(kind, *blocks), make_calls(**others)
        fast = saved(model, calls, tmp_path / "fast.pabc")
        loaded = pabc.load(tmp_path / "fast.pabc", model)
        assert all(map(torch.equal, generate(loaded, calls), generate(fast, calls)))
        assert loaded.stats.captures == 0
        assert str(loaded.explain()) == str(fast.explain())


class WithNumber(Image):
    def forward(self, x_BCHW: Any, t: float, text_BLD: Any = None) -> Any:
        return {"sample": super().forward(x_BCHW, torch.full((2,), t), text_BLD), "kind": "image"}


def test_numbers_that_became_inputs_stay_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithNumber(Branch(), Mlp()).eval()
    x, text = torch.randn(2, 3, 4, 4), torch.randn(2, 5, WIDTH)
    calls = [{"x_BCHW": x, "t": 0.9 - 0.2 * step, "text_BLD": text} for step in range(NUM_STEPS)]
    fast = saved(model, calls, tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", model)
    fast.reset()
    for a, b in zip(generate(loaded, calls), generate(fast, calls), strict=True):
        assert torch.equal(a["sample"], b["sample"]) and a["kind"] == b["kind"]
    assert loaded.stats.captures == 0


class Mode(Enum):
    FAST = 1


class WithSetting(Image):
    def forward(self, x_BCHW: Any, t_B: Any, text_BLD: Any = None, mode: Any = None) -> Any:
        return super().forward(x_BCHW, t_B, text_BLD)


@pytest.mark.parametrize("mode", [Mode.FAST, "fast", torch.float16, None, 2.5])
def test_settings_among_the_arguments(mode: Any, tmp_path: Path) -> None:
    model = WithSetting(Branch()).eval()
    calls = [{**call, "mode": mode} for call in make_calls(NUM_STEPS)]
    saved(model, calls, tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", model)
    generate(loaded, calls)
    assert loaded.stats.captures == 0


@pytest.mark.usefixtures("process_group")
def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = WithSetting(Branch()).eval()
    path = tmp_path / "fast.pabc"
    with pytest.raises(ArtifactError, match=r"arguments: expected data .* found a function"):
        saved(model, [{**call, "mode": generate} for call in make_calls(NUM_STEPS)], path)
    case = BY_NAME["Factorized"]
    with pytest.raises(ArtifactError, match=r"dynamic: expected False .*found True"):
        saved(case.model(), [case.call()], path, dynamic=True)
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ArtifactError, match="mesh: expected None"):
        saved(case.model(), [case.call()], path, mesh=mesh)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="nothing is captured yet"):
        pabc.compile(model, SCHEDULE).save(path)


def test_graphs_that_no_longer_fit_the_model_are_not_saved(tmp_path: Path) -> None:
    case = BY_NAME["Packed"]
    model = case.model()
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=((), case.call()))
    model.double()
    with pytest.raises(ArtifactError, match="expected the model as it was captured, found"):
        fast.save(tmp_path / "fast.pabc")
    call = {name: x.double() for name, x in case.call().items()}
    generate(fast, [call])
    fast.save(tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", model)
    assert torch.equal(generate(loaded, [call])[0], generate(fast, [call])[0])
    assert loaded.stats.captures == 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: Any) -> Path:
    case = BY_NAME["Packed"]
    path = tmp_path_factory.mktemp("artifact") / "fast.pabc"
    saved(case.model(), [case.call()], path)
    return path


def change(path: Path, new: Path, edit: Callable[[Any], None]) -> Path:
    """A copy with another manifest, and the right checksum."""
    members = read_container(path)
    manifest = json.loads(members["manifest.json"])
    edit(manifest)
    write_container(new, {**members, "manifest.json": json.dumps(manifest).encode()})
    return new


@pytest.mark.parametrize("name", ["pabc", "python", "torch", "triton", "system"])
def test_other_versions_are_refused(name: str, artifact: Path, tmp_path: Path) -> None:
    def edit(manifest: Any) -> None:
        manifest["versions"][name] = "0.0.1"

    path = change(artifact, tmp_path / "old.pabc", edit)
    found = compatibility.describe_versions()[name]
    message = f"old.pabc: versions: {name}: expected 0.0.1, found"
    with pytest.raises(ArtifactError, match=f"{message} {found}".replace("+", "[+]")):
        pabc.load(path, BY_NAME["Packed"].model())


def test_other_hardware_is_refused(artifact: Path, tmp_path: Path) -> None:
    def edit(manifest: Any) -> None:
        manifest["hardware"]["CPU capability"] = "AVX9000"

    path = change(artifact, tmp_path / "other.pabc", edit)
    with pytest.raises(ArtifactError, match="hardware: CPU capability: expected AVX9000"):
        pabc.load(path, BY_NAME["Packed"].model())


def test_a_cpu_that_can_do_more_is_taken(artifact: Path, tmp_path: Path) -> None:
    def fewer(manifest: Any) -> None:
        manifest["hardware"]["CPU flags"] = ""

    def more(manifest: Any) -> None:
        manifest["hardware"]["CPU flags"] += " avx9000"

    model = BY_NAME["Packed"].model()
    pabc.load(change(artifact, tmp_path / "fewer.pabc", fewer), model)
    with pytest.raises(ArtifactError, match="CPU flags"):
        pabc.load(change(artifact, tmp_path / "more.pabc", more), model)


def wider(model: nn.Module) -> None:
    model.head = nn.Linear(WIDTH, 24)


def half(model: nn.Module) -> None:
    model.half()


def another_setting(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).eps = 0.5


def tied(model: nn.Module) -> None:
    first, second = [m for m in model.modules() if isinstance(m, nn.Linear)][:2]
    second.bias = first.bias


class OtherNorm(nn.LayerNorm):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + 1


def another_class(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).__class__ = OtherNorm


@pytest.mark.parametrize("edit", [wider, half, another_setting, tied, another_class])
def test_another_model_is_refused(edit: Callable[[nn.Module], None], artifact: Path) -> None:
    model = BY_NAME["Packed"].model()
    edit(model)
    with pytest.raises(ArtifactError, match=r"model: .*: expected .*, found "):
        pabc.load(artifact, model)


def test_an_edit_of_a_forward_is_noticed() -> None:
    source = "from torch import nn\nSCALE = {}\ndef scale(x):\n    return x {} SCALE\n"
    source += "class Model(nn.Module):\n    def forward(self, x):  # {}\n        return scale(x)\n"
    digests = []
    for edit in ((2, "*", ""), (2, "*", "a comment"), (3, "*", ""), (2, "+", "")):
        room: dict[str, Any] = {"__name__": "__main__"}
        exec(source.format(*edit), room)
        digests.append(compatibility.describe_model(room["Model"]())["code of Model"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_video_model_is_no_image_model(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"and \d+ more"):
        pabc.load(artifact, BY_NAME["Factorized"].model())
