"""Writes and reads guards on data as JSON: the values read, and how to read them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pabc.artifact.errors import ArtifactError
from pabc.artifact.graphs import GraphReader, GraphWriter
from pabc.artifact.values import Json, decode, encode
from pabc.internals.dispatch import VARIABLE_FUNCTIONS
from pabc.passes import (
    CallAgain,
    Checked,
    Comparison,
    MaskCount,
    NumberAnswer,
    Read,
    Reads,
    RepeatCount,
    ShapesAgain,
)

_NAMESPACES: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "op": VARIABLE_FUNCTIONS,
    "functional": torch.functional,
}
"""Namespaces of the functions that read values from tensors; none of these loads or runs code."""


def write_reads(reads: Reads, writer: GraphWriter) -> Json:
    """Returns the reads of one program as JSON. Raises: :class:`ArtifactError` naming the read."""
    return {
        "graph": writer.write(reads.graph),
        "checked": [_write_checked(checked) for checked in reads.checked],
        "inputs": [sorted(inputs) for inputs in reads.inputs],
        "used": list(reads.used),
    }


def read_reads(content: Json, reader: GraphReader) -> Reads:
    """Returns the reads that :func:`write_reads` wrote."""
    graph = reader.read(content["graph"])
    nodes = {node.name: node for node in graph.graph.nodes}
    checked = tuple(
        Checked(_read_read(read), _read_measure(measure), tuple(nodes[name] for name in names))
        for read, measure, names in content["checked"]
    )
    inputs = tuple(frozenset(names) for names in content["inputs"])
    return Reads(graph, checked, inputs, tuple(content["used"]))


def _write_checked(checked: Checked) -> Json:
    try:
        names = [node.name for node in checked.tensors]
        return [_write_read(checked.read), _write_measure(checked.again), names]
    except ArtifactError as error:
        raise ArtifactError(f"{checked.read}: {error}") from error


def _write_read(read: Read) -> Json:
    parts = [read.site, read.path, read.shapes, read.compared]
    return [_write_function(read.function), _write_value(read.value), *map(encode, parts)]


def _read_read(content: Json) -> Read:
    function, value, *parts = content
    site, path, shapes, compared = map(decode, parts)
    return Read(_read_function(function), site, path, _read_value(value), shapes, compared)


def _write_measure(measure: Any) -> Json:
    if isinstance(measure, (CallAgain, ShapesAgain)):
        return [type(measure).__name__, _write_function(measure.function), encode(measure.call)]
    if isinstance(measure, NumberAnswer):
        return ["NumberAnswer", _write_ask(measure.ask)]
    if isinstance(measure, (MaskCount, RepeatCount)):
        return [type(measure).__name__]
    raise ArtifactError(f"expected a check that can be saved, found {measure}")


def _read_measure(content: Json) -> Any:
    kind, *parts = content
    if kind == "NumberAnswer":
        return NumberAnswer(_read_ask(parts[0]))
    if kind in ("MaskCount", "RepeatCount"):
        return MaskCount() if kind == "MaskCount" else RepeatCount()
    measure = {"CallAgain": CallAgain, "ShapesAgain": ShapesAgain}[kind]
    return measure(_read_function(parts[0]), decode(parts[1]))


def _write_ask(ask: Any) -> Json:
    if isinstance(ask, Comparison):
        return [ask.name, encode(ask.other)]
    if ask is bool or ask is None:
        return ask and "bool"
    raise ArtifactError(f"expected a comparison that can be saved, found {ask}")


def _read_ask(content: Json) -> Any:
    if content is None or content == "bool":
        return content and bool
    name, other = content
    return Comparison(name, decode(other))


def _write_function(function: Callable[..., Any]) -> Json:
    for namespace, holder in _NAMESPACES.items():
        name = getattr(function, "__name__", "")
        if name and getattr(holder, name, None) == function:
            return [namespace, name]
    raise ArtifactError(f"expected a function of PyTorch, found {function}")


def _read_function(content: Json) -> Callable[..., Any]:
    namespace, name = content
    function = getattr(_NAMESPACES[namespace], name, None)
    if not callable(function):
        raise ArtifactError(f"artifact: expected a function {namespace}.{name}, found none")
    return function


def _write_value(value: Any) -> Json:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_write_value(item) for item in value]}
    return {"plain": encode(value)}


def _read_value(content: Json) -> Any:
    ((kind, inner),) = content.items()
    if kind == "array":
        dtype, shape, data = inner
        return np.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(_read_value, inner))
    return decode(inner)
