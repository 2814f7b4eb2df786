"""`pabc comfyui`: installs the nodes for ComfyUI, or removes them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pabc.commands.usage import UsageError


def add_comfyui(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    parser = commands.add_parser(
        "comfyui",
        help="install the nodes for ComfyUI, or remove them",
        description="Puts a folder with pabc's nodes into ComfyUI's custom_nodes, or removes it.",
    )
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that of ComfyUI")
    parser.set_defaults(run=run_comfyui)


def run_comfyui(options: argparse.Namespace) -> None:
    """Runs `pabc comfyui`."""
    from pabc.comfyui.install import install, uninstall

    change = install if options.action == "install" else uninstall
    try:
        target = change(options.folder)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if options.action == "uninstall":
        print(f"removed {target}; restart ComfyUI")
        return
    print(f"wrote {target}; restart ComfyUI")
    print("if ComfyUI has a Python of its own, install pabc with that one, too")
