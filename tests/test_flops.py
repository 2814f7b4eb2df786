"""FLOPs of a graph: products of two tensors, by PyTorch's formulas."""

from graphs import trace
from models import OneBranch
from stages import capture_call, run_to

from pabc.passes.flops import FlopCounter

BATCH, TOKENS, CHANNELS = OneBranch.call()["x"].shape
LINEAR = 2 * BATCH * TOKENS * CHANNELS * CHANNELS
ATTENTION = 2 * 2 * BATCH * TOKENS * TOKENS * CHANNELS
"""Of scores, and of values that they weigh: an addition and a multiplication each."""


def test_products_and_attention_count():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "canonicalize")
    assert FlopCounter()(gm) == 2 * LINEAR + ATTENTION


def test_called_graphs_do_not_count():
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "outline")
    assert FlopCounter()(gm) == 0
    assert FlopCounter()(gm.get_submodule("full_0")) == 2 * LINEAR + ATTENTION


def test_ops_on_single_elements_do_not_count():
    assert FlopCounter()(trace(lambda x: (x * x).sin() + x, OneBranch.call()["x"])) == 0
