"""The nodes for ComfyUI beside their runs: what they show, refuse, and how they are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import accelerate, acceleration_of
from small_host import SmallHost

from pabc import __main__ as command_line
from pabc.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from pabc.comfyui.calls import CallNames
from pabc.comfyui.install import FOLDER
from pabc.comfyui.picture import COMPUTED, NEITHER, SKIPPED
from pabc.comfyui.sigmas import Sigmas

host = SmallHost()
explain = NODE_CLASS_MAPPINGS["PabcExplain"]().explain


# ---- what is shown ----


def test_the_plan_as_a_picture_and_a_table() -> None:
    fast = accelerate(host.make())
    image, table = explain(fast)
    assert table == "no sampler has run with this model yet"
    assert image.shape == (1, 48, 24, 3) and torch.equal(image[0, 0, 0], torch.tensor(NEITHER))
    host.sample(fast, "dpm_2", steps=6)
    image, table = explain(fast)
    assert image.shape == (1, 48, 6 * 26 - 2, 3) and image.dtype == torch.float32
    lines = table.splitlines()
    assert lines[0] == "schedule: skip 3 of 6 model linear"
    assert lines[1] == "11 calls of the model in 6 steps, 6 of them skipped, 2.20 times fewer"
    mask = acceleration_of(fast).report.schedule.mask("model")
    for step, is_skipped in enumerate(mask):
        color = torch.tensor(SKIPPED if is_skipped else COMPUTED)
        assert torch.equal(image[0, 0, 26 * step], color)
        assert lines[3 + step].split()[-1] == str(2 * is_skipped)


def test_a_run_that_was_recorded_says_so() -> None:
    fast = accelerate(host.make(), rule="auto")
    host.sample(fast, steps=12)
    _, table = explain(fast)
    assert "this run was computed in full" in table and "computes" in table.splitlines()[0]


def test_the_inputs_of_the_nodes() -> None:
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert set(NODE_DISPLAY_NAME_MAPPINGS.values()) == {"Accelerate (pabc)", "Explain (pabc)"}
    for kind in NODE_CLASS_MAPPINGS.values():
        inputs = kind.INPUT_TYPES()
        assert "MODEL" in inputs["required"]["model"]
        assert callable(getattr(kind(), kind.FUNCTION))
        assert len(kind.RETURN_TYPES) >= 1 and kind.CATEGORY
    changed = NODE_CLASS_MAPPINGS["PabcExplain"].IS_CHANGED()
    assert changed != changed, "it is run each time"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speedup": 0.5}, "speedup: expected 1 to 4, found 0.5"),
        ({"speedup": 5.0}, "speedup: expected 1 to 4, found 5.0"),
        ({"speedup": "2"}, "speedup: expected 1 to 4, found '2'"),
        ({"rule": "skip"}, "rule: expected one of auto, skip: linear, .*, found 'skip'"),
        ({"compile": "yes"}, "compile: expected one of no, inductor, eager, found 'yes'"),
    ],
)
def test_other_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(host.make(), **given)


def test_a_model_that_was_not_accelerated_is_not_explained() -> None:
    with pytest.raises(ValueError, match=r"model: expected what Accelerate \(pabc\) returns"):
        explain(host.make())


# ---- what is computed all the same ----


def test_conditions_that_change_weights_are_computed(caplog: pytest.LogCaptureFixture) -> None:
    patcher = host.make()
    positive = [{"context": host.context(1), "hooks": object()}]
    found = host.sample(accelerate(patcher), positive=positive)
    assert torch.equal(found, host.sample(patcher, positive=positive))
    assert "its conditions change the weights" in caplog.text


def test_a_control_that_ends_is_not_mixed_with_what_follows() -> None:
    """The outputs with it are dropped where the first call without it comes, which computes."""

    def control(sigma: torch.Tensor) -> dict[str, list[torch.Tensor]] | None:
        return {"output": [torch.full((1,), 0.5)]} if sigma > 0.5 else None

    patcher = host.make()
    positive = [{"context": host.context(1), "control": control}]
    fast = accelerate(patcher)
    host.sample(fast, positive=positive)
    stats = acceleration_of(fast)._model.stats
    assert dict(stats.fallbacks) == {"arguments": 1} or stats.fallbacks["arguments"] >= 1
    auto = accelerate(patcher, rule="auto")
    found = host.sample(auto, positive=positive)
    assert torch.equal(found, host.sample(patcher, positive=positive))
    assert "ControlNet" in acceleration_of(auto).report.left


def test_patches_take_part_and_tell_calls_apart() -> None:
    patcher = host.make()
    positive = [{"context": host.context(1), "patches": {"middle": [torch.sin]}}]
    fast = accelerate(patcher, 1.0)
    assert torch.equal(
        host.sample(fast, positive=positive), host.sample(patcher, positive=positive)
    )
    half = accelerate(patcher)
    assert not torch.equal(host.sample(half, positive=positive), host.sample(half))


def test_batches_that_are_split_at_one_step_are_not_mixed() -> None:
    """A call that comes in another batch than before finds nothing, and computes."""
    patcher = host.make()
    fast = accelerate(patcher, 4.0, "skip: hold")
    given = {"cfg": 3.0, "steps": 12}
    whole, apart = host.sample(fast, **given), host.sample(fast, **given, splits=True)
    assert (whole - apart).abs().max() < 1e-5


def test_an_interrupt_while_plans_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks for it after the sampler has returned; the next run is recorded anew."""

    class Interrupt(Exception):
        pass

    def throw() -> None:
        raise Interrupt

    patcher = host.make()
    fast = accelerate(patcher, rule="auto")
    plain = host.sample(patcher)
    with monkeypatch.context() as patch:
        management = SimpleNamespace(throw_exception_if_processing_interrupted=throw)
        patch.setitem(sys.modules, "comfy.model_management", management)
        with pytest.raises(Interrupt):
            host.sample(fast)
    model = acceleration_of(fast)._model
    assert model.stats.recorded == 0 and model.stats.nbytes == 0
    assert torch.equal(host.sample(fast), plain)
    assert model.stats.recorded == 1


