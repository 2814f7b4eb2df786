"""Puts the nodes into a folder of ComfyUI, and takes them out."""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDER = "comfyui-pabc"
"""The folder within `custom_nodes`."""
_CODE = '''"""The nodes of pabc. Written by `pabc comfyui install`."""

from pabc.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def install(folder: Path) -> Path:
    """Writes the folder of the nodes; returns it.

    Raises: ValueError for what is no folder of ComfyUI, or has these nodes already.
    """
    target = _find_nodes(folder) / FOLDER
    if target.exists():
        raise ValueError(
            f"{target}: expected no such folder, found one: the nodes are installed; "
            "`pabc comfyui uninstall` removes them"
        )
    target.mkdir()
    (target / "__init__.py").write_text(_CODE)
    return target


def uninstall(folder: Path) -> Path:
    """Removes the folder of the nodes; returns it.

    Raises: ValueError where it is not there, or was not written by :func:`install`.
    """
    target = _find_nodes(folder) / FOLDER
    code = target / "__init__.py"
    if not target.is_dir():
        raise ValueError(f"{target}: expected the folder of the nodes, found none")
    if not code.is_file() or code.read_text() != _CODE:
        raise ValueError(
            f"{target}: expected what `pabc comfyui install` wrote, found something else; "
            "remove it by hand"
        )
    shutil.rmtree(target)
    return target


def _find_nodes(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of ComfyUI, found none")
    nodes = folder / "custom_nodes"
    if not nodes.is_dir():
        raise ValueError(f"{folder}: expected a folder with custom_nodes in it, found none")
    return nodes
