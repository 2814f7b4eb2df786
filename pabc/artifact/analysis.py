"""Writes a guarded graph and its facts as JSON, each fact field by field; reads them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.fx import GraphModule

from pabc.artifact.errors import ArtifactError
from pabc.artifact.graphs import GraphReader, GraphWriter
from pabc.artifact.reads import read_reads, write_reads
from pabc.artifact.tensors import TensorWriter, read_tensors
from pabc.artifact.values import Json, decode, encode
from pabc.passes import (
    Captured,
    Guarded,
    HookCall,
    ModelState,
    OpaqueCall,
    PrologueGraph,
    Reads,
)

_HOLDERS = {c.__name__: c for c in (Captured, Guarded, PrologueGraph)}
"""Facts that contain graphs, or other facts that do."""
_REBUILT = ("calls", "modules")
"""Fields of :class:`Captured` that are not saved, but rebuilt for the model that is loaded into."""
_CALL = ("path", "reason", "num_attentions", "call", "layouts", "results", "keeps")
"""The saved fields of an :class:`OpaqueCall`."""


def write_guarded(guarded: Guarded) -> tuple[Json, bytes]:
    """Returns the guarded graph as JSON for :func:`read_guarded`, and the bytes of its constants.

    Raises: :class:`ArtifactError` naming the node or value that cannot be saved.
    """
    calls = guarded.captured.calls
    for call in calls:
        if isinstance(call, HookCall):
            raise ArtifactError(
                f"{call.path}: expected no hooks with side effects, found one; remove it"
            )
    tensors = TensorWriter()
    content = {
        "calls": [{name: encode(getattr(call, name)) for name in _CALL} for call in calls],
        "guarded": _write(guarded, GraphWriter(calls, tensors)),
        "constants": tensors.table,
    }
    return content, tensors.data


def _write(value: Any, writer: GraphWriter) -> Json:
    if _HOLDERS.get(type(value).__name__) is type(value):
        names = [f.name for f in fields(value) if f.name not in _REBUILT]
        parts = {name: _write(getattr(value, name), writer) for name in names}
        return {"fact": [type(value).__name__, parts]}
    if isinstance(value, GraphModule):
        return {"graph": writer.write(value)}
    if isinstance(value, Reads):
        return {"reads": write_reads(value, writer)}
    return {"value": encode(value)}


def read_guarded(content: Json, constants: bytes, model: nn.Module) -> Guarded:
    """Returns the guarded graph over the tensors of `model`."""
    calls = tuple(
        OpaqueCall(model, **{name: decode(part) for name, part in call.items()})
        for call in content["calls"]
    )
    for call in calls:
        call.register()
    graphs = GraphReader(model, read_tensors(content["constants"], constants), calls)
    guarded = _GuardedReader(model, calls, graphs).read(content["guarded"])
    if not isinstance(guarded, Guarded):
        raise ArtifactError(f"artifact: expected a guarded graph, found {type(guarded).__name__}")
    return guarded


class _GuardedReader:
    """Reads a guarded graph for a model."""

    def __init__(self, model: nn.Module, calls: Sequence[OpaqueCall], graphs: GraphReader) -> None:
        self._model, self._calls, self._graphs = model, tuple(calls), graphs

    def read(self, content: Json) -> Any:
        """Returns the value that :func:`_write` wrote."""
        ((tag, inner),) = content.items()
        if tag == "fact":
            name, parts = inner
            values = {field: self.read(part) for field, part in parts.items()}
            return _HOLDERS[name](**values, **self._rebuild(name, values))
        if tag == "graph":
            return self._graphs.read(inner)
        if tag == "reads":
            return read_reads(inner, self._graphs)
        return decode(inner)

    def _rebuild(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a fact that are not saved; `values` are the saved ones."""
        if name != Captured.__name__:
            return {}
        paths = {call.path for call in self._calls}
        modules = ModelState.of(self._model, paths, values["written"])
        return {"calls": self._calls, "modules": modules}
