"""capture: the model's forward as one graph of ATen ops; parameters shared, model untouched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .ir import is_tensor, module_path, output_node
from .tracing.calls import Call, Result
from .tracing.composites import decompose_unknown_composites
from .tracing.known_sizes import tell_sizes
from .tracing.lean import lean_tracing, quiet_tracing
from .tracing.numbers import RecordNumbers, check_numbers_stay_tensors
from .tracing.outside import OutsideCall, OutsideRecorder, patched, replayed_outside
from .tracing.reads import (
    Checked,
    Read,
    ReadRecorder,
    ReadReplayer,
    Reads,
    failing_module,
    with_static_sizes,
)
from .tracing.sizes import has_free_sizes, read_sizes
from .tracing.structure import Structure
from .tracing.untouched import untouched

CONSTANTS = "constants."
"""Prefix of the graph's own tensors, which are not the model's to replace."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How the graph's inputs and outputs pack into the model's own arguments and result.

    `inputs` names one graph input per flattened argument.
    """

    in_spec: Structure
    out_spec: Result
    inputs: tuple[str, ...]


def bind_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One spelling for every way to write the same call: positional, keyword, default left out."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def leaf_key(leaf: Any) -> Any:
    """What a captured graph takes for granted of one flattened argument: layout, or the value."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if isinstance(leaf, float):
        return (type(leaf), leaf, math.copysign(1.0, leaf))
    return (type(leaf), leaf)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    outside: Mapping[str, str] | None = None,
    promoted: Collection[int] = (),
    dynamic: bool = False,
) -> GraphModule:
    """Exports `model` for these arguments and returns its graph.

    Where the forward reads Python values from tensor data, the model is run once with these
    arguments to record them, and the graph is right as long as `gm.meta["reads"]` hold. A module
    that cannot be traced, or is named in `outside` (with the reason), is called by the graph and
    runs as it is.

    `promoted`: positions among the flattened arguments of numbers that become inputs, as tensors
    without dimensions; all other numbers are constants of the graph. `dynamic`: for all sizes of
    the tensors for which the model does the same; `gm.meta["sizes"]` says which.

    Requires: `model` in eval mode; `args` and `kwargs` as :func:`bind_arguments` gives them.
    Ensures: inputs are placeholders, one per flattened argument, in order; parameters and buffers
    are `get_attr` nodes under their qualified names, sharing the model's tensors; every op is
    functional; run on the same arguments it gives the model's bits; `model` is as it was;
    `gm.meta["calls"]` has one :class:`OutsideCall` per call of a module that runs as it is.
    Raises: ValueError where the model's own forward, not that of a module in it, cannot be traced.

        # before                                # after
        model(x, t)                             %w = get_attr[blocks.0.attn.to_q.weight]
                                                %q = aten.linear(%x, %w)
    """
    call = Call(args, kwargs, promoted)
    with call.replacing_forward(model):
        if dynamic:
            gm = _finish(model, call, _export_any_sizes(model, call))
        else:
            gm = _finish(model, call, *_trace(model, call, dict(outside or {})))
    if promoted:
        names = [gm.meta["signature"].inputs[i] for i in promoted]
        check_numbers_stay_tensors(gm.graph, names, gm.meta["reads"].inputs)
    return gm


def _trace(
    model: nn.Module, call: Call, outside: dict[str, str]
) -> tuple[torch.export.ExportedProgram, ReadReplayer | None, Sequence[OutsideCall]]:
    """Traces as it is where possible, else with values recorded from data."""
    plain: torch.export.ExportedProgram | None = None
    reason: Exception | None = None
    if not outside:
        try:
            plain = _export(model, call.args, call.kwargs)
        except Exception as error:
            reason = error
        else:
            unknown = with_static_sizes(plain.graph)
            if not unknown:
                return plain, None, ()
            reason = ValueError(f"the value of {unknown[0].name} follows from data")
            plain = None if any(map(is_tensor, unknown)) else plain
    try:
        return _trace_recorded(model, call.args, call.kwargs, outside, reason)
    except ValueError:
        if plain is None:
            raise
        return plain, None, ()  # on the meta device: there are numbers, but none to record


