"""The command line: help, version, explain, and what is said about bad values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pabc
from pabc import __main__ as cli

MODELS = '''
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """An image DiT in small: patches to tokens, two blocks, and back."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(4, 8, 2, stride=2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 16)

    def forward(self, x, timestep, flag=False):
        h = self.embed(x)
        y = h.flatten(2).transpose(1, 2) + timestep[:, None, None] * 1e-3
        for block in self.blocks:
            y = block(y)
        patches = self.head(y).unflatten(1, h.shape[2:]).unflatten(-1, (2, 2, 4))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def tiny():
    return Tiny().eval(), (torch.zeros(1, 4, 8, 8), torch.zeros(1)), {}


def without_data():
    with torch.device("meta"):
        return tiny()


def choosy(size):
    return Tiny()


def wrong():
    return 3


model = Tiny()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return tmp_path


def run_failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_without_arguments_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "explain" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"pabc {pabc.__version__}\n"


def test_explain_a_model_with_its_arguments(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "some_models:tiny"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 attentions, 2 regions; latents: x")
    assert printed.count("  full  ") == 2


def test_explain_what_ranks_that_are_not_there_would_send(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two blocks of one head: 4 all-to-alls each, and the gather of the output."""
    assert cli.main(["explain", "some_models:tiny", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "ranks: 2, x[2] among 2; each sends 9 x" in printed
    assert "  full: all_to_all 8 x" in printed
    assert "  outside of regions: all_gather 1 x" in printed


def test_explain_a_model_on_the_meta_device(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large model needs no memory to be explained, and the table is the same."""
    assert cli.main(["explain", "some_models:tiny"]) == 0
    with_data = capsys.readouterr().out
    assert cli.main(["explain", "some_models:without_data"]) == 0
    assert capsys.readouterr().out == with_data


def test_explain_a_model_with_given_inputs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--input", "x=[1,4,8,8]", "--input", "timestep=[1]:int64", "--input", "flag=True"]
    options = ["--kinds", "blocks.1*=other", "--latents", "x", "--cut", "branch"]
    assert cli.main(["explain", "some_models:Tiny", *inputs, *options]) == 0
    printed = capsys.readouterr()
    assert "blocks.1" in printed.out
    assert "other" in printed.out
    assert "explained in eval mode" in printed.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_models", "expected module:callable, found 'some_models'"),
        ("no_such_models:tiny", "cannot import no_such_models"),
        ("some_models:nothing", "some_models has no nothing"),
        ("some_models:model", "expected a callable, found Tiny"),
        (
            "some_models:wrong",
            r"expected a torch.nn.Module, or a tuple (model, args, kwargs), found int",
        ),
        ("some_models:choosy", "cannot be called without arguments: missing a required argument"),
        ("some_models:Tiny", "returned a model without inputs"),
    ],
)
def test_bad_targets_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    assert message in run_failing(capsys, "explain", target)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "x=[1,4,8,8]"], "does not take these inputs"),
        (["--input", "x=[1,"], "expected a shape such as"),
        (["--input", "x=[1]:float7"], "and a torch dtype"),
        (["--input", "x"], "expected NAME=VALUE, found 'x'"),
        (["--kinds", "blocks.*=spatiall"], "with KIND one of spatial, temporal"),
        (["--kinds", "blocks.*=block"], "cross, mlp, other, found 'blocks.*=block'"),
        (["--cut", "middle"], "choose from"),
        (["--ranks", "2x"], "expected N or BxN, such as 4 or 2x4, found '2x'"),
        (["--ranks", "0"], "expected N or BxN, such as 4 or 2x4, found '0'"),
    ],
)
def test_bad_explain_options_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in run_failing(capsys, "explain", "some_models:Tiny", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "1"], "--steps: expected an integer of 2 or more, found '1'"),
        (["--steps", "many"], "--steps: expected an integer of 2 or more, found 'many'"),
        (["--prompts", "0"], "--prompts: expected 1 or more, or captions, found 0"),
        (["--device", "toaster"], "--device: expected a device of this machine, cpu"),
        (["--backend", "oracle"], "choose from"),
        (["--repeats", "0"], "--repeats: expected an integer of 1 or more, found '0'"),
        (["--mesh", "2x2"], "--mesh: expected 4 processes, started by `torchrun --nproc-per-node"),
        (["--mesh", "1x2x3"], "--mesh: expected N or BxN, such as 4 or 2x4, found '1x2x3'"),
    ],
)
def test_bad_demo_options_are_named(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in run_failing(capsys, "demo", *argv)


def test_unknown_words_and_missing_weights_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latte = pytest.importorskip("pabc.demo.latte")
    message = run_failing(
        capsys, "demo", "--weights", str(tmp_path), "--out", str(tmp_path / "out")
    )
    assert "weights: expected transformer/config.json" in message and "found none" in message
    torch.manual_seed(0)
    latte.build().save(tmp_path)
    assert "found ['purple']" in run_failing(
        capsys, "demo", "--weights", str(tmp_path), "--prompts", "a purple seven moving left"
    )


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "needs tqdm: pip install 'pabc[demo]'" in run_failing(capsys, "demo")


def test_module_runs_without_the_extra() -> None:
    code = "import sys; sys.modules['diffusers'] = sys.modules['tqdm'] = None; import runpy;"
    code += "sys.argv = ['pabc']; runpy.run_module('pabc', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: pabc" in done.stdout
