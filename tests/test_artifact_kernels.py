"""Code that calls kernels, ahead of time: a second process runs it that has imported none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowered_norms import CUT, LATENTS, ROWS, TEXT, X, lower, norms, plain

from pabc.artifact.code import compile_code, used_inputs

pytestmark = [pytest.mark.kernels, pytest.mark.slow]
SECOND = """
import sys, torch
from pathlib import Path
from pabc.artifact.code import load_code

used, inputs, expected = torch.load(sys.argv[2])
assert not {"pabc.kernels.residual_norm", "pabc.kernels.joint_norm"} & set(sys.modules)
run = load_code(Path(sys.argv[1]).read_bytes(), used, torch.device("cpu"))
for found, each in zip(run(inputs), expected, strict=True):
    torch.testing.assert_close(found, each, atol=1e-6, rtol=1e-5)
"""


def norm_and_sum(x, cut, m):
    y = x + m.gate * cut
    return plain(y) * (1 + m.scale), plain(x), y


@pytest.mark.parametrize(
    ("function", "inputs"), [(norm_and_sum, [X, CUT]), (norms, [TEXT, LATENTS])]
)
def test_a_second_process_runs_it(function, inputs, tmp_path):
    lowered, run = lower(function, *inputs)
    code, values = tmp_path / "code", tmp_path / "values"
    code.write_bytes(compile_code(lowered))
    torch.save((used_inputs(lowered), [*inputs, *ROWS], [*run()[1]]), values)
    command = [sys.executable, "-c", SECOND, str(code), str(values)]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
