"""emit: a phase as a flat function of weights, inputs and cuts, compiled for the device."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from threading import Thread
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from .ir import attribute, copy_into, output_node, user_inputs
from .onednn import lowering_onednn
from .tracing.lean import without_garbage_collection

Code = Callable[[list[Any]], Sequence[torch.Tensor]]
"""Compiled code of a block: its inputs, in a list that it may empty -> its results."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a flat graph's results one of the model's outputs is."""

    index: int


def inline_regions_pass(gm: GraphModule) -> GraphModule:
    """Copies every called region into the graph that calls it.

    Requires: a phase (:func:`specialize_phase_pass`).
    Ensures: no `call_module` node; outputs bitwise as before, so that fusion may cross regions;
    what was a region's is marked with its slot, in `meta["slot"]`.

        # before                                # after
        %r = call_module[cross_0](%x)           %q = aten.linear(%x, %w)
        %c = getitem(%r, 0)                     %o = aten.scaled_dot_product_attention(%q, ...)
    """
    slots = {region.name: slot for slot, region in enumerate(gm.meta["regions"])}
    graph = Graph()
    mapping: dict[Node, Any] = {}
    root: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            assert isinstance(body, GraphModule)
            inputs = [mapping[n] for n in node.args]
            mapping[node] = _inline(graph, body, inputs, root, slots.get(str(node.target)))
        elif node.op == "call_function" and isinstance(mapping.get(node.args[0]), tuple):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        else:
            copy_into(graph, [node], mapping)
            if node.op == "get_attr":
                root[str(node.target)] = attribute(gm, str(node.target))
    result = GraphModule(root, graph)
    result.meta.update(gm.meta)
    return result


def _inline(
    graph: Graph, body: GraphModule, inputs: list[Node], root: dict[str, Any], slot: int | None
) -> Any:
    nodes = list(body.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    inner: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    ops = [n for n in nodes if n.op not in ("placeholder", "output")]
    copy_into(graph, ops, inner)
    if slot is not None:
        for node in ops:
            inner[node].meta["slot"] = slot
    root.update(
        {str(n.target): attribute(body, str(n.target)) for n in nodes if n.op == "get_attr"}
    )
    return tuple(inner[n] for n in output_node(body.graph).args[0])


def lift_weights_pass(gm: GraphModule) -> GraphModule:
    """Turns attribute reads into leading inputs and packs the results into one flat tuple.

    Requires: a flat graph (:func:`inline_regions_pass`) that returns (outputs, stored cuts).
    Ensures: no tensor is read by `get_attr`; `gm.meta["weights"]` names the leading inputs in
    order; every result is a tensor, the model's outputs first, and `gm.meta["outputs"]` says how to
    put them back: per output its place among the results, or the constant it is.

        # before                                # after
        %w = get_attr[blocks.0.ff.weight]       %blocks_0_ff_weight = placeholder
        return ((%y, None), (%c,))              return (%y, %c)
    """
    reads: dict[str, list[Node]] = {}
    graphs: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            read = attribute(gm, str(node.target))
            if isinstance(read, nn.Module):  # a graph that an op takes as its argument
                graphs[str(node.target)] = read
            else:
                reads.setdefault(str(node.target), []).append(node)
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for name, nodes in reads.items():
        weight = graph.placeholder(name.replace(".", "_"))
        weight.meta.update(nodes[0].meta)
        mapping.update(dict.fromkeys(nodes, weight))
    rest = [n for n in gm.graph.nodes if n.op != "output" and n not in mapping]
    copy_into(graph, rest, mapping)
    outputs, stored = output_node(gm.graph).args[0]
    tensors = [n for n in outputs if isinstance(n, Node)]
    graph.output(tuple(mapping[n] for n in (*tensors, *stored)))
    places = iter(range(len(tensors)))
    result = GraphModule(graphs, graph)
    result.meta.update(gm.meta)
    result.meta["weights"] = tuple(reads)
    result.meta["outputs"] = tuple(
        Place(next(places)) if isinstance(n, Node) else n for n in outputs
    )
    return result


def compile_blocks(blocks: Sequence[GraphModule]) -> list[Code]:
    """Compiles blocks (:func:`split_blocks_pass`) with Inductor.

    There is no Dynamo in between, hence no guard per call and no recompile: weights are inputs, and
    the caller checks shapes once a call.
    """
    with _compiling_kernels_in_background(blocks), without_garbage_collection():
        return [_compile_block(block) for block in blocks]


def _compile_block(gm: GraphModule) -> Code:
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), lowering_onednn():
        compiled: Any = compile_fx(gm, example_inputs(gm))
    boxed = inspect.unwrap(compiled, stop=_takes_list)
    return boxed if _takes_list(boxed) else lambda inputs: compiled(*inputs)


def example_inputs(block: GraphModule) -> list[torch.Tensor | None]:
    """Inputs laid out as a block expects them, of any values."""
    return [
        torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        if isinstance(val := node.meta.get("val"), torch.Tensor)
        else None
        for node in user_inputs(block.graph)
    ]


@contextmanager
def _compiling_kernels_in_background(blocks: Sequence[GraphModule]) -> Iterator[None]:
    """Lets the C++ compilers of one block run while Inductor works on the next.

    They run in processes of their own, which Inductor waits for after each graph: here, that is put
    off until the last.
    """
    from torch._inductor.async_compile import AsyncCompile

    inputs = (n.meta.get("val") for block in blocks for n in user_inputs(block.graph))
    if any(isinstance(val, torch.Tensor) and val.device.type != "cpu" for val in inputs):
        yield
        return
    wait = AsyncCompile.wait
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
    AsyncCompile.wait = lambda self, scope: waiting.append((self, scope))  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
        for compiler, scope in waiting:
            compiler.wait(scope)


def prepare_inductor() -> None:
    """Starts to find out, in the background, which vector instructions the C++ compiler knows.

    Inductor asks for it once a process, and tries one program after the other: seconds, in which
    the model can be captured. What is found is in Inductor's own cache, and locked until then.
    """
    import_module("torch._inductor.compile_fx")  # by one thread, as its modules import each other
    Thread(target=_try_vector_instructions, name="pabc: instructions", daemon=True).start()


def _try_vector_instructions() -> None:
    from torch._inductor import cpu_vec_isa

    if platform.machine() != "x86_64":
        cpu_vec_isa.pick_vec_isa()
        return
    supported = cpu_vec_isa.x86_isa_checker()
    known = cpu_vec_isa.supported_vec_isa_list
    sets = [isa for isa in known if all(flag in supported for flag in str(isa).split())]
    with ThreadPoolExecutor(len(sets) or 1) as pool:
        list(pool.map(bool, sets))


def _takes_list(function: Any) -> bool:
    """Whether a function is of the kind that AOTAutograd makes: it takes its inputs in a list, so
    that it can free them."""
    code = getattr(function, "__code__", None)
    takes_one = code is not None and code.co_argcount == 1 and not code.co_flags & _VARIADIC
    return takes_one and getattr(function, "_boxed_call", False)


_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
