"""Triton kernels, one a file, each with a plain PyTorch reference; imported as `pabc.kernels`.

This file imports no kernel: modules that need Triton import it when a kernel may be used.
"""

import pkgutil
from importlib import import_module


def register_all() -> None:
    """Registers the ops of all kernels with PyTorch, for code that calls them by name."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
