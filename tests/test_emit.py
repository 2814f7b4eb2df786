"""Compiling blocks with Inductor."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from pabc.passes import compile_blocks


@pytest.mark.usefixtures("process_group")
def test_compiled_code_computes_while_a_collective_is_under_way():
    """Left to itself, Inductor waits for it at once."""
    group = torch.distributed.group.WORLD.group_name

    def send(x, first, second):
        op = torch.ops._c10d_functional
        sent = op.all_to_all_single(x @ first, [4], [4], group)
        meanwhile = x @ second
        return [op.wait_tensor(sent) * meanwhile]

    inputs = [torch.randn(4, 4) for _ in range(3)]
    block = make_fx(send, tracing_mode="fake")(*inputs)
    (found,), (code,) = run_and_get_code(lambda: compile_blocks([block])[0].run([*inputs]))
    torch.testing.assert_close(found, (inputs[0] @ inputs[1]) * (inputs[0] @ inputs[2]))
    calls = re.findall(r"(all_to_all_single|wait_tensor)\.default\(|(mm)\(", code)
    assert [a or b for a, b in calls] == ["mm", "all_to_all_single", "mm", "wait_tensor"], code
