"""Triton kernels, one a file, each with a plain PyTorch reference; imported as `pabc.kernels`.

Nothing is imported here: Triton is, by the modules that need it, when a kernel may be used.
"""

import pkgutil
from importlib import import_module


def register_all() -> None:
    """Makes all kernels known to PyTorch, by the names that compiled code calls them by."""
    for found in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{found.name}")
