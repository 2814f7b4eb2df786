"""Residual adds: a stream, and a branch that reads it through a product."""

from graphs import trace
from models import OneBranch
from stages import capture_call, run_to

from pabc.passes.ir import Reach, aten, output_node, user_inputs
from pabc.passes.residuals import find_exits, find_residuals


def test_a_branch_added_to_the_stream_that_it_reads_is_a_residual():
    graph = run_to(capture_call(OneBranch(), OneBranch.call()), "canonicalize").graph
    reach = Reach(graph)
    (residual,) = find_residuals(graph, reach)
    assert residual.stream is user_inputs(graph)[0]
    assert residual.add is output_node(graph).args[0][0]
    assert residual.branch.target is aten.mul.Tensor and residual.later is None
    attend = aten.scaled_dot_product_attention.default
    (attention,) = graph.find_nodes(op="call_function", target=attend)
    assert find_exits(reach, [residual], attention) == [residual]


def test_a_sum_without_a_product_or_of_two_inputs_is_no_residual():
    x, y = OneBranch.call()["x"], OneBranch.call()["x"]
    for function in (lambda x, y: x + x.sin(), lambda x, y: x + y, lambda x, y: x + y @ y.mT @ y):
        graph = trace(function, x, y).graph
        assert find_residuals(graph, Reach(graph)) == []
