"""Compiles a block ahead of time to a shared library, and loads such libraries.

AOTInductor compiles the same graph that Inductor compiles for the running process. The library
needs neither the graph nor Inductor, calls Python only for the ops of :mod:`pabc.kernels`, and
contains no weights: they are inputs.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.kernels import register_all
from pabc.passes import (
    CompiledBlock,
    copy_into,
    example_inputs,
    lowering_onednn,
    make_module,
    output_node,
    user_inputs,
)

_CALLS_KERNELS = b"pabc::"
"""Occurs in a package whose code calls kernels: it lists the ops' names as plain text."""
_ALIGNMENT = 16
"""The alignment in bytes that code for a GPU may assume of its inputs."""
_OPTIONS = {
    "aot_inductor.package": True,
    # For the wrapper, not the kernels: optimizing it doubles the compile time for no speedup.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp.dynamic_threads": True,  # the number of threads of the process that runs the code
}


def compile_code(block: GraphModule) -> bytes:
    """Compiles a block (:func:`split_blocks_pass`); returns the package for :func:`load_code`."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._inductor.package.package import package_aoti

    graph = _with_used_inputs(block)
    examples = example_inputs(block)
    inputs: list[Any] = [examples[i] for i in used_inputs(block)]
    with torch.no_grad(), lowering_onednn(), tempfile.TemporaryDirectory() as folder:
        outputs = compile_fx_aot(graph, inputs, config_patches=_OPTIONS)
        assert isinstance(outputs, list)
        files = [file for file in outputs if not str(file).endswith(".cpp")]
        path = Path(folder) / "phase.pt2"
        package_aoti(str(path), files)
        return path.read_bytes()


def load_code(data: bytes, used: Sequence[int], device: torch.device) -> CompiledBlock:
    """Returns the code in a package of :func:`compile_code`, as a function of the block's inputs.

    Args:
        data: the package.
        used: :func:`used_inputs` of the block's graph.
        device: the device that the code runs on.
    """
    if _CALLS_KERNELS in data:
        register_all()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phase.pt2"
        path.write_bytes(data)
        index = -1 if device.index is None else device.index
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
    # The library runs one call at a time; a second one would wait while it holds the GIL.
    lock = threading.Lock()
    needs_alignment = device.type != "cpu"

    def run(inputs: list[Any]) -> list[torch.Tensor]:
        given = [inputs[i] for i in used]
        inputs.clear()
        if needs_alignment:
            given = [x if x.data_ptr() % _ALIGNMENT == 0 else x.clone() for x in given]
        with lock:
            results: list[torch.Tensor] = loader.boxed_run(given)
        return results

    return run


def used_inputs(flat: GraphModule) -> list[int]:
    """Returns the positions of the inputs that a graph reads.

    Constants of the model are inputs of every block, whether it reads them or not.
    """
    return [i for i, node in enumerate(user_inputs(flat.graph)) if node.users]


def _with_used_inputs(flat: GraphModule) -> GraphModule:
    """Returns a copy of the graph without unused inputs.

    A copy, because compilers modify the graph that they are given.
    """
    graph, mapping = Graph(), dict[Node, Node]()
    nodes = [n for n in flat.graph.nodes if n.op != "placeholder" or n.users]
    copy_into(graph, [n for n in nodes if n.op != "output"], mapping)
    graph.output(tuple(mapping[n] for n in output_node(flat.graph).args[0]))
    return make_module(flat, graph)
