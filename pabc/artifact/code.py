"""Compiled code of a block, ahead of time: a shared library that runs without a compiler.

AOTInductor makes it, from the same graph that Inductor compiles for the process at hand. It runs
without Python but for kernels' ops (:mod:`pabc.kernels`), needs neither the graph nor Inductor, and
holds no weights: these are inputs.
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
"""In the list of the ops that code calls, which a package holds as it is."""
_ALIGNMENT = 16
"""Bytes: what code for a GPU may take for granted of its inputs' addresses."""
_OPTIONS = {
    "aot_inductor.package": True,
    # Of what calls the kernels, not of these: it takes half of the time, and gains no speed.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp.dynamic_threads": True,  # as many as the process has that runs it
}


def compile_code(block: GraphModule) -> bytes:
    """Compiles a block (:func:`split_blocks_pass`); what :func:`load_code` takes."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._inductor.package.package import package_aoti

    graph = _with_used_inputs(block)
    examples = example_inputs(block)
    inputs: list[Any] = [examples[i] for i in used_inputs(block)]
    with torch.no_grad(), lowering_onednn(), tempfile.TemporaryDirectory() as folder:
        made = compile_fx_aot(graph, inputs, config_patches=_OPTIONS)
        assert isinstance(made, list)
        files = [file for file in made if not str(file).endswith(".cpp")]
        path = Path(folder) / "phase.pt2"
        package_aoti(str(path), files)
        return path.read_bytes()


def load_code(data: bytes, used: Sequence[int], device: torch.device) -> CompiledBlock:
    """Code that :func:`compile_code` made; `used`: :func:`used_inputs` of its graph."""
    if _CALLS_KERNELS in data:
        register_all()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phase.pt2"
        path.write_bytes(data)
        index = -1 if device.index is None else device.index
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
    lock = (
        threading.Lock()
    )  # the library runs one call at a time, and waits with Python's lock held
    aligned = device.type != "cpu"

    def run(inputs: list[Any]) -> list[torch.Tensor]:
        given = [inputs[i] for i in used]
        inputs.clear()
        if aligned:
            given = [x if x.data_ptr() % _ALIGNMENT == 0 else x.clone() for x in given]
        with lock:
            results: list[torch.Tensor] = loader.boxed_run(given)
        return results

    return run


def used_inputs(flat: GraphModule) -> list[int]:
    """Positions of the inputs that a graph reads; constants of the model are among the others."""
    return [i for i, node in enumerate(user_inputs(flat.graph)) if node.users]


def _with_used_inputs(flat: GraphModule) -> GraphModule:
    """A copy, as compilers write to what they are given, without the inputs that are not read."""
    graph, mapping = Graph(), dict[Node, Node]()
    nodes = [n for n in flat.graph.nodes if n.op != "placeholder" or n.users]
    copy_into(graph, [n for n in nodes if n.op != "output"], mapping)
    graph.output(tuple(mapping[n] for n in output_node(flat.graph).args[0]))
    return make_module(flat, graph)
