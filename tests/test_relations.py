"""The table of relations against the ops themselves, on small tensors.

A relation says which elements of the operands each element of a result may depend on; where it is
exact, which one it is; and along a dimension that is kept, that all positions are treated alike.
Each of these is checked on every op of the table: one that is stated wrongly fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map_only

from pabc.passes.ir import aten
from pabc.passes.relations.table import RELATIONS, relate_results
from pabc.passes.relations.terms import (
    Across,
    Join,
    Keep,
    Like,
    Merge,
    Mix,
    Narrow,
    New,
    Pad,
    Pick,
    Regroup,
    Relation,
    Roll,
    Source,
    Stack,
    Unknown,
    Write,
)


@dataclass
class OpCall:
    """A call of an op; tensors among its arguments are its operands, calls are computed first."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, changed: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        """Returns the results, with other values in place of some tensors."""

        def resolve(x):
            return x.run(changed)[0] if isinstance(x, OpCall) else (changed or {}).get(id(x), x)

        args, kwargs = tree_map_only((Tensor, OpCall), resolve, (self.args, self.kwargs))
        torch.manual_seed(0)
        found = self.op(*args, **kwargs)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    def trace(self, graph: Graph, nodes: dict[int, Node]) -> Node:
        """Returns the call in a graph; `nodes` gains a placeholder for each tensor."""

        def resolve(x):
            if isinstance(x, OpCall):
                return x.trace(graph, nodes)
            if id(x) not in nodes:
                nodes[id(x)] = graph.placeholder(f"x{len(nodes)}")
                nodes[id(x)].meta["val"] = x
            return nodes[id(x)]

        args, kwargs = tree_map_only((Tensor, OpCall), resolve, (self.args, self.kwargs))
        node = graph.call_function(self.op, args, kwargs)
        found = self.run()
        node.meta["val"] = found if len(self.op._schema.returns) > 1 or self.is_list else found[0]
        return node

    @property
    def is_list(self) -> bool:
        return "Tensor[]" in str(self.op._schema.returns[0].type) or "List" in str(
            self.op._schema.returns[0].type
        )

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, each once, in order."""
        found: dict[int, Tensor] = {}

        def note(x):
            found.update({id(x): x} if isinstance(x, Tensor) else {id(y): y for y in x.tensors()})
            return x

        tree_map_only((Tensor, OpCall), note, (self.args, self.kwargs))
        return list(found.values())


def call(op, *args, **kwargs):
    return OpCall(op, args, kwargs)


# Which positions of a result's dimension may depend on one element of an operand.


