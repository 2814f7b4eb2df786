"""Compiling blocks with Inductor."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from pabc.passes import Listing, compile_blocks


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


def compile_pointwise(size):
    """Compiles a kernel for a tensor of so many elements; returns its code and an input."""
    x = torch.randn(size)
    return compile_blocks([make_fx(lambda x: [x.sin() * 2], tracing_mode="fake")(x)])[0], x


def test_kernels_run_on_as_many_threads_as_there_were(monkeypatch):
    """Their memory for partial sums has room for no more."""
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    block, x = compile_pointwise(1 << 20)
    torch.testing.assert_close(block.run([x])[0], x.sin() * 2)
    assert "omp parallel num_threads(3)" in block.portable.source


NOT_PORTABLE = {
    "a kernel for a GPU": "triton_0 = async_compile.triton('triton_0', '')",
    "a wrapper in C++": "entry = CppWrapperCodeCache.load_pybinding([], '')",
}


@pytest.mark.parametrize("line", NOT_PORTABLE.values(), ids=NOT_PORTABLE)
def test_code_that_a_listing_cannot_hold(line):
    source = "async_compile = AsyncCompile()\n{}\nasync_compile.wait(globals())\n"
    compiled = SimpleNamespace(current_callable=compile_blocks, constants={}, source_code=source)
    assert Listing.of(compiled) == Listing(source, {})
    compiled.source_code = source.format(line)
    assert Listing.of(compiled) is None
    compiled.source_code, compiled.constants = source, {"constant0": torch.ones(2)}
    assert Listing.of(compiled) is None
