"""Compiled code in artifacts: a second process runs it without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import NUM_STEPS, SCHEDULE
from models import CASES, Branch, Experts
from reading import Plain, generate, make, make_calls
from torch import nn

import pabc
from pabc.artifact.listings import load_listing, reduce_listing
from pabc.artifact.packages import compile_package, load_package, used_inputs
from pabc.passes import compile_blocks

pytestmark = pytest.mark.runtime
CASE = next(case for case in CASES if case.name == "Packed")

SECOND = """
import sys
sys.path.insert(0, "tests")
import pickle, subprocess, torch
import pabc
from artifacts import BY_NAME, NUM_STEPS
from reading import generate

def refuse(*_, **__):
    raise AssertionError("compiled, or unpickled, in the second process")

model = BY_NAME["Packed"].model()
calls = [BY_NAME["Packed"].call(step) for step in range(NUM_STEPS)]
expected = torch.load(sys.argv[2])
torch.set_num_threads(2)
pickle.load = pickle.loads = torch.load = subprocess.Popen = refuse
loaded = pabc.load(sys.argv[1], model)
results = generate(loaded, calls)
stats = loaded.stats
assert max((a - b).abs().max() for a, b in zip(results, expected["compiled"])) < 1e-5
assert stats.captures == stats.compiles == 0 and stats.reused == expected["reused"], stats
assert not any(name.startswith("torch._inductor.codegen") for name in sys.modules)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.5)
assert not torch.equal(generate(loaded, calls)[0], results[0])
assert loaded.stats.compiles == 0
print("done")
"""


@dataclass
class Run:
    """A compiled model after a generation; Inductor's files are gone."""

    fast: pabc.CompiledModel
    calls: list[Any]
    results: list[Any]

    @property
    def model(self) -> nn.Module:
        return self.fast._orig_mod


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    cache = tmp_path_factory.mktemp("inductor")
    calls = [CASE.call(step) for step in range(NUM_STEPS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        fast = pabc.compile(CASE.model(), SCHEDULE)
        results = generate(fast, calls)
    shutil.rmtree(cache)
    return Run(fast, calls, results)


def refuse_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    for name in ("compile_fx", "compile_fx_inner", "compile_fx_aot"):
        monkeypatch.setattr(torch._inductor.compile_fx, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(pabc.runtime.phases, "lower_phase", refuse)


def test_what_ran_is_saved_without_a_compiler(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_compile(monkeypatch)
    run.fast.save(tmp_path / "fast.pabc")
    loaded = pabc.load(tmp_path / "fast.pabc", run.model)
    assert all(map(torch.equal, generate(loaded, run.calls), run.results))
    assert loaded.stats.captures == loaded.stats.compiles == 0
    loaded.save(tmp_path / "again.pabc")
    assert (tmp_path / "again.pabc").read_bytes() == (tmp_path / "fast.pabc").read_bytes()


def test_a_second_process_compiles_nothing(run: Run, tmp_path: Path) -> None:
    run.fast.save(tmp_path / "fast.pabc")
    expected = {"compiled": run.results, "reused": run.fast.stats.reused}
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", SECOND, str(tmp_path / "fast.pabc")]
    command.append(str(tmp_path / "expected.pt"))
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_phases_that_did_not_run_are_compiled_to_be_saved(tmp_path: Path) -> None:
    model, calls = make(Plain, Branch()), make_calls(NUM_STEPS)
    fast = pabc.compile(model, SCHEDULE)
    generate(fast, calls[:1])
    fast.save(tmp_path / "fast.pabc")
    loaded, compiles = pabc.load(tmp_path / "fast.pabc", model), fast.stats.compiles
    results = generate(loaded, calls)
    assert compiles > 1 and loaded.stats.compiles == 0
    fast.reset()
    assert all(map(torch.equal, generate(fast, calls), results))
    assert fast.stats.compiles == compiles  # they serve this process, too


def test_code_that_is_not_at_hand_is_compiled_for_the_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = [block for phase in run.fast._last[0].phases.compiled for block in phase.code]
    monkeypatch.setattr(code[0], "portable", None)
    with caplog.at_level("INFO", "pabc"):
        run.fast.save(tmp_path / "fast.pabc")
    assert [r.message for r in caplog.records if "compiled a block for a file" in r.message]
    loaded = pabc.load(tmp_path / "fast.pabc", run.model)
    for a, b in zip(generate(loaded, run.calls), run.results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert loaded.stats.compiles == 0


def test_phases_that_call_modules_are_compiled_by_who_loads_them(tmp_path: Path) -> None:
    model, calls = make(Plain, Experts()), make_calls(NUM_STEPS)
    schedule = pabc.Schedule.none(range(NUM_STEPS))
    results = generate(pabc.compile(model, schedule, backend="eager"), calls)
    pabc.compile(model, schedule, example_inputs=((), calls[0])).save(tmp_path / "fast.pabc")
    torch.manual_seed(9)
    other = make(Plain, Experts())  # its modules, and not those of the model that was saved
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = pabc.load(tmp_path / "fast.pabc", other)
    for a, b in zip(generate(loaded, calls), results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (loaded.stats.captures, loaded.stats.compiles) == (0, 1)


class Odd(nn.Module):
    """Results that are inputs, views of them, of one another, or the same twice."""

    def forward(self, w: Any, x: Any, y: Any, unused: Any) -> Any:
        z = torch.relu(x @ w) + 1
        return z, x.clone(), z, y.transpose(0, 1), z[1:], w.view(-1)


@pytest.mark.parametrize("form", ["listing", "package"])
def test_results_that_share_memory(form: str) -> None:
    example = torch.randn(4, 4), torch.randn(3, 4), torch.randn(2, 3), torch.randn(2)
    program = torch.export.export(Odd(), example).run_decompositions({})
    gm = torch.fx.GraphModule(program.graph_module, program.graph)
    assert used_inputs(gm) == (0, 1, 2)
    if form == "package":
        block = load_package(compile_package(gm), torch.device("cpu"))
    else:
        (made,) = compile_blocks([gm])
        block = load_listing(reduce_listing(made.portable))
    other = [torch.randn_like(x) for x in example]
    results = block.run([*other])
    del block
    for found, expected in zip(results, Odd()(*other), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