# ---- steps and names ----


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_the_step_of_a_call(sign: int) -> None:
    sigmas = Sigmas([sign * level for level in (1.0, 2.0, 4.0, 8.0)])
    for level, step in ((1.0, 0), (1.5, 0), (1.995, 1), (2.0, 1), (3.9, 1), (4.0, 2), (9.0, 2)):
        assert sigmas.step_of(sign * level) == step, level
    assert sigmas.step_of(0.0 if sign > 0 else -0.5) == 0


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.5, 0.5), (1.0, 0.5, 0.7)])
def test_lists_that_do_not_fall(levels: tuple[float, ...], caplog: Any) -> None:
    with pytest.raises(ValueError, match="sigmas: expected two or more that fall, or rise"):
        Sigmas(levels)


def test_the_names_of_calls() -> None:
    names = CallNames()

    def name(sides: list[int], identities: str, window: list[int] | None = None) -> str:
        options = {"cond_or_uncond": sides, "uuids": list(identities)}
        if window is not None:
            options["context_window"] = SimpleNamespace(index_list=window)
        return names.name(options)

    assert name([1, 0], "ab") == "uncond+cond"
    assert name([0], "b") == "cond"
    assert name([0, 0, 1], "cba") == "cond 1+cond+uncond"
    assert name([2], "d") == "cond[2]"
    assert name([0], "b", [0, 1]) == "cond of frames 0,1"
    assert CallNames().name({"cond_or_uncond": [0]}) == "cond"


# ---- installation ----


def test_the_nodes_are_installed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "custom_nodes").mkdir()
    target = tmp_path / "custom_nodes" / FOLDER
    assert command_line.main(["comfyui", "install", str(tmp_path)]) == 0
    assert str(target) in capsys.readouterr().out
    spec = importlib.util.spec_from_file_location("as_the_host_does", target / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert refused("install", tmp_path, capsys).endswith("`pabc comfyui uninstall` removes them\n")
    assert command_line.main(["comfyui", "uninstall", str(tmp_path)]) == 0
    assert not target.exists()
    assert "expected the folder of the nodes, found none" in refused("uninstall", tmp_path, capsys)


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere"
    assert "expected the folder of ComfyUI, found none" in refused("install", nowhere, capsys)
    assert "custom_nodes in it, found none" in refused("install", tmp_path, capsys)
    target = tmp_path / "custom_nodes" / FOLDER
    target.mkdir(parents=True)
    (target / "__init__.py").write_text("# a user's own")
    assert "found something else" in refused("uninstall", tmp_path, capsys)
    assert target.exists()


def refused(action: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as failure:
        command_line.main(["comfyui", action, str(folder)])
    assert failure.value.code == 2
    return capsys.readouterr().err


def test_pabc_does_not_import_the_nodes_nor_the_nodes_comfyui() -> None:
    code = (
        "import sys, pabc, pabc.__main__\n"
        "assert 'pabc.comfyui' not in sys.modules\n"
        "import pabc.comfyui\n"
        "assert not any(name.partition('.')[0] == 'comfy' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
