"""attention_ops: the ops that are attentions, with their operands, layouts and results.

The registry is keyed by the names of ops, as :mod:`torch.library` is. It has PyTorch's own ops,
those of common kernel libraries (an op that is not installed never occurs in a graph), and those
that users add with :func:`register_attention_op`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pabc.internals.ops import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    find_schema,
    packet_name,
    registered,
    schema_of,
)

_SEQUENCE, _PACKED, _FEATURES, _OTHER = "smnl", "t", "dkc", "bhg"
_LAYOUT_PATTERN = re.compile(rf"(\.\.\.)?[{_SEQUENCE}{_PACKED}{_FEATURES}{_OTHER}]+")


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """The roles of an operand's dimensions, one letter each.

    `open_ended`: any number of batch-like dimensions may come before them.
    """

    letters: str
    open_ended: bool

    def dim(self, letters: str) -> int:
        """Returns the dimension, counted from the end, that has one of these letters."""
        return next(i for i, c in enumerate(self.letters) if c in letters) - len(self.letters)

    def fits(self, rank: int) -> bool:
        """Returns True if a tensor of this rank can have this layout."""
        return rank >= len(self.letters) if self.open_ended else rank == len(self.letters)

    @property
    def sequence(self) -> int:
        """The dimension of the tokens, counted from the end."""
        return self.dim(_SEQUENCE + _PACKED)

    @property
    def features(self) -> int:
        """The dimension of the features, counted from the end."""
        return self.dim(_FEATURES)

    @property
    def is_packed(self) -> bool:
        """True if several sequences are concatenated in the dimension of the tokens."""
        return _PACKED in self.letters

    def __str__(self) -> str:
        return "..." * self.open_ended + self.letters


@dataclass(frozen=True, slots=True)
class AttentionOp:
    """An op's operands, by name or position, their layouts, and which result is the attention's."""

    name: str
    query: str | int
    key: str | int
    value: str | int
    layouts: tuple[AttentionLayout, ...]
    output: str | int
    offsets: str = ""  # name of the argument that, if not None, means packed sequences


_REGISTRY: dict[str, AttentionOp] = {}


def register_attention_op(
    op: Any,
    *,
    layout: str | Sequence[str],
    query: str | int = 0,
    key: str | int = 1,
    value: str | int = 2,
    output: str | int = 0,
) -> None:
    """Registers an op as an attention: it computes softmax(query @ key^T) @ value.

    Args:
        op: what :func:`torch.library.custom_op` returns, an `OpOverload` or `OpOverloadPacket`
            (`torch.ops.mylib.attend`), a higher-order op, or a name, `"mylib::attend"`, which need
            not exist yet.
        layout: one letter for each dimension of the query, the key and the value: `b` batch, `h`
            (or `g`) heads, `s` (or `m`, `n`, `l`) the sequence, `d` (or `k`, `c`) features. Thus
            `"bhsd"` for PyTorch's own, `"bshd"` for flash-attention, `"bmhk"` for xformers. `t`
            instead of `s` means several sequences packed into one dimension (`"thd"`). Only tensor
            data then tells which tokens attend to each other, so that the user states the kind of
            all attentions but cross attention. A leading `...` stands for any number of dimensions.
            Give several layouts if the op takes operands of several ranks.
        query, key, value: the operands: an argument's name, or its position. Keys may have fewer
            heads than queries.
        output: the position of the attention's result among several; or the name of the argument
            that it is written to. Its layout is the query's.

    An earlier registration of the op, by users or by pabc, is replaced. Models that are compiled
    already stay as they are.

    Raises:
        TypeError: `op` is no operator.
        ValueError: a name or a layout is malformed, or the op has no such tensor argument.

        @torch.library.custom_op("mylib::attend", mutates_args=())
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

        pabc.register_attention_op(attend, query="q", key="k", value="v", layout="bshd")
    """
    name, schema = _identify(op)
    layouts = [layout] if isinstance(layout, str) else list(layout)
    facts = AttentionOp(
        name, query, key, value, tuple(_parse(name, text) for text in layouts), output
    )
    if not layouts:
        raise ValueError(f"attention op {name}: expected at least one layout, found none")
    if schema is not None:
        _check_arguments(facts, schema)
    _REGISTRY[name] = facts


def _identify(op: Any) -> tuple[str, torch.FunctionSchema | None]:
    """Returns an operator's name, and its schema if it is defined already."""
    if isinstance(op, str):
        if not re.fullmatch(r"\w+::\w+(\.\w+)?", op):
            raise ValueError(
                f"op: expected a name like 'namespace::name' or 'namespace::name.overload', "
                f"found {op!r}"
            )
        namespace, _, rest = op.partition("::")
        packet, _, overload = rest.partition(".")
        try:
            found = getattr(getattr(torch.ops, namespace), packet)
            return op, _schema(getattr(found, overload) if overload else found)
        except AttributeError:
            return op, None  # not loaded yet
    op = registered(op)  # of a torch.library.custom_op
    if isinstance(op, OpOverload):
        return op.name(), schema_of(op)
    if isinstance(op, OpOverloadPacket):
        return packet_name(op), _schema(op)
    if isinstance(op, HigherOrderOperator):
        return _name(op), None
    raise TypeError(
        "op: expected an operator (of torch.library.custom_op or torch.ops) or its name "
        f"'namespace::name', found {type(op).__name__}; a graph has no node for a Python "
        "function, but for the ops that it calls"
    )