def is_at(term, tensor: Node, at: tuple[int, ...]) -> Tensor:
    """A mask of the positions along a term that may depend on the element `at` of a tensor."""
    every, none = torch.ones(term.size, dtype=torch.bool), torch.zeros(term.size, dtype=torch.bool)

    def only(*positions: int) -> Tensor:
        mask = none.clone()
        mask[[p for p in positions if 0 <= p < term.size]] = True
        return mask

    def along(sources):
        return [s for s in sources if s.tensor is tensor]

    match term:
        case Keep():
            kept = [s for s in along(term.operands) if s.size == term.size]
            return only(*(at[s.dim] for s in kept)) if kept else every
        case Regroup(run, sizes, index) if along(run):
            flat = 0
            for s in run:
                flat = flat * s.size + at[s.dim]
            return only(flat // prod(sizes[index + 1 :]) % sizes[index])
        case Narrow(size, source, start, step) if source.tensor is tensor:
            return only(*(i for i in range(size) if start + i * step == at[source.dim]))
        case Join(parts) if along(parts):
            starts = [sum(p.size for p in parts[:i]) for i in range(len(parts))]
            pairs = zip(parts, starts, strict=True)
            return only(*(n + at[p.dim] for p, n in pairs if p.tensor is tensor))
        case Stack(tensors) if tensor in tensors:
            return only(*(i for i, n in enumerate(tensors) if n is tensor))
        case Merge(terms):
            mask = torch.ones(1, dtype=torch.bool)
            for inner in terms:
                mask = (mask[:, None] & is_at(inner, tensor, at)).flatten()
            return mask
        case Roll(size, source, shift, is_reversed) if source.tensor is tensor:
            position = (at[source.dim] + shift) % size
            return only(size - 1 - position if is_reversed else position)
        case Pad(_, source, before) if source.tensor is tensor:
            return only(at[source.dim] + before)
        case Pick(size, indices) if along(indices):
            return only(*(at[s.dim] for s in along(indices) if s.size == size))
        case Write(whole, written, dim, span):
            if whole.tensor is tensor:
                return only(at[whole.dim])
            if written is tensor and span is not None:
                return only(*span) if dim is None else only(span[at[dim]])
        case Like() | New(is_constant=True):
            return none
    return every


def may_depend(relation: Relation, tensor: Node, at: tuple[int, ...]) -> Tensor:
    """A mask of the elements of a result that may depend on the element `at` of a tensor."""
    mask = torch.tensor(True)
    for select in relation.selected:
        if select.source.tensor is tensor and select.position not in (None, at[select.source.dim]):
            mask = torch.tensor(False)
    for term in relation.terms:
        mask = mask[..., None] & is_at(term, tensor, at)
    return mask


def names_of(term) -> set[Node]:
    """The tensors that a term names."""
    match term:
        case Keep():
            return {s.tensor for s in term.operands}
        case Regroup(run):
            return {s.tensor for s in run}
        case Join(parts):
            return {s.tensor for s in parts}
        case Stack(tensors):
            return set(tensors)
        case Merge(terms) | Mix(_, terms):
            return {n for inner in terms for n in names_of(inner)}
        case Narrow(source=source) | Roll(source=source) | Pad(source=source):
            return {source.tensor}
    return set()


def other_value(x: Tensor) -> Any:
    """A value that differs: of a mask the opposite, of an index another valid one."""
    if x.dtype == torch.bool:
        return ~x
    return x + 1.625 if x.is_floating_point() or x.is_complex() else (x + 1) % 2


def differs(a: Tensor, b: Tensor) -> Tensor:
    return ~((a == b) | ((a != a) & (b != b)))


def check(case: OpCall) -> None:
    """The relations of a call's results are true of it."""
    nodes: dict[int, Node] = {}
    node = case.trace(Graph(), nodes)
    relations = relate_results(node)
    several = relations if isinstance(relations, tuple) else (relations,)
    results = case.run()
    assert len(several) == len(results)
    for i, relation in enumerate(several):
        assert tuple(term.size for term in relation.terms) == results[i].shape
        check_dependence(case, nodes, relation, i)
        check_alike(case, nodes, relation, i)
        if relation.is_exact:
            check_exact(case, nodes, relation, i)


def check_dependence(case: OpCall, nodes: dict[int, Node], relation: Relation, i: int) -> None:
    """An element that changes, changes only what the relation allows."""
    before = case.run()[i]
    for x in case.tensors():
        for at in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(-1, x.ndim).tolist():
            y = x.clone()
            y[tuple(at)] = other_value(x[tuple(at)])
            after = case.run({id(x): y})[i]
            if after.shape != before.shape:  # a mask that picks
                assert all(isinstance(term, Unknown) for term in relation.terms)
                continue
            changed = differs(after, before)
            allowed = may_depend(relation, nodes[id(x)], tuple(at))
            assert not (changed & ~allowed).any(), (nodes[id(x)], at)


def check_exact(case: OpCall, nodes: dict[int, Node], relation: Relation, i: int) -> None:
    """Each element is the one that the relation names; a constant where it names none."""
    named = set().union(
        *map(names_of, relation.terms), (s.source.tensor for s in relation.selected)
    )
    operands = [x for x in case.tensors() if nodes[id(x)] in named]
    numbers, expected, count = {}, torch.zeros(case.run()[i].shape), 0
    for x in operands:
        number = torch.arange(1.0, x.numel() + 1).view(x.shape) + count
        count += x.numel()
        numbers[id(x)] = number.to(x.dtype)
        for at in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(-1, x.ndim).tolist():
            mask = may_depend(relation, nodes[id(x)], tuple(at))
            assert not expected[mask].any(), "two elements are named"
            expected[mask] = number[tuple(at)]
    assert torch.equal(case.run(numbers)[i].to(expected.dtype), expected)


def check_alike(case: OpCall, nodes: dict[int, Node], relation: Relation, i: int) -> None:
    """Along a dimension that is kept, operands in another order give results in that order."""
    before = case.run()[i]
    for dim, term in enumerate(relation.terms):
        if not isinstance(term, Keep) or term.size == 1:
            continue
        order = torch.arange(term.size).roll(1)
        permuted = {}
        for x in case.tensors():
            dims = [s.dim for s in term.operands if s.tensor is nodes[id(x)] and s.size > 1]
            for d in set(dims):
                permuted[id(x)] = permuted.get(id(x), x).index_select(d, order)
        expected = before.index_select(dim, order)
        torch.testing.assert_close(case.run(permuted)[i], expected, equal_nan=True)


GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def index(*shape):
    return torch.randint(0, 2, shape, generator=GENERATOR)


def flags(*shape):
    return index(*shape) > 0


def norm_of_channels(op, *more):
    return call(op, rand(2, 4, 3), rand(4), rand(4), *more)


CASES = [
    # layouts
    call(aten.clone.default, rand(2, 3)),
    call(aten.contiguous.default, rand(3, 2).t()),
    call(aten.alias.default, rand(2, 3)),
    call(aten.detach.default, rand(2, 3)),
    call(aten._to_copy.default, rand(2, 3), dtype=torch.float32),
    call(aten.view.default, rand(4, 6), [2, 12]),
    call(aten.view.default, rand(4, 6), [8, 3, 1]),
    call(aten._unsafe_view.default, rand(2, 1, 6), [3, 4]),
    call(aten.reshape.default, rand(4, 3).t(), [2, 6]),
    call(aten.permute.default, rand(2, 3, 4), [2, 0, -2]),
    call(aten.transpose.int, rand(2, 3, 4), 1, -1),
    call(aten.t.default, rand(2, 3)),
    call(aten.t.default, rand(3)),
    call(aten.unsqueeze.default, rand(2, 3), -1),
    call(aten.squeeze.default, rand(1, 2, 1)),
    call(aten.squeeze.dim, rand(1, 2, 1), -1),
    call(aten.squeeze.dim, rand(1, 2), 1),
    call(aten.squeeze.dims, rand(1, 2, 1, 1), [0, 2]),
    call(aten.expand.default, rand(2, 1), [3, 2, 4]),
    call(aten.slice.Tensor, rand(5, 3), 0, 1, 4),
    call(aten.slice.Tensor, rand(5, 3), 0, -4, 2**62, 2),
    call(aten.slice.Tensor, rand(5, 3), 1),
    call(aten.select.int, rand(2, 3, 4), 1, 2),
    call(aten.select.int, rand(2, 3, 4), -1, -2),
    call(aten.split.Tensor, rand(5, 2), 2),
    call(aten.split_with_sizes.default, rand(2, 5), [1, 4], -1),
    call(aten.chunk.default, rand(5, 2), 2),
    call(aten.unbind.int, rand(2, 3), 1),
    call(aten.cat.default, [rand(2, 3), rand(2, 1)], -1),
    call(aten.cat.default, [*[rand(2, 3)] * 2, torch.empty(0, dtype=torch.float64)], 0),
    call(aten.stack.default, [rand(2, 3), rand(2, 3)], 1),
    call(aten.stack.default, [rand(2)] * 3, -1),
    call(aten.copy.default, rand(2, 3), rand(3)),
    call(aten.repeat.default, rand(2, 3), [2, 1, 3]),
    call(aten.repeat_interleave.self_int, rand(2, 3), 2, 0),
    call(aten.repeat_interleave.self_int, rand(2, 3), 2, -1),
    call(aten.repeat_interleave.self_int, rand(2, 3), 2),
    call(aten.roll.default, rand(4, 3), [1, -1], [0, 1]),
    call(aten.roll.default, rand(4, 3), [1, 2], [0, 0]),
    call(aten.roll.default, rand(4, 3), [1]),
    call(aten.flip.default, rand(4, 3), [0]),
    call(aten.take.default, rand(2, 3), index(4)),
    call(aten.as_strided.default, rand(2, 3), [3, 2], [1, 2]),
    call(aten.view_as_complex.default, rand(3, 2)),
    call(aten.view_as_real.default, torch.complex(rand(3), rand(3))),
    # constants
    *(
        call(getattr(aten, name).default, rand(2, 3), [4, 2], *value)
        for name, value in {"new_ones": (), "new_zeros": (), "new_full": (2.0,)}.items()
    ),
    *(
        call(getattr(aten, name).default, rand(2, 3), *value)
        for name, value in {"ones_like": (), "zeros_like": (), "full_like": (2.0,)}.items()
    ),
    call(aten.fill.Scalar, rand(2, 3), 2.0),
    call(aten.zero.default, rand(2, 3)),
    # reductions
    *(
        call(op, rand(2, 3, 2), dims, keepdim)
        for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
        for dims, keepdim in (([1], False), ([0, -1], True))
    ),
    call(aten.sum.dim_IntList, rand(2, 3), None),
    call(aten.mean.default, rand(2, 3)),
    call(aten.var.correction, rand(2, 3), [1], correction=0),
    call(aten.std.correction, rand(2, 3), [0], keepdim=True),
    call(aten.argmax.default, rand(2, 3), 1),
    call(aten.argmin.default, rand(2, 3), 0, True),
    call(aten.argmin.default, rand(2, 3)),
    call(aten.prod.dim_int, rand(2, 3), 1),
    call(aten.logsumexp.default, rand(2, 3), [1]),
    call(aten.any.dim, flags(2, 3), 1),
    call(aten.any.dims, flags(2, 3), [0]),
    call(aten.all.dim, flags(2, 3), 1, True),
    call(aten.all.dims, flags(2, 3), [0, 1]),
    call(aten.linalg_vector_norm.default, rand(2, 3), 2, [1], True),
    call(aten.norm.ScalarOpt_dim, rand(2, 3), 2, [0]),
    call(aten.softmax.int, rand(2, 3), -1),
    call(aten._softmax.default, rand(2, 3), 0, False),
    call(aten._safe_softmax.default, rand(2, 3), 1),
    call(aten.log_softmax.int, rand(2, 3), 1),
    call(aten.layer_norm.default, rand(2, 3, 4), [3, 4], rand(3, 4), rand(3, 4)),
    call(aten.rms_norm.default, rand(2, 4), [4], rand(4)),
    norm_of_channels(aten.batch_norm.default, rand(4), rand(4).exp(), False, 0.1, 1e-5, False),
    call(aten.batch_norm.default, rand(3, 2), None, None, None, None, True, 0.1, 1e-5, False),
    norm_of_channels(aten.instance_norm.default, None, None, True, 0.1, 1e-5, False),
    call(aten.group_norm.default, rand(3, 4, 2), 2, rand(4), rand(4)),
    # products
    call(aten.linear.default, rand(2, 3, 4), rand(5, 4), rand(5)),
    call(aten.mm.default, rand(2, 3), rand(3, 4)),
    call(aten.bmm.default, rand(2, 2, 3), rand(2, 3, 2)),
    call(aten.matmul.default, rand(2, 1, 2, 3), rand(4, 3, 2)),
    call(aten.matmul.default, rand(3), rand(2, 3, 2)),
    call(aten.matmul.default, rand(2, 3), rand(3)),
    call(aten.addmm.default, rand(4), rand(2, 3), rand(3, 4)),
    call(aten.addmm.default, rand(2, 1), rand(2, 3), rand(3, 4)),
    call(aten.baddbmm.default, rand(2, 1, 2), rand(2, 2, 3), rand(2, 3, 2)),
    call(aten.einsum.default, "bij,kj->kbi", [rand(2, 3, 2), rand(4, 2)]),
    call(aten.einsum.default, "...i,...i", [rand(2, 3), rand(3)]),
    call(aten.einsum.default, "ii->i", [rand(3, 3)]),
    call(aten.tensordot.default, rand(2, 3, 4), rand(4, 3, 2), [1, 2], [1, 0]),
    call(aten.inner.default, rand(2, 3), rand(4, 3)),
    call(aten.linalg_vecdot.default, rand(2, 3, 2), rand(2, 3, 2), dim=1),
    call(aten.cdist.default, rand(2, 3, 2), rand(2, 4, 2)),
    call(aten.mv.default, rand(2, 3), rand(3)),
    # indices
    call(aten.index.Tensor, rand(3, 4), [None, index(5)]),
    call(aten.index.Tensor, rand(3, 4, 2), [index(2, 3), index(3)]),
    call(aten.index.Tensor, rand(3, 4, 2), [index(3), None, index(3)]),
    call(aten.index.Tensor, rand(3, 4), [flags(3)]),
    call(aten.index.Tensor, rand(3, 4), [None, OpCall(aten.arange.start_step, (1, 4, 2))]),
    call(aten.index_select.default, rand(3, 4), 1, index(3)),
    call(aten.index_select.default, rand(3, 4), 0, OpCall(aten.arange.start, (1, 3))),
    call(aten.gather.default, rand(3, 4), 1, index(3, 2)),
    call(aten.gather.default, rand(3, 4), 1, index(2, 3)),
    call(aten.embedding.default, rand(2, 3), index(4, 2)),
    call(aten.one_hot.default, index(2, 3), 2),
    call(aten.argsort.default, rand(2, 3), 1),
    call(aten.index_put.default, rand(3, 4), [None, index(2)], rand(3, 2)),
    call(aten.index_put.default, rand(3, 4), [index(2)], rand(4)),
    call(aten.index_put.default, rand(3, 4), [index(2), index(2)], rand(2)),
    call(aten.slice_scatter.default, rand(5, 3), rand(2, 3), 0, 1, 3),
    call(aten.slice_scatter.default, rand(5, 3), rand(3, 3), 0, -5, 2**62, 2),
    call(aten.select_scatter.default, rand(3, 4), rand(3), -1, -2),
    call(aten.masked_scatter.default, rand(2, 3), flags(2, 3), rand(6)),
    call(aten.index_add.default, rand(3, 4), 0, index(2), rand(2, 4)),
    call(aten.index_copy.default, rand(3, 4), 1, torch.tensor([1, 0]), rand(3, 2)),
    call(aten.scatter.src, rand(3, 4), 1, index(3, 1), rand(3, 1)),
    call(aten.scatter.value, rand(3, 4), 1, index(3, 1), 2.0),
    call(aten.scatter_add.default, rand(3, 4), 0, index(2, 3), rand(2, 4)),
    call(aten.scatter_reduce.two, rand(3, 4), 1, index(3, 2), rand(3, 2), "amax"),
    # windows
    call(
        aten.convolution.default,
        rand(2, 2, 4),
        rand(3, 2, 2),
        rand(3),
        [2],
        [0],
        [1],
        False,
        [0],
        1,
    ),
    call(aten.conv1d.default, rand(2, 2, 4), rand(3, 2, 3), None, [1], [1]),
    call(aten.conv2d.default, rand(2, 2, 3, 2), rand(1, 2, 2, 2)),
    call(aten.conv2d.default, rand(2, 3, 2), rand(1, 2, 2, 2)),
    call(aten.conv3d.default, rand(1, 2, 2, 3, 2), rand(1, 2, 2, 1, 1)),
    call(aten.conv_transpose1d.default, rand(2, 2, 3), rand(2, 1, 2), None, [2]),
    call(aten.conv_transpose1d.default, rand(2, 2, 3), rand(2, 1, 2)),
    call(aten.conv_transpose2d.input, rand(1, 2, 2, 2), rand(2, 1, 2, 2), None, [2, 2]),
    call(aten.conv_transpose3d.input, rand(1, 1, 2, 1, 2), rand(1, 1, 2, 1, 1), None, [2, 1, 1]),
    call(aten.avg_pool1d.default, rand(2, 2, 4), [2]),
    call(aten.avg_pool2d.default, rand(2, 2, 3, 4), [1, 2]),
    call(aten.avg_pool3d.default, rand(1, 2, 2, 2, 2), [2, 1, 2]),
    call(aten.max_pool2d.default, rand(2, 2, 3, 4), [1, 2]),
    call(aten.adaptive_avg_pool1d.default, rand(2, 2, 4), [3]),
    call(aten.adaptive_avg_pool2d.default, rand(2, 3, 4), [2, 2]),
    call(aten.adaptive_avg_pool3d.default, rand(1, 2, 2, 3, 2), [1, 2, 2]),
    *(
        call(op, rand(2, 2, *[2] * n), [3] * n, *([False] if has_corners else []), None)
        for op, n, has_corners in (
            (aten.upsample_nearest1d.vec, 1, False),
            (aten.upsample_nearest2d.vec, 2, False),
            (aten.upsample_nearest3d.vec, 3, False),
            (aten._upsample_nearest_exact2d.vec, 2, False),
            (aten.upsample_linear1d.vec, 1, True),
            (aten.upsample_bilinear2d.vec, 2, True),
            (aten.upsample_trilinear3d.vec, 3, True),
            (aten.upsample_bicubic2d.vec, 2, True),
        )
    ),
    call(aten.glu.default, rand(2, 4, 3), 1),
    call(aten.constant_pad_nd.default, rand(2, 3), [1, 2, -1, 0]),
    call(aten.pad.default, rand(2, 3), [1, 2]),
    call(aten.pad.default, rand(2, 2, 4), [1, 1], "reflect"),
    call(aten.unfold.default, rand(2, 6), 1, 3, 3),
    call(aten.unfold.default, rand(2, 6), 1, 3, 2),
    call(aten.im2col.default, rand(1, 2, 4, 2), [2, 1], [1, 1], [0, 0], [2, 1]),
    call(aten.im2col.default, rand(1, 1, 4, 2), [2, 2], [1, 1], [1, 0], [1, 1]),
    call(aten.im2col.default, rand(1, 1, 4, 2), [2, 1], [2, 1], [1, 0], [2, 1]),
    call(aten.col2im.default, rand(1, 4, 4), [4, 2], [2, 1], [1, 1], [0, 0], [2, 1]),
    call(aten.col2im.default, rand(1, 4, 6), [4, 3], [2, 2], [1, 1], [0, 0], [1, 1]),
    call(aten.pixel_shuffle.default, rand(2, 8, 2, 1), 2),
    call(aten.pixel_unshuffle.default, rand(1, 2, 4, 2), 2),
]
NEW_MEMORY = {aten.new_empty.default, aten.new_empty_strided.default, aten.empty_like.default}
"""Ops whose values are whatever their memory held: nothing to compare."""


def name_of(case: OpCall) -> str:
    return str(case.op).removeprefix("aten.")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_relation_is_true_of_its_op(case):
    check(case)


def test_every_op_of_the_table_is_checked():
    assert {case.op for case in CASES} | NEW_MEMORY == set(RELATIONS)


sdpa = aten.scaled_dot_product_attention.default


@pytest.mark.parametrize(
    "case",
    [
        call(aten.add.Tensor, rand(2, 3), rand(3)),
        call(aten.where.self, flags(2, 1), rand(2, 3), rand(3)),
        call(sdpa, rand(2, 2, 3, 2), rand(2, 2, 4, 2), rand(2, 2, 4, 3)),
        call(sdpa, rand(2, 2, 3, 2), rand(2, 1, 4, 2), rand(2, 1, 4, 3), flags(2, 1, 3, 4)),
        call(sdpa, rand(2, 2, 3, 2), rand(2, 2, 4, 2), rand(2, 2, 4, 3), None, 0.0, True),
        call(sdpa, *(rand(1, n, 3, 2) for n in (4, 2, 2)), enable_gqa=True),
    ],
    ids=name_of,
)
def test_relations_that_no_entry_states(case):
    """Pointwise ops, and attention."""
    check(case)


@pytest.mark.parametrize(
    ("checker", "op", "args"),
    [
        (check_exact, aten.flip.default, ([1],)),
        (check_dependence, aten.cumsum.default, (1,)),
        (check_alike, aten.tril.default, ()),
    ],
)
def test_a_wrong_relation_is_found(checker, op, args):
    """The checks themselves: each op stated as if it kept both dimensions."""
    x = rand(3, 3)
    nodes = {id(x): Graph().placeholder("x")}
    nodes[id(x)].meta["val"] = x
    kept = tuple(Keep(3, (Source(nodes[id(x)], d),)) for d in range(2))
    with pytest.raises(AssertionError):
        checker(call(op, x, *args), nodes, Relation(kept, is_exact=True), 0)


SIZES = st.sampled_from([1, 2, 3, 4])


@settings(deadline=None, max_examples=40)
@given(st.lists(SIZES, min_size=1, max_size=3), st.randoms())
def test_views_of_any_sizes(shape, random):
    """The same number of elements in other sizes, in a random order of the factors."""
    factors = [f for n in shape for f in ((2, 2) if n == 4 else (n,))]
    random.shuffle(factors)
    count = random.randint(1, len(factors))
    check(
        call(aten.view.default, rand(*shape), [*factors[: count - 1], prod(factors[count - 1 :])])
    )


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(-5, 5), st.integers(-5, 5), st.integers(1, 3))
def test_slices_of_any_bounds(size, start, stop, step):
    case = call(aten.slice.Tensor, rand(2, size), 1, start, stop, step)
    if case.run()[0].numel():
        check(case)


def test_parts_of_complex_numbers_lie_where_they_came_from():
    x = rand(3, 2)
    product = call(aten.mul.Tensor, call(aten.view_as_complex.default, x), 2.0)
    nodes: dict[int, Node] = {}
    relation = relate_results(call(aten.view_as_real.default, product).trace(Graph(), nodes))
    assert relation.terms[-1] == Across(2, (Source(nodes[id(x)], 1),))
