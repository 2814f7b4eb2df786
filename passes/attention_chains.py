"""attention_chains: finds attention that is written out as two matrix products.

One product is an operand of the other, (A B) C, possibly after scales, masks, normalizations, casts
and layout changes, and the second sums over a dimension that only one of A and B has. If that is a
dimension of tokens, the first product computes the scores of queries and keys, and the second mixes
values: softmax(Q K^T) V, however the softmax is written, or another function in its place. If
instead the first product sums over tokens, it is linear attention: Q (K^T V).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .axes import infer
from .ir import (
    GETITEM,
    Axis,
    Dims,
    Factor,
    Reach,
    aten,
    is_call,
    is_pointwise,
    is_tensor,
    value,
)
from .provenance.factors import Dimension, combine, is_named, length, unknown
from .relations.einsums import Einsum, as_einsum, is_weight
from .relations.groups import LAYOUTS, SOFTMAXES, SPLITS

_EXPONENTIALS = frozenset({*SOFTMAXES, aten.exp.default, aten.log_softmax.int, aten.exp2.default})
_CARRIERS = frozenset(
    {
        *LAYOUTS,
        *_EXPONENTIALS,
        aten._log_softmax.default,
        aten.expand.default,
        aten.cat.default,
        aten.slice.Tensor,
        aten.select.int,
        *SPLITS,
        aten.constant_pad_nd.default,
        aten.pad.default,
        aten.dropout.default,
        GETITEM,
    }
)


@dataclass(frozen=True)
class AttentionChain:
    """An attention that consists of two products: `first` and `node`, the last one.

    `path` has the nodes between them. `query_source` and `key_source` are the operands. `query` and
    `key` are the factors of their sequence dimensions, `features` those of the dimension that the
    product with the query sums over, and `outer` those of the query's other dimensions. `linear`:
    keys are multiplied with values first.
    """

    node: Node
    query_source: Node
    key_source: Node
    query: Dimension
    key: Dimension
    features: Dimension
    outer: Dimension
    linear: bool
    first: Node
    path: tuple[Node, ...]


def find_chains(gm: GraphModule, reach: Reach) -> list[AttentionChain]:
    """Returns the attentions that are written out as products, in graph order."""
    products = {
        node: product
        for node in gm.graph.nodes
        if is_tensor(node) and (product := as_einsum(node)) is not None
        if sum(not is_weight(n) for n in product.operands) > 1
    }
    chains: dict[Node, AttentionChain] = {}
    for node, last in products.items():
        found = [
            chain
            for k, operand in enumerate(last.operands)
            for first, path in _nearest_products(operand, products, reach)
            if first.node not in chains
            if (chain := _match(first, last, k, path)) is not None
        ]
        if found:  # products of scores before products of keys and values
            chains[node] = min(found, key=lambda chain: chain.linear)
    return list(chains.values())


def _nearest_products(
    start: Node, products: dict[Node, Einsum], reach: Reach
) -> list[tuple[Einsum, list[Node]]]:
    """Returns the nearest products that `start` depends on, each with the nodes on the path.

    The ops on the path keep the dimensions of the product apart; they are in graph order.
    """
    queue, seen = [start], {start}
    carriers: set[Node] = set()
    nearest = []
    for node in queue:
        if node in products:
            nearest.append(products[node])
        elif is_pointwise(node) or is_call(node, _CARRIERS):
            carriers.add(node)
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return [(product, _path(product.node, start, carriers, reach)) for product in nearest]


def _path(source: Node, sink: Node, carriers: set[Node], reach: Reach) -> list[Node]:
    reached = {source: None}
    for node in reach.between(source, sink):
        if node in carriers and any(n in reached for n in node.all_input_nodes):
            reached[node] = None
    return list(reached)[1:]


def _match(first: Einsum, last: Einsum, k: int, path: list[Node]) -> AttentionChain | None:
    """Returns the attention that two products make, or None if they make none.

    Operand `k` of the last product depends on the first product by `path`.
    """
    inner = last.contracted(k)
    traced = _trace(first, last.operands[k], path)
    kept = {first.result[d] for label in inner for d in traced[last.terms[k].index(label)]}
    keys = [label for label in first.result if label in kept and _count(first, label) == 1]
    if not keys:
        return None
    every = dict.fromkeys(label for term in first.terms for label in term)
    summed = [n for n in every if n not in first.result and _count(first, n) > 1]
    if not summed:
        return None
    softmax = any(is_call(n, _EXPONENTIALS) for n in path)
    mixes, summarizes = _name_tokens(last, inner), _name_tokens(first, summed)
    if mixes or softmax:  # attention among channels, too: its first product sums over tokens
        key = next(n for n, t in zip(first.operands, first.terms, strict=True) if keys[0] in t)
        pairs = zip(first.operands, first.terms, strict=True)
        query = next((n for n, t in pairs if n is not key and set(t) & set(summed)), key)
        mixing, queries, sources = last, [k], (query, key)
    elif summarizes:
        others = [i for i in range(len(last.terms)) if i != k and set(inner) & {*last.terms[i]}]
        mixing, queries = first, others
        sources = (last.operands[others[0]], first.operands[0])
    else:
        return None
    tokens, features = (inner, (first, summed)) if mixing is last else (summed, (last, inner))
    query_dims, key_dims, outer = _tokens(last, mixing, tokens, queries)
    chain = AttentionChain(
        last.node,
        *sources,
        query_dims,
        key_dims,
        _dimension_of(*features),
        outer,
        linear=mixing is first,
        first=first.node,
        path=tuple(path),
    )
    # Without a softmax, only token axes tell queries from features.
    return chain if softmax or is_named(chain.query) else None


def find_unclaimed_softmaxes(gm: GraphModule, chains: list[AttentionChain]) -> list[Node]:
    """Returns the softmaxes over tokens of an input that are in none of these attentions."""
    claimed = {node for chain in chains for node in chain.path}
    products = {node for chain in chains for node in (chain.first, chain.node)}
    return [
        node
        for node in gm.graph.nodes
        if is_call(node, SOFTMAXES) and is_tensor(node) and is_named(_softened(node))
        if node not in claimed and not _leads_to(node, products)
    ]


def _softened(node: Node) -> Dimension:
    dims: Dims = node.meta["axes"]
    return dims[int(node.args[1])]


def _leads_to(start: Node, products: set[Node]) -> bool:
    """Returns True if `start` reaches one of the products by ops that keep its dimensions apart."""
    queue, seen = [start], {start}
    for node in queue:
        for user in node.users:
            if user in products:
                return True
            if user not in seen and (is_pointwise(user) or is_call(user, _CARRIERS)):
                seen.add(user)
                queue.append(user)
    return False


def _tokens(
    last: Einsum, mixing: Einsum, summed: list[str], queries: list[int]
) -> tuple[Dimension, Dimension, Dimension]:
    """Returns the query, key and outer factors.

    The query dimensions are those of the result that only the operands `queries` have.
    """
    rest = {
        label
        for i, term in enumerate(last.terms)
        if i not in queries and set(term) & set(last.contracted(queries[0]))
        for label in term
    }
    query: list[Factor] = []
    outer: list[Factor] = []
    for i in queries:
        dims: Dims = last.operands[i].meta["axes"]
        for label, dim in zip(last.terms[i], dims, strict=True):
            if label in last.result:
                (outer if label in rest else query).extend(dim)
    return tuple(query), _dimension_of(mixing, summed), tuple(outer)


def _count(product: Einsum, label: str) -> int:
    return sum(label in term for term in product.terms)


def _dimensions(product: Einsum, label: str) -> list[Dimension]:
    """Returns the dimension with this label of each operand that has it."""
    return [
        n.meta["axes"][term.index(label)]
        for n, term in zip(product.operands, product.terms, strict=True)
        if label in term
    ]


def _dimension(product: Einsum, label: str) -> Dimension:
    dims = _dimensions(product, label)
    return combine((max(map(length, dims)),), [(dim,) for dim in dims])[0]


def _dimension_of(product: Einsum, labels: list[str]) -> Dimension:
    return tuple(f for label in labels for f in _dimension(product, label))


def _name_tokens(product: Einsum, labels: list[str]) -> bool:
    """Returns True if some label stands for tokens of an input in all operands that have it."""
    return any(all(map(is_named, _dimensions(product, label))) for label in labels)


def _trace(first: Einsum, operand: Node, path: list[Node]) -> list[set[int]]:
    """Returns, for each dimension of `operand`, the dimensions of the first product in it."""
    name = f"result of {first.node.name}"
    shape = tuple(value(first.node).shape)
    known = {first.node: tuple((Factor(s, Axis(name, d)),) for d, s in enumerate(shape))}
    for node in path:
        if is_tensor(node) or isinstance(node.meta["val"], (tuple, list)):
            known[node] = infer(node, lambda n: known.get(n) or unknown(tuple(value(n).shape)))
    return [
        {axis.dim for factor in dim for axis in factor.axes() if axis.source == name}
        for dim in known[operand]
    ]