def _schema(op: Any) -> torch.FunctionSchema | None:
    overloads: list[str] = op.overloads() if isinstance(op, OpOverloadPacket) else []
    found = getattr(op, overloads[0]) if len(overloads) == 1 else op
    return find_schema(found)


def _parse(name: str, text: object) -> AttentionLayout:
    letters = text.lower() if isinstance(text, str) else ""
    if _LAYOUT_PATTERN.fullmatch(letters):
        layout = AttentionLayout(letters.removeprefix("..."), letters.startswith("..."))
        counts = [
            sum(c in group for c in layout.letters) for group in (_SEQUENCE + _PACKED, _FEATURES)
        ]
        if counts == [1, 1] and len(set(layout.letters)) == len(layout.letters):
            return layout
    raise ValueError(
        f"attention op {name}: layout: expected one letter per dimension, one of them the sequence "
        f"(s, m, n, l; packed: t), one the features (d, k, c), others b, h, g; like 'bhsd', "
        f"'bshd' or 'thd'; found {text!r}"
    )


def _check_arguments(facts: AttentionOp, schema: torch.FunctionSchema) -> None:
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    names = [a.name for a in schema.arguments]
    for role in ("query", "key", "value"):
        stated = getattr(facts, role)
        argument = dict(enumerate(names)).get(stated) if isinstance(stated, int) else stated
        if argument not in tensors:
            raise ValueError(
                f"attention op {facts.name}: {role}: expected a tensor argument of "
                f"{names} (by name or position), found {stated!r}"
            )
    if isinstance(facts.output, int):
        valid, allowed = 0 <= facts.output < len(schema.returns), f"0 to {len(schema.returns) - 1}"
    else:
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        valid, allowed = facts.output in written, f"an argument that is written to, {written}"
    if not valid:
        raise ValueError(
            f"attention op {facts.name}: output: expected {allowed}, found {facts.output!r}"
        )


def _name(target: Any) -> str:
    """Returns the name that an op is registered under: its overload's, or else the packet's."""
    if isinstance(target, OpOverload):
        return target.name() if target.name() in _REGISTRY else schema_of(target).name
    if isinstance(target, HigherOrderOperator):
        return f"{target.namespace}::{target.name()}"
    return ""


def is_attention(op: Any) -> bool:
    """Returns True if an op is registered as an attention."""
    return _name(op) in _REGISTRY


def registered_op(op: Any) -> AttentionOp:
    """Returns the registration of an op that is an attention."""
    return _REGISTRY[_name(op)]


def _ship(layouts: str | Sequence[str], *names: str, offsets: str = "") -> None:
    texts = (layouts,) if isinstance(layouts, str) else tuple(layouts)
    for name in names:
        parsed = tuple(_parse(name, text) for text in texts)
        _REGISTRY[name] = AttentionOp(name, 0, 1, 2, parsed, 0, offsets)


_ship(
    "...sd",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "higher_order::flex_attention",
)
_ship(("bshd", "thd"), "aten::_flash_attention_forward", offsets="cum_seq_q")
_ship("bshd", "aten::_efficient_attention_forward", offsets="cu_seqlens_q")
_ship("thd", "torch_attn::_varlen_attn")
# flash-attention 2 and 3, diffusers' wrapper of the latter, xformers.
_ship("bshd", "flash_attn::_flash_attn_forward", "_diffusers_flash_attn_3::_flash_attn_forward")
_ship("thd", "flash_attn::_flash_attn_varlen_forward")
_ship(
    ("bshd", "thd"),
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
    offsets="cu_seqlens_q",
)
_ship(
    ("bmhk", "bmghk"),
    "xformers::efficient_attention_forward_cutlass",
    offsets="cu_seqlens_q",
)
