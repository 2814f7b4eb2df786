"""capture: exports the model's forward as one graph of ATen ops, sharing its parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import GraphModule, Node

from pabc.internals.dispatch import is_traceable_wrapper_subclass
from pabc.internals.graphs import reserve_names
from pabc.internals.modules import buffers_of, parameters_of

from .facts import Captured, Signature
from .ir import make_module, output_node
from .tracing.calls import TracedCall
from .tracing.effects import Effects, WrittenName, check_writes, find_written_tensors, judge_effects
from .tracing.export import export, export_any_sizes
from .tracing.foreign import refuse_hooks
from .tracing.guards import Reads
from .tracing.modules import ModelState
from .tracing.number_mode import check_numbers_stay_tensors
from .tracing.opaque import OpaqueCall
from .tracing.reads import ReadReplayer
from .tracing.records import Checked
from .tracing.sizes import has_free_sizes, read_sizes

CONSTANTS = "constants."
"""Prefix of the graph's own tensors, which are not the model's to replace."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    opaque: Mapping[str, str] | None = None,
    lifted: Collection[int] = (),
    dynamic: bool = False,
) -> tuple[GraphModule, Captured]:
    """Exports `model` for these arguments; returns its graph and the facts about it.

    If the forward reads Python values from tensor data, the model runs once with these arguments to
    record them, and the graph is guarded on the values read. A module that cannot be traced, or
    that `opaque` names (with the reason), is opaque: the graph calls it.

    `lifted`: positions, among the flattened arguments, of numbers that become inputs, as tensors
    without dimensions; all other numbers are constants of the graph. `dynamic`: the graph has
    dynamic shapes; :attr:`Captured.sizes` has the sizes for which it is valid.

    Requires: `model` in eval mode; `args` and `kwargs` as :func:`pabc.base.arguments.bind_call`
    returns them.
    Ensures: inputs are placeholders, one per flattened argument, in order; parameters and buffers
    are `get_attr` nodes under their qualified names, sharing the model's tensors; every op is
    functional; on the same arguments, outputs equal the model's bit for bit; `model` is unchanged.
    Raises: ValueError if the model's own forward, not that of a submodule, cannot be traced; if a
    module holds its weights in a TorchScript object; or if a module has a hook of another library
    that moves weights or keeps values between calls.

        # before                                # after
        model(x, t)                             %w = get_attr[blocks.0.attn.to_q.weight]
                                                %q = aten.linear(%x, %w)
    """
    refuse_hooks(model)
    _refuse_packed_weights(model)
    call = TracedCall(args, kwargs, lifted)
    with call.replacing_forward(model):
        exported, effects = _export(model, call, dict(opaque or {}), dynamic)
    gm, captured = _finish(model, call, effects, *exported)
    if lifted:
        names = [captured.signature.inputs[i] for i in lifted]
        check_numbers_stay_tensors(gm.graph, names, captured.reads.inputs)
    return gm, captured


def _export(
    model: nn.Module, call: TracedCall, opaque: dict[str, str], dynamic: bool
) -> tuple[tuple[Any, ...], Effects]:
    """Exports the model; modules whose forwards have side effects become opaque.

    Returns the results of :func:`pabc.passes.tracing.export.export`, and the forward's effects.
    """
    written: tuple[WrittenName, ...] = ()
    while True:
        exported: tuple[Any, ...]
        try:
            exported = (export_any_sizes(model, call),) if dynamic else export(model, call, opaque)
        except ValueError:
            writers = {} if dynamic else find_written_tensors(model, call, opaque)
            if not writers:
                raise
            opaque.update(writers)
            call.keeping.update(writers)
            continue
        if call.hooks.refused:
            raise ValueError(call.hooks.refused[0])
        effects = judge_effects(model, call, opaque)
        written += effects.written
        modules = {**_written_buffers(exported[0]), **effects.modules}
        if not modules:
            return exported, replace(effects, written=written)
        if dynamic:
            raise ValueError("; ".join(f"{name}: {why}" for name, why in modules.items()))
        opaque.update(modules)
        call.keeping.update(modules)


def _finish(
    model: nn.Module,
    call: TracedCall,
    effects: Effects,
    program: torch.export.ExportedProgram,
    replayer: ReadReplayer | None = None,
    calls: Sequence[OpaqueCall] = (),
) -> tuple[GraphModule, Captured]:
    """Returns the graph with weights as attribute reads, and the facts about it."""
    graph = program.graph
    writes = _split_off_writes(program)
    _take_names(graph)
    # Attributes that the graph reads already are graphs that ops take, as flex_attention does.
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
    gm = make_module(root, graph)
    checked = _split_off_tensors(graph, call, [] if replayer is None else replayer.checked)
    reads = Reads.of(gm, checked)
    names = tuple(n for n in inputs if n in writes)
    if names:
        check_writes(call, [inputs.index(n) for n in names], names)
    results = output_node(graph)
    results.args = ((*results.args[0], *(writes[n] for n in names)),)
    assert call.result is not None
    opaque = (*calls, *call.hooks.calls)
    is_dynamic = has_free_sizes(graph)
    captured = Captured(
        signature=Signature(call.structure, call.result, tuple(inputs)),
        reads=reads,
        modules=ModelState.of(model, {each.path for each in opaque}, effects.written),
        calls=opaque,
        aliases=_find_aliases(model, root),
        writes=tuple(inputs.index(n) for n in names),
        deleted=effects.deleted,
        written=effects.written,
        compiled=tuple(dict.fromkeys(call.compiled)),
        sizes=read_sizes(graph, call.inputs, program.range_constraints) if is_dynamic else None,
    )
    return gm, captured


