"""Code that calls kernels: a second process runs it that has imported none."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowered_norms import CUT, LATENTS, ROWS, TEXT, X, lower, norms, plain

from pabc.artifact.listings import reduce_listing
from pabc.artifact.packages import compile_package
from pabc.passes import compile_blocks

pytestmark = pytest.mark.kernels
SECOND = """
import pickle, sys, torch
from pathlib import Path
from pabc.artifact.{form}s import load_{form}

portable = pickle.loads(Path(sys.argv[1]).read_bytes())
inputs, expected = torch.load(sys.argv[2])
assert not {{"pabc.kernels.residual_norm", "pabc.kernels.joint_norm"}} & set(sys.modules)
block = load_{form}(portable{device})
for found, each in zip(block.run(inputs), expected, strict=True):
    torch.testing.assert_close(found, each, atol=1e-6, rtol=1e-5)
"""


def norm_and_sum(x, cut, m):
    y = x + m.gate * cut
    return plain(y) * (1 + m.scale), plain(x), y


@pytest.mark.parametrize("form", ["listing", "package"])
@pytest.mark.parametrize(
    ("function", "inputs"), [(norm_and_sum, [X, CUT]), (norms, [TEXT, LATENTS])]
)
def test_a_second_process_runs_it(function, inputs, form, tmp_path):
    lowered, run = lower(function, *inputs)
    code, values = tmp_path / "code", tmp_path / "values"
    if form == "package":
        portable = compile_package(lowered)
    else:
        portable = reduce_listing(compile_blocks([lowered])[0].portable)
    code.write_bytes(pickle.dumps(portable))
    torch.save(([*inputs, *ROWS], [*run()[1]]), values)
    device = ', torch.device("cpu")' if form == "package" else ""
    program = SECOND.format(form=form, device=device)
    command = [sys.executable, "-c", program, str(code), str(values)]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
