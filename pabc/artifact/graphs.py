"""Writes and reads graphs as JSON: nodes in order, with the entries of `meta` that passes read.

The model's tensors are saved by name, without their values: a graph that is read refers to the
tensors of the model that it is loaded for.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from pabc.artifact.errors import ArtifactError
from pabc.artifact.tensors import TensorWriter
from pabc.artifact.values import Json, decode, encode
from pabc.internals.fakes import FakeTensorMode
from pabc.internals.ops import HigherOrderOperator, OpOverload, split_name
from pabc.passes import (
    CONSTANTS,
    GUARD_OPS,
    OpaqueCall,
    attribute,
    find_tensor,
    is_opaque,
    keep_one,
    make_module,
)

_FUNCTIONS: dict[str, Any] = {
    **{function.__name__: function for function in GUARD_OPS},
    "getitem": operator.getitem,
    "keep_one": keep_one,
}
"""The Python functions that a graph may call."""
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_META_KEYS = ("attention",)
"""Keys of `node.meta`, other than `"val"`, that are read after the analysis."""


class GraphWriter:
    """Writes the graphs of one program, and adds their constants to `tensors`."""

    def __init__(self, calls: Sequence[OpaqueCall], tensors: TensorWriter) -> None:
        self._opaque = {call.op: i for i, call in enumerate(calls)}
        self._tensors = tensors

    def write(self, gm: GraphModule) -> Json:
        """Returns a graph and the graphs that it calls as JSON. Raises: :class:`ArtifactError`."""
        graphs: dict[str, Json] = {}
        for name in _read_names(gm.graph):
            held = attribute(gm, name)
            if isinstance(held, GraphModule):
                graphs[name] = self.write(held)
            elif not isinstance(held, torch.Tensor):
                raise ArtifactError(
                    f"{name}: expected a tensor or a graph, found a {type(held).__name__}"
                )
            elif name.startswith(CONSTANTS):
                self._tensors.add(name, held)
        return {"nodes": [self._node(node) for node in gm.graph.nodes], "graphs": graphs}

    def _node(self, node: Node) -> Json:
        try:
            facts = {key: encode(node.meta[key]) for key in _META_KEYS if key in node.meta}
            if "val" in node.meta:
                facts["val"] = _write_val(node.meta["val"])
            arguments = [_write_argument(node.args), _write_argument(node.kwargs)]
            return [node.op, node.name, self._target(node), *arguments, facts]
        except ArtifactError as error:
            raise ArtifactError(f"node {node.name}: {error}") from error

    def _target(self, node: Node) -> Json:
        target: Any = node.target
        if node.op in ("placeholder", "get_attr", "output", "call_module"):
            return target
        if is_opaque(node):
            return {"outside": self._opaque[target]}
        if isinstance(target, OpOverload):
            return {"op": [target.namespace, *split_name(target)]}
        if isinstance(target, HigherOrderOperator):
            return {"higher": target.name()}
        if target in _NAMES:
            return {"function": _NAMES[target]}
        raise ArtifactError(f"expected an op that can be saved, found {target}")


class GraphReader:
    """Reads the graphs of one program for a model.

    Args:
        model: the model, whose tensors the graphs refer to.
        constants: the graphs' own tensors, by name.
        calls: the opaque calls, in the order in which :class:`GraphWriter` was given them.
    """

    def __init__(
        self,
        model: nn.Module,
        constants: Mapping[str, torch.Tensor],
        calls: Sequence[OpaqueCall] = (),
    ) -> None:
        self._model, self._constants, self._calls = model, constants, calls
        self._fake = FakeTensorMode()

    def read(self, content: Json) -> GraphModule:
        """Returns the graph that :meth:`GraphWriter.write` wrote."""
        graph, nodes = Graph(), dict[str, Node]()
        for op, name, target, args, kwargs, facts in content["nodes"]:
            node = graph.create_node(
                op,
                self._target(target),
                _read_argument(args, nodes),
                _read_argument(kwargs, nodes),
                name=name,
            )
            if node.name != name:
                raise ArtifactError(f"artifact: expected a new node name, found {name!r}")
            node.meta.update({key: decode(facts[key]) for key in _META_KEYS if key in facts})
            if "val" in facts:
                node.meta["val"] = self._val(facts["val"])
            nodes[name] = node
        root = {name: self._held(name, content["graphs"]) for name in _read_names(graph)}
        gm = make_module(root, graph)
        gm.graph.lint()
        return gm

    def _held(self, name: str, graphs: Mapping[str, Json]) -> Any:
        if name in graphs:
            return self.read(graphs[name])
        if name in self._constants:
            return self._constants[name]
        found = find_tensor(self._model, name)
        if found is None:
            raise ArtifactError(f"model: expected a tensor {name}, found none")
        return found

    def _target(self, content: Json) -> Any:
        if isinstance(content, str):
            return content
        ((kind, name),) = content.items()
        if kind == "function":
            return _FUNCTIONS[name]
        if kind == "outside":
            return self._calls[name].op
        found: Any = torch.ops
        for part in name if kind == "op" else ("higher_order", name):
            found = getattr(found, part, None)
        if not isinstance(found, (OpOverload, HigherOrderOperator)):
            raise ArtifactError(
                f"op {name}: expected a registered op, found none; import what defines it first"
            )
        return found

    def _val(self, content: Json) -> Any:
        if isinstance(content, list):
            return [self._val(item) for item in content]
        ((kind, inner),) = content.items()
        if kind == "tuple":
            return tuple(map(self._val, inner))
        if kind == "plain":
            return decode(inner)
        shape, strides, dtype, device = map(decode, inner)
        with self._fake:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _read_names(graph: Graph) -> list[str]:
    """Returns the names of the attributes that the graph reads from its module."""
    return list(
        dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module"))
    )


def _write_argument(argument: Any) -> Json:
    """Returns an argument of a node, which may contain nodes, as JSON; see :func:`encode`."""
    if isinstance(argument, Node):
        return {"node": argument.name}
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):
        return {"tuple": [_write_argument(item) for item in argument]}
    if isinstance(argument, list):
        return [_write_argument(item) for item in argument]
    if isinstance(argument, dict):
        return {"dict": [[encode(key), _write_argument(item)] for key, item in argument.items()]}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return {"slice": [_write_argument(part) for part in parts]}
    return encode(argument)


def _read_argument(content: Json, nodes: Mapping[str, Node]) -> Any:
    if isinstance(content, list):
        return [_read_argument(item, nodes) for item in content]
    if not isinstance(content, dict):
        return decode(content)
    ((kind, inner),) = content.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(_read_argument(item, nodes) for item in inner)
    if kind == "dict":
        return {decode(key): _read_argument(item, nodes) for key, item in inner}
    if kind == "slice":
        return slice(*(_read_argument(part, nodes) for part in inner))
    return decode(content)


def _write_val(val: Any) -> Json:
    """Returns a node's `"val"` as JSON, with the layouts of its fake tensors."""
    if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise ArtifactError("expected static shapes, found a symbolic size; use dynamic=False")
    if isinstance(val, torch.Tensor):
        sizes = (*val.shape, *val.stride())
        if any(isinstance(size, torch.SymInt) for size in sizes):
            _write_val(sizes[0])
        layout = [list(val.shape), list(val.stride()), val.dtype, val.device]
        return {"tensor": [*map(encode, layout)]}
    if isinstance(val, tuple):
        return {"tuple": [_write_val(item) for item in val]}
    if isinstance(val, list):
        return [_write_val(item) for item in val]
    return {"plain": encode(val)}