def _export_any_sizes(model: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Traces with every dimension of every tensor as free as the model leaves it."""

    def free(leaf: Any) -> Any:
        automatic = torch.export.Dim.AUTO
        is_tensor = isinstance(leaf, torch.Tensor)
        return dict.fromkeys(range(leaf.ndim), automatic) if is_tensor else None

    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    try:
        program = _export(
            model, call.args, call.kwargs, sizes=pytree.tree_map(free, dict(bound.arguments))
        )
    except Exception as error:
        raise ValueError(f"torch.export stopped with {_one_line(error)}") from error
    if unknown := with_static_sizes(program.graph):
        raise ValueError(f"the size of {unknown[0].name} follows from data")
    return program


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *modes: AbstractContextManager,
    sizes: dict[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """`sizes`: which dimensions are free, as torch.export wants it; None: they are constants."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(untouched(model))
        stack.enter_context(lean_tracing())
        stack.enter_context(quiet_tracing())
        for mode in modes:
            stack.enter_context(mode)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        return decompose_unknown_composites(program)


def _trace_recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outside: dict[str, str],
    reason: Exception | None,
) -> tuple[torch.export.ExportedProgram, ReadReplayer, Sequence[OutsideCall]]:
    """Traces with recorded values; modules that cannot be traced join `outside` one after another.

    `reason`: why the model cannot be traced without.
    """
    watch = True
    while True:
        reads, calls = _record(model, args, kwargs, outside, reason)
        replayer = ReadReplayer(model, reads, watch=watch)
        forward: Any = partial(_with_tensors, model.forward, replayer)
        forward.__signature__ = inspect.signature(model.forward)
        modes = (replayed_outside(model, calls), patched(model, forward), replayer, RecordNumbers())
        try:
            program = _export(model, args, kwargs, *modes)
        except Exception as error:
            if replayer.watches:
                watch = False  # a number was used as none of a graph can be
                continue
            failing, reason = failing_module(model, error), error
            why = f"torch.export stopped in it with {_one_line(error)}"
        else:
            arrays = [c.read for c in replayer.checked if c.read.is_float_array and c.read.path]
            unknown = with_static_sizes(program.graph)
            if unknown and replayer.watches:
                watch = False
                continue
            if not arrays and not unknown:
                tell_sizes(program.graph)
                return program, replayer, calls
            failing = arrays[0].path if arrays else module_path(unknown[0])
            why = str(arrays[0]) if arrays else f"the size of {unknown[0].name} follows from data"
            reason = ValueError(why)
        if not failing or failing in outside:
            raise ValueError(
                f"pabc could not capture {type(model).__name__}: torch.export stopped in its own "
                f"forward with {_one_line(reason)}"
            ) from reason
        outside.update(dict.fromkeys(_alike(model, failing), why))


def _record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outside: dict[str, str],
    reason: Exception | None,
) -> tuple[list[Read], list[OutsideCall]]:
    """Runs the model once: the values that it reads from data, the calls of modules outside."""
    reads, calls = ReadRecorder(model), OutsideRecorder(model, outside)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors if t.is_cuda}
    try:
        with (
            torch.no_grad(),
            untouched(model),
            torch.random.fork_rng(devices),
            calls.active(),
            reads,
        ):
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"pabc could not capture {type(model).__name__}: torch.export stopped with "
            f"{_one_line(reason)}; running the model to see which values it reads from data "
            f"stopped with {_one_line(error)}"
        ) from reason
    return reads.reads, calls.calls


def _with_tensors(
    forward: Callable[..., Any], replayer: ReadReplayer, *args: Any, **kwargs: Any
) -> tuple[Any, list[torch.Tensor]]:
    """The model's result, and the tensors from which values were read."""
    result = forward(*args, **kwargs)
    return result, [t for checked in replayer.checked for t in checked.tensors]


