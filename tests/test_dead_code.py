"""Dead code: the nodes that no output depends on."""

import random

import pytest
from models import CASES, Case
from stages import run_to

from pabc.passes.dead_code import dead_without
from pabc.passes.ir import output_node


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_dead_without_is_what_no_path_from_the_output_reaches(case: Case, captured):
    graph = run_to(captured(case)[1], "canonicalize").graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    rng = random.Random(0)
    for cuts in (rng.sample(calls, k) for k in (1, 1, 2, 5)):
        live, stack = set(), [output_node(graph)]
        while stack:
            node = stack.pop()
            if node not in live and node not in cuts:
                live.add(node)
                stack.extend(node.all_input_nodes)
        kept = ("placeholder", "output")
        expected = {n for n in graph.nodes if n not in live and n.op not in kept}
        assert dead_without(cuts) == expected | set(cuts)
