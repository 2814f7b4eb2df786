"""capture: the model's forward as one graph of ATen ops; parameters shared, model untouched."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undoes what tracing leaves in a model: lazily built tables would hold fake tensors."""
    before = [(m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    try:
        yield
    finally:
        for module, state, buffers, parameters in before:
            module.__dict__.clear()
            module.__dict__.update(state)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._parameters.clear()
            module._parameters.update(parameters)


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
            # No table: the default one would break fused attention into its parts.
            program = program.run_decompositions({})
        except Exception as error:
            raise ValueError(
                f"pabc could not capture {type(model).__name__} whole: torch.export stopped with "
                f"{type(error).__name__}: {error}"
            ) from error
    _refuse_mutation(program)
    graph = program.graph
    root: dict[str, Any] = {}
    inputs: list[str] = []
    for node, spec in zip(
        [n for n in graph.nodes if n.op == "placeholder"],
        program.graph_signature.input_specs,
        strict=True,
    ):
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(str(node.target))
            continue
        assert spec.target is not None, f"{spec.kind} without a name"
        name = spec.target if spec.kind != InputKind.CONSTANT_TENSOR else f"constants.{node.name}"
        root[name] = _resolve(model, program, spec.target)
        _read_attribute(graph, node, name)
    gm = GraphModule(root, graph)
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


def _resolve(model: nn.Module, program: torch.export.ExportedProgram, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), leaf)
    except AttributeError:
        return program.constants[name]


def _read_attribute(graph: torch.fx.Graph, node: Node, name: str) -> None:
    """Reads a weight right before its first use, rather than all of them at the top."""
    if node.users:
        position = {n: i for i, n in enumerate(graph.nodes)}
        with graph.inserting_before(min(node.users, key=position.__getitem__)):
            read = graph.create_node("get_attr", name)
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
    graph.erase_node(node)
