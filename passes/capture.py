"""capture: the model's forward as one graph of ATen ops; parameters shared, model untouched."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .composites import decompose_unknown_composites

CONSTANTS = "constants."
"""Prefix of the graph's own tensors, which are not the model's to replace."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How the graph's inputs and outputs pack into the model's own arguments and result.

    `inputs` names one graph input per flattened argument.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
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
    return (type(leaf), leaf)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undoes what tracing leaves in a model: lazily built tables would hold fake tensors."""
    seen: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _remember(module, seen)
    try:
        yield
    finally:
        for holder, contents in seen.values():
            _restore(holder, contents)


def _remember(value: Any, seen: dict[int, tuple[Any, Any]]) -> None:
    """Notes what mutable containers and plain objects hold, and what they hold in turn."""
    if id(value) in seen or isinstance(value, (torch.Tensor, type, ModuleType, FunctionType)):
        return
    if isinstance(value, dict):
        contents: Any = dict(value)
        inner = list(value.values())
    elif isinstance(value, (list, set)):
        contents = inner = list(value)
    elif isinstance(value, tuple):
        contents, inner = None, list(value)
    elif isinstance(getattr(value, "__dict__", None), dict):
        contents, inner = None, [value.__dict__]
    else:
        return
    seen[id(value)] = (value, contents)
    for item in inner:
        _remember(item, seen)


def _restore(holder: Any, contents: Any) -> None:
    """Puts a container back, where it has changed: some refuse to be written to."""
    if isinstance(holder, dict):
        if len(holder) != len(contents) or any(
            key not in holder or holder[key] is not value for key, value in contents.items()
        ):
            holder.clear()
            holder.update(contents)
    elif isinstance(holder, set):
        if holder != set(contents):
            holder.clear()
            holder.update(contents)
    elif isinstance(holder, list):
        holder[:] = contents


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """Exports `model` for these arguments and returns its graph.

    Requires: `model` in eval mode; `args` and `kwargs` as :func:`bind_arguments` gives them.
    Ensures: inputs are placeholders, one per flattened argument, in order; parameters and buffers
    are `get_attr` nodes under their qualified names, sharing the model's tensors; every op is
    functional; run on the same arguments it gives the model's bits; `model` is as it was.
    Raises: ValueError where the model cannot be captured whole.

        # before                                # after
        model(x, t)                             %w = get_attr[blocks.0.attn.to_q.weight]
                                                %q = aten.linear(%x, %w)
    """
    with torch.no_grad(), untouched(model), warnings.catch_warnings():
        # torch.export's own copies of tree specs warn about torch's own classes.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
            program = decompose_unknown_composites(program)
        except Exception as error:
            raise ValueError(
                f"pabc could not capture {type(model).__name__} whole: torch.export stopped with "
                f"{type(error).__name__}: {error}"
            ) from error
    _refuse_mutation(program)
    graph = program.graph
    # What is read already are graphs that ops take as arguments, such as flex_attention's.
    root: dict[str, Any] = {
        str(n.target): getattr(program.graph_module, str(n.target))
        for n in graph.nodes
        if n.op == "get_attr"
    }
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
        _read_attribute(graph, node, name)
    gm = GraphModule(root, graph)
    gm.meta["aliases"] = _find_aliases(model, root)
    call = program.call_spec
    assert call.in_spec is not None and call.out_spec is not None
    gm.meta["signature"] = Signature(call.in_spec, call.out_spec, tuple(inputs))
    return gm


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


def _read_attribute(graph: torch.fx.Graph, node: Node, name: str) -> None:
    """Reads a weight right before its first use, rather than all of them at the top."""
    if node.users:
        position = {n: i for i, n in enumerate(graph.nodes)}
        with graph.inserting_before(min(node.users, key=position.__getitem__)):
            read = graph.create_node("get_attr", name)
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
    graph.erase_node(node)
