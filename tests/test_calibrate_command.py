"""`pabc calibrate`: a demo's model, a folder of a pipeline, and what a user names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pabc
from pabc import __main__ as cli

pytestmark = pytest.mark.runtime

MINE = """
from denoising import Denoiser, sample


def make():
    return sample, Denoiser().eval()


def wrong():
    return Denoiser()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run_failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", *argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_callable_of_a_user(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calls", "8", "10", "--seeds", "0", "1", "--floor", "1", "--candidates", "2"]
    files = ["--out", "found.npz", "--plot", "plot.svg", "--resume", "notes.npz"]
    assert cli.main(["calibrate", "mine:make", *options, *files, "--verify", "9"]) == 0
    printed = capsys.readouterr()
    found = pabc.Calibration.load("found.npz")
    assert [str(target) for target, _ in found.plans] == ["calls=8", "calls=10"]
    assert str(found) in printed.out
    for number in (8, 10):
        assert printed.out.count(f"calibrated: {number} of 16 steps") == 1
    assert Path("plot.svg").exists() and Path("notes.npz").exists()
    assert "generation" in printed.err
    assert cli.main(["calibrate", "mine:make", *options, *files, "--quiet"]) == 0
    again = capsys.readouterr()
    assert str(found) in again.out and not again.err


def test_a_model_of_the_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    options = ["--steps", "6", "--calls", "4", "--candidates", "1", "--floor", "1", "--quiet"]
    assert cli.main(["calibrate", "--demo", "digits", *options]) == 0
    assert pabc.Calibration.load("calibration.npz").num_steps == 6
    assert "written: calibration.npz" in capsys.readouterr().out


def test_a_folder_of_a_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    from pipelines import call_latte, make_latte

    seen: list[Any] = []

    class Saved:
        """The pipeline as it would come from a folder, but for its text encoder."""

        def __init__(self) -> None:
            vars(self)["pipe"] = make_latte()

        @classmethod
        def from_pretrained(cls, folder: str, **options: Any) -> Saved:
            seen.append((folder, options))
            return cls()

        def to(self, device: str) -> Saved:
            return self

        def __call__(self, prompt: str, **given: Any) -> Any:
            seen.append(prompt)
            return self.pipe(**{**call_latte(1, 1), "latents": None, **given})

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["pipe"], name)

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Saved)
    options = ["--steps", "8", "--guidance", "3", "--calls", "5", "--floor", "1", "--quiet"]
    given = ["--pipeline", "here", "--prompt", "a", "--prompt", "b", "--dtype", "float32"]
    assert cli.main(["calibrate", *given, *options, "--seeds", "1", "--candidates", "1"]) == 0
    assert seen == [("here", {"torch_dtype": torch.float32}), "b", "b"]
    assert pabc.Calibration.load("calibration.npz").num_steps == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments"),
        (["mine:make", "--demo", "digits"], "not allowed with argument"),
        (["mine:wrong"], "mine:wrong: expected a tuple (sample, model), found Denoiser"),
        (["mine:nothing"], "mine has no nothing"),
        (["mine:make", "--speedup", "0.5"], "speedup: expected a number of 1 or more, found 0.5"),
        (["mine:make", "--calls", "0"], "--calls: expected an integer of 1 or more, found '0'"),
        (["--pipeline", "nowhere"], "--prompt: expected one or more with --pipeline, found none"),
        (["--pipeline", "nowhere", "--prompt", "x"], "--pipeline nowhere: "),
    ],
)
def test_bad_options_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in run_failing(capsys, *argv)
