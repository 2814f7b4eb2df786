"""Compiled code in artifacts: a second process runs it without a compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import NUM_STEPS, SCHEDULE
from models import CASES, Experts
from reading import Plain, generate, make, make_calls
from torch import nn

import pabc
from pabc.artifact.code import compile_code, load_code, used_inputs

pytestmark = [pytest.mark.runtime, pytest.mark.slow]
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
for found in (expected["loaded"], expected["compiled"]):
    assert max((a - b).abs().max() for a, b in zip(results, found)) < 1e-5
assert stats.captures == stats.compiles == 0 and stats.reused == expected["reused"], stats
assert not any(name.startswith("torch._inductor.codegen") for name in sys.modules)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.5)
assert not torch.equal(generate(loaded, calls)[0], results[0])
assert loaded.stats.compiles == 0
print("done")
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    model = CASE.model()
    calls = [CASE.call(step) for step in range(NUM_STEPS)]
    fast = pabc.compile(model, SCHEDULE)
    expected = {"compiled": generate(fast, calls), "reused": fast.stats.reused}
    fast.save(tmp_path / "fast.pabc")
    expected["loaded"] = generate(pabc.load(tmp_path / "fast.pabc", model), calls)
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", SECOND, str(tmp_path / "fast.pabc")]
    command.append(str(tmp_path / "expected.pt"))
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    again = pabc.load(tmp_path / "fast.pabc", model)
    again.save(tmp_path / "again.pabc")  # what was loaded is not compiled again
    assert (tmp_path / "again.pabc").read_bytes() == (tmp_path / "fast.pabc").read_bytes()


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


def test_results_that_share_memory() -> None:
    example = torch.randn(4, 4), torch.randn(3, 4), torch.randn(2, 3), torch.randn(2)
    program = torch.export.export(Odd(), example).run_decompositions({})
    gm = torch.fx.GraphModule(program.graph_module, program.graph)
    assert used_inputs(gm) == [0, 1, 2]
    run = load_code(compile_code(gm), used_inputs(gm), torch.device("cpu"))
    other = [torch.randn_like(x) for x in example]
    results = run([*other])
    del run
    for found, expected in zip(results, Odd()(*other), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
