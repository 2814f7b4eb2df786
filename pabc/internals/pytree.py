"""pytree: nested containers as lists of leaves (`torch.utils._pytree`).

- `tree_*`, `TreeSpec`, `SUPPORTED_NODES`: arguments and results, as torch.export takes them apart.
  Since 2.6.
- `keystr`, `SequenceKey`: the names of leaves in messages. Since 2.6.
- `TreeSpec.children`: the containers in saved artifacts. Since 2.10.
"""

from __future__ import annotations

from .release import expecting

with expecting("pytree"):
    from torch.utils._pytree import (
        SUPPORTED_NODES,
        SequenceKey,
        TreeSpec,
        keystr,
        tree_flatten,
        tree_flatten_with_path,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_structure,
        tree_unflatten,
    )

    TreeSpec.children  # noqa: B018

__all__ = [
    "SUPPORTED_NODES",
    "SequenceKey",
    "TreeSpec",
    "keystr",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]
