"""Compiles a block ahead of time to a shared library, and loads such libraries: code for GPUs.

AOTInductor compiles the same graph that Inductor compiles for the running process. The library
needs neither the graph nor Inductor, calls Python only for the ops of :mod:`pabc.kernels`, and
contains no weights: they are inputs.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.internals.aotinductor import compile_library, load_library
from pabc.internals.onednn import lowering_onednn
from pabc.kernels import register_all
from pabc.passes import (
    CompiledBlock,
    Package,
    copy_into,
    example_inputs,
    make_module,
    output_node,
    user_inputs,
)

_CALLS_KERNELS = b"pabc::"
"""Occurs in a package whose code calls kernels: it lists the ops' names as plain text."""
_NAME = "block.pt2"
_ALIGNMENT = 16
"""The alignment in bytes that code for a GPU may assume of its inputs."""


def compile_package(block: GraphModule) -> Package:
    """Compiles a block (:func:`split_blocks_pass`) for :func:`load_package`."""
    graph, used, examples = _with_used_inputs(block), used_inputs(block), example_inputs(block)
    with torch.no_grad(), lowering_onednn(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _NAME
        compile_library(graph, [examples[i] for i in used], path)
        return Package(path.read_bytes(), used)


def load_package(package: Package, device: torch.device) -> CompiledBlock:
    """Returns the code of a package, which runs on `device`."""
    if _CALLS_KERNELS in package.data:
        register_all()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _NAME
        path.write_bytes(package.data)
        library = load_library(path, device)
    # The library runs one call at a time; a second one would wait while it holds the GIL.
    lock = threading.Lock()
    needs_alignment = device.type != "cpu"
    used = package.used

    def run(inputs: list[Any]) -> list[torch.Tensor]:
        given = [inputs[i] for i in used]
        inputs.clear()
        if needs_alignment:
            given = [x if x.data_ptr() % _ALIGNMENT == 0 else x.clone() for x in given]
        with lock:
            results: list[torch.Tensor] = library.boxed_run(given)
        return results

    return CompiledBlock(run, package)


def used_inputs(flat: GraphModule) -> tuple[int, ...]:
    """Returns the positions of the inputs that a graph reads.

    Constants of the model are inputs of every block, whether it reads them or not.
    """
    return tuple(i for i, node in enumerate(user_inputs(flat.graph)) if node.users)


def _with_used_inputs(flat: GraphModule) -> GraphModule:
    """Returns a copy of the graph without unused inputs.

    A copy, because compilers modify the graph that they are given.
    """
    graph, mapping = Graph(), dict[Node, Node]()
    nodes = [n for n in flat.graph.nodes if n.op != "placeholder" or n.users]
    copy_into(graph, [n for n in nodes if n.op != "output"], mapping)
    graph.output(tuple(mapping[n] for n in output_node(flat.graph).args[0]))
    return make_module(flat, graph)
