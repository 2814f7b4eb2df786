"""attention_calls: finds calls of attention ops in a graph, with their operands and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from pabc.base.flops import count_attention_flops
from pabc.internals.ops import HigherOrderOperator, find_schema, schema_of

from .attention_ops import AttentionLayout, AttentionOp, is_attention, registered_op
from .ir import GETITEM, is_tensor, value

_FUNCTIONALIZED = ("auto_functionalized", "auto_functionalized_v2")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call of an attention op: its operand nodes and their layout.

    `output` is the position of the attention's result if the op has several. `packed`: several
    sequences are concatenated in one dimension, and only tensor data tells them apart.
    """

    query: Node
    key: Node
    value: Node
    layout: AttentionLayout
    output: int
    packed: bool

    @property
    def flops(self) -> int:
        """The FLOPs of both products; an upper bound for packed sequences."""
        query, values = value(self.query), value(self.value)
        return count_attention_flops(
            query,
            keys=value(self.key).shape[self.layout.sequence],
            features=query.shape[self.layout.features],
            width=values.shape[self.layout.features],
        )


def _functionalized(node: Node) -> Any:
    """Returns the op that a node calls, without the wrapper of functionalization.

    Functionalization wraps ops that write to an argument.
    """
    target = node.target
    if isinstance(target, HigherOrderOperator) and target.name() in _FUNCTIONALIZED:
        return node.args[0]
    return target


def is_attention_op(node: Any) -> bool:
    """Returns True if `node` calls an op that is registered as an attention."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return is_attention(_functionalized(node))


def attention_call(node: Node) -> AttentionCall:
    """Returns the operands and the layout of a call of an attention op.

    Raises: ValueError if the call does not match the registration.
    """
    op = _functionalized(node)
    facts = registered_op(op)
    schema = find_schema(op)
    names = [a.name for a in schema.arguments] if schema is not None else []
    args = node.args[1:] if op is not node.target else node.args
    given = {**dict(enumerate(args)), **dict(zip(names, args, strict=False)), **node.kwargs}
    operands: list[Node] = []
    for role in ("query", "key", "value"):
        stated = getattr(facts, role)
        operand = given.get(stated)
        if operand is None and isinstance(stated, int) and stated < len(names):
            operand = given.get(names[stated])
        if not is_tensor(operand):
            raise ValueError(
                f"attention op {facts.name}, called by {node.name}: expected its {role} as "
                f"argument {stated!r}, found {operand!r}"
            )
        assert isinstance(operand, Node)
        operands.append(operand)
    ranks = {value(operand).ndim for operand in operands}
    layout = next((f for f in facts.layouts if all(map(f.fits, ranks))), None)
    if layout is None:
        stated_layouts = " or ".join(map(str, facts.layouts))
        raise ValueError(
            f"attention op {facts.name}, called by {node.name}: expected operands of layout "
            f"{stated_layouts}, found shapes {[tuple(value(n).shape) for n in operands]}"
        )
    packed = layout.is_packed or given.get(facts.offsets) is not None
    query, key, values = operands
    return AttentionCall(query, key, values, layout, _output_position(facts, op, node), packed)


def _output_position(facts: AttentionOp, op: Any, node: Node) -> int:
    """Returns the position of the attention's result among the results of a node.

    A functionalized op returns its own results, followed by each argument that it writes to.
    """
    if isinstance(facts.output, int):
        return facts.output
    written = [a.name for a in schema_of(op).arguments if a.alias_info and a.alias_info.is_write]
    first = len(node.meta["val"]) - len(written)
    return first + written.index(facts.output)


def attention_result(node: Node) -> Node | None:
    """Returns the node that yields the attention's result; None if nothing reads it."""
    if is_tensor(node) or not is_attention_op(node):
        return node
    position = attention_call(node).output
    return next((u for u in node.users if u.target is GETITEM and u.args[1] == position), None)


def check_result(node: Node, shape: Sequence[int]) -> None:
    """Checks that an attention's result of this shape is laid out as the query.

    Raises: ValueError if it is not.
    """
    call = attention_call(node)
    query = value(call.query).shape
    named = f"attention op {registered_op(_functionalized(node)).name}, called by {node.name}"
    if len(shape) != len(query):
        raise ValueError(
            f"{named}: expected a result laid out as the query, {call.layout}, found shape "
            f"{tuple(shape)}"
        )
    if shape[call.layout.sequence] != query[call.layout.sequence]:
        raise ValueError(
            f"{named}: expected as many tokens in the result as in the query ({call.layout}), "
            f"found shape {tuple(shape)}"
        )
