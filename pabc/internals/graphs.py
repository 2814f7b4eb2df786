"""graphs: what `torch.fx` does not show.

- `LazyGraphModule`: a graph module that writes its Python code when it is first called. Since 2.6.
- `reserve_names`: no new node gets a name that an old one has. Since 2.6.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph

from .release import expecting

with expecting("torch.fx"):
    from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

    Graph()._graph_namespace._used_names  # noqa: B018

__all__ = ["LazyGraphModule", "reserve_names"]


def reserve_names(graph: Graph, names: Iterable[str]) -> None:
    """Makes a graph give new nodes other names than these."""
    graph._graph_namespace._used_names.update(names)