def _take_names(graph: torch.fx.Graph) -> None:
    """Reserves the names of the nodes, so that no new node gets one of them.

    torch.export renames inputs without telling the graph.
    """
    reserve_names(graph, (node.name for node in graph.nodes))


def _split_off_tensors(
    graph: torch.fx.Graph, call: TracedCall, checked: Sequence[Checked]
) -> list[Checked]:
    """Removes effect tokens and the tensors of reads from the results.

    Returns `checked` with these tensors' nodes.
    """
    assert call.result is not None
    num_outputs = call.result.num_outputs
    output = output_node(graph)
    results = output.args[0]
    output.args = (tuple(results[:num_outputs]),)
    rest = iter(results[num_outputs + len(call.tokens) :])
    return [replace(c, tensors=tuple(next(rest) for _ in c.tensors)) for c in checked]


def _written_buffers(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Returns the modules that write to their buffers, each with the reason why it is opaque.

    Raises: ValueError if the model itself owns the buffer.
    """
    modules = {}
    for spec in program.graph_signature.output_specs:
        if spec.kind not in _RESULTS:
            path, _, leaf = str(spec.target).rpartition(".")
            if not path:
                raise ValueError(
                    f"pabc expects a forward without side effects, found one that writes to "
                    f"['{leaf}']; move the write out of forward"
                )
            modules[path] = f"it writes to {spec.target}"
    return modules


_RESULTS = (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION)


def _split_off_writes(program: torch.export.ExportedProgram) -> dict[str, Node]:
    """Removes the new values of written inputs from the results; returns input name -> value."""
    output = output_node(program.graph)
    specs = program.graph_signature.output_specs
    pairs = list(zip(specs, output.args[0], strict=True))
    written = OutputKind.USER_INPUT_MUTATION
    output.args = (tuple(node for spec, node in pairs if spec.kind != written),)
    return {str(spec.target): node for spec, node in pairs if spec.kind == written}


def _refuse_packed_weights(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, held in vars(module).items():
            if isinstance(held, torch.ScriptObject) and not hasattr(held, "__obj_flatten__"):
                raise ValueError(
                    f"pabc could not capture {type(model).__name__}: {path}.{name} is a "
                    "TorchScript object, as torch.ao.quantization packs weights into, which "
                    "torch.export cannot trace; quantize with torchao.quantization.quantize_, "
                    "which keeps tensors"
                )


def _resolve(
    model: nn.Module, program: torch.export.ExportedProgram, spec: InputSpec, node: Node
) -> tuple[str, Any]:
    """Returns a weight's name in the graph and its tensor.

    The tensor is the model's own, or a constant of the graph.
    """
    assert spec.target is not None
    name, found = spec.target, find_tensor(model, spec.target)
    if found is None:
        name = _name_within(model, name)
        found = find_tensor(model, name)
    constant = program.constants.get(spec.target)
    if found is not None and (constant is None or found is constant):
        return name, found
    return f"{CONSTANTS}{node.name}", program.constants[spec.target]


def find_tensor(model: nn.Module, name: str) -> torch.Tensor | None:
    """Returns the parameter, buffer, or other tensor attribute with a qualified name, or None.

    The attribute may belong to a module of the model, or to a tensor in one.
    """
    try:
        found = attrgetter(name)(model)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


_UNWRAPPED = re.compile(r"(?:(.+)\.)?parametrizations\.([^.]+)\.original(\d+)")


def _name_within(model: nn.Module, name: str) -> str:
    """Returns the name of a tensor that torch.export has taken out of a tensor subclass.

    Quantized weights are such: their tensors go by the name of a parametrization.
    """
    match = _UNWRAPPED.fullmatch(name)
    if match is None:
        return name
    owner, leaf, index = match.groups()
    path = f"{owner}.{leaf}" if owner else leaf
    weight = find_tensor(model, path)
    return path if weight is None else list(_names_within(path, weight))[int(index)]


def _names_within(name: str, tensor: torch.Tensor) -> Iterator[str]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _names_within(f"{name}.{inner}", getattr(tensor, inner))


def _find_aliases(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns, for each tensor, the other names under which the model's modules share it."""
    by_id: dict[int, list[str]] = {}
    everything = (
        (f"{path}.{name}" if path else name, value)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in (
            *parameters_of(module).items(),
            *buffers_of(module).items(),
            *vars(module).items(),
        )
        if isinstance(value, torch.Tensor)
    )
    for name, tensor in everything:
        by_id.setdefault(id(tensor), []).append(name)
    shared = {name: others for others in by_id.values() if len(others) > 1 for name in others}
    return {name: tuple(n for n in shared[name] if n != name) for name in names if name in shared}


def _read_attribute(
    graph: torch.fx.Graph, node: Node, name: str, position: Mapping[Node, int]
) -> None:
    """Replaces the placeholder of a weight by an attribute read right before its first use."""
    if node.users:
        with graph.inserting_before(min(node.users, key=position.__getitem__)):
            read = graph.create_node("get_attr", name)
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
    graph.erase_node(node)
