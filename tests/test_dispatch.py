"""What a call does besides running its phase: counted, since time varies."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

BENCH = Path(__file__).parents[1] / "bench"
MOST_CALLS = 130
"""A steady call made 105 when this was written, list comprehensions among them."""


@pytest.fixture(scope="module")
def dispatch():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import dispatch
    return dispatch


def test_a_steady_call_runs_no_python_code_per_node_or_slot(dispatch):
    counts = []
    for depth in (1, 3):
        fast, call = dispatch.compile_recorded(depth)
        with torch.no_grad():
            counts.append(dispatch.count_calls(call, range(1, fast.plan.num_steps)))
    assert counts[0] == counts[1] <= MOST_CALLS
