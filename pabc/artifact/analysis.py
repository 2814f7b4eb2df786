"""What was found in a model for one call, as JSON: the guarded graph and the facts about it."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from pabc.artifact.errors import ArtifactError
from pabc.artifact.graphs import GraphReader, GraphWriter
from pabc.artifact.reads import read_reads, write_reads
from pabc.artifact.tensors import TensorWriter, read_tensors
from pabc.artifact.values import Json, decode, encode
from pabc.passes import (
    HookCall,
    ModelState,
    OpaqueCall,
)

_FACTS = (
    "regions",
    "steady",
    "signature",
    "latents",
    "outside",
    "aliases",
    "compiled",
    "written",
    "writes",
    "deleted",
)
"""Keys of `gm.meta` that are read after the analysis, beside those that hold graphs."""
_CALL = ("path", "reason", "num_attentions", "call", "layouts", "results", "keeps")
"""What is saved of an :class:`OpaqueCall`."""


def write_analysis(guarded: GraphModule) -> tuple[Json, bytes]:
    """The guarded graph with all that :func:`read_analysis` needs, and its constants' bytes.

    Raises: :class:`ArtifactError` naming what cannot be saved.
    """
    calls = guarded.meta["calls"]
    for call in calls:
        if isinstance(call, HookCall):
            raise ArtifactError(f"{call.path}: expected no hooks that keep something; remove it")
    tensors = TensorWriter()
    writer = GraphWriter(calls, tensors)
    prologue: GraphModule = guarded.meta["prologue"]
    content = {
        "guarded": writer.write(guarded),
        "prologue": writer.write(prologue),
        "prologue attentions": encode(prologue.meta["attentions"]),
        "reads": write_reads(guarded.meta["reads"], writer),
        "facts": {name: encode(guarded.meta[name]) for name in _FACTS},
        "calls": [{name: encode(getattr(call, name)) for name in _CALL} for call in calls],
        "constants": tensors.table,
    }
    return content, tensors.data


def read_analysis(content: Json, constants: bytes, model: nn.Module) -> GraphModule:
    """The guarded graph, over the tensors of `model`."""
    calls = tuple(
        OpaqueCall(model, **{name: decode(part) for name, part in call.items()})
        for call in content["calls"]
    )
    for call in calls:
        call.register()
    reader = GraphReader(model, read_tensors(content["constants"], constants), calls)
    guarded = reader.read(content["guarded"])
    prologue = reader.read(content["prologue"])
    prologue.meta["attentions"] = decode(content["prologue attentions"])
    prologue.meta["sizes"] = None
    guarded.meta.update({name: decode(part) for name, part in content["facts"].items()})
    guarded.meta["calls"] = calls
    guarded.meta["modules"] = ModelState.of(
        model, {call.path for call in calls}, guarded.meta["written"]
    )
    guarded.meta["prologue"] = prologue
    guarded.meta["reads"] = read_reads(content["reads"], reader)
    return guarded