def _one_line(error: BaseException | None) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _alike(model: nn.Module, path: str) -> set[str]:
    """The modules that run the same code as one: where it cannot be traced, nor can they."""
    kind = type(model.get_submodule(path))
    return {name for name, module in model.named_modules() if name and type(module) is kind}


def _finish(
    model: nn.Module,
    call: Call,
    program: torch.export.ExportedProgram,
    replayer: ReadReplayer | None = None,
    calls: Sequence[OutsideCall] = (),
) -> GraphModule:
    """The graph with weights as attribute reads, and the facts about it."""
    _refuse_mutation(program)
    graph = program.graph
    # What is read already are graphs that ops take as arguments, such as flex_attention's.
    root: dict[str, Any] = {
        str(n.target): getattr(program.graph_module, str(n.target))
        for n in graph.nodes
        if n.op == "get_attr"
    }
    position = {node: i for i, node in enumerate(graph.nodes)}
    inputs: list[str] = []
    for node, spec in zip(
        [n for n in graph.nodes if n.op == "placeholder"],
        program.graph_signature.input_specs,
        strict=True,
    ):
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(str(node.target))
            continue
        name, tensor = _resolve(model, program, spec, node)
        root[name] = tensor
        _read_attribute(graph, node, name, position)
    gm = GraphModule(root, graph)
    assert call.result is not None
    checked: list[Checked] = []
    if replayer is not None:
        checked = _split_off_tensors(graph, call.result.num_outputs, replayer.checked)
    gm.meta["reads"] = Reads(gm, checked)
    gm.meta["calls"] = tuple(calls)
    gm.meta["aliases"] = _find_aliases(model, root)
    gm.meta["signature"] = Signature(call.structure, call.result, tuple(inputs))
    if has_free_sizes(graph):
        gm.meta["sizes"] = read_sizes(graph, call.inputs, program.range_constraints)
    return gm


def _split_off_tensors(
    graph: torch.fx.Graph, num_outputs: int, checked: Sequence[Checked]
) -> list[Checked]:
    """Takes the tensors of reads off the results; `checked` with their nodes in their place."""
    output = output_node(graph)
    results = output.args[0]
    output.args = (tuple(results[:num_outputs]),)
    rest = iter(results[num_outputs:])
    return [replace(c, tensors=tuple(next(rest) for _ in c.tensors)) for c in checked]


def _refuse_mutation(program: torch.export.ExportedProgram) -> None:
    plain = (OutputKind.USER_OUTPUT,)
    mutated = [s.target for s in program.graph_signature.output_specs if s.kind not in plain]
    if mutated:
        raise ValueError(
            f"pabc expects a forward without side effects, found one that writes to {mutated}; "
            "move the write out of forward"
        )


def _resolve(
    model: nn.Module, program: torch.export.ExportedProgram, spec: InputSpec, node: Node
) -> tuple[str, Any]:
    """A weight's name in the graph and its tensor: the model's own, or a constant of the graph."""
    assert spec.target is not None
    owner, _, leaf = spec.target.rpartition(".")
    if spec.kind != InputKind.CONSTANT_TENSOR:
        try:
            return spec.target, getattr(model.get_submodule(owner), leaf)
        except AttributeError:
            pass  # built while tracing
    return f"{CONSTANTS}{node.name}", program.constants[spec.target]


def _find_aliases(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Per tensor, the other names under which the model's modules share it."""
    by_id: dict[int, list[str]] = {}
    everything = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in everything:
        by_id.setdefault(id(tensor), []).append(name)
    shared = {name: others for others in by_id.values() if len(others) > 1 for name in others}
    return {name: tuple(n for n in shared[name] if n != name) for name in names if name in shared}


def _read_attribute(
    graph: torch.fx.Graph, node: Node, name: str, position: Mapping[Node, int]
) -> None:
    """Reads a weight right before its first use, rather than all of them at the top."""
    if node.users:
        with graph.inserting_before(min(node.users, key=position.__getitem__)):
            read = graph.create_node("get_attr", name)
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
    graph.erase_node(node)
