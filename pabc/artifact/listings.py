"""Reduces Inductor's own code of a block to what another process needs, and loads it there.

The code is a Python module, which calls kernels, each an extension module of its own, and ops of
PyTorch. What is left out compiles the kernels, and imports Inductor.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from pabc.internals.kernels import EXTERN, give_tensor_address, is_function_of_torch
from pabc.kernels import register_all
from pabc.passes import CompiledBlock, Listing

_FUNCTION = "call"
_CALLS_KERNELS = "torch.ops.pabc."


def reduce_listing(listing: Listing) -> Listing:
    """Returns the listing without the statements that its function does not need."""
    tree = ast.parse(listing.source)
    body = [part for statement in tree.body for part in _split(statement)]
    defined = {name: part for part in body for name in _defined(part)}
    needed, missing = set[ast.stmt](), [_FUNCTION]
    while missing:
        part = defined.get(name := missing.pop())
        if part is not None and part not in needed and name not in listing.libraries:
            needed.add(part)
            missing += _read(part)
    kept = [part for part in body if part in needed]
    if all(map(is_function_of_torch, _attributes(kept, EXTERN))):
        kept = [_take_from_torch(part) for part in kept]
    return Listing(ast.unparse(ast.Module(kept, [])), listing.libraries)


def load_listing(listing: Listing) -> CompiledBlock:
    """Returns the code of a listing. Its kernels are mapped into memory for good."""
    if _CALLS_KERNELS in listing.source:
        register_all()
    namespace: dict[str, Any] = {**_load_kernels(listing.libraries)}
    exec(compile(listing.source, "<code of a pabc artifact>", "exec"), namespace)
    return CompiledBlock(namespace[_FUNCTION], listing)


def _split(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yields a statement; an import of several names as an import of each."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield statement
        return
    for alias in statement.names:
        part = copy.copy(statement)
        part.names = [alias]
        yield part


def _defined(part: ast.stmt) -> Iterable[str]:
    """Returns the names that a statement defines."""
    if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
        return [part.name]
    if isinstance(part, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in part.names]
    if isinstance(part, ast.Assign):
        return [target.id for target in part.targets if isinstance(target, ast.Name)]
    return []


def _read(part: ast.stmt) -> Iterator[str]:
    """Yields every name that occurs in a statement."""
    return (node.id for node in ast.walk(part) if isinstance(node, ast.Name))


def _attributes(parts: Iterable[ast.stmt], name: str) -> Iterator[str]:
    """Yields the attributes of the variable `name` that statements read."""
    nodes = (node for part in parts for node in ast.walk(part) if isinstance(node, ast.Attribute))
    return (n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == name)


def _take_from_torch(part: ast.stmt) -> ast.stmt:
    return ast.parse(f"{EXTERN} = torch").body[0] if EXTERN in _defined(part) else part


def _load_kernels(libraries: Mapping[str, bytes]) -> dict[str, Callable[..., None]]:
    """Returns the kernels of extension modules that Inductor made."""
    give_tensor_address()
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: _load_kernel(data, Path(folder) / f"{i}.so")
            for i, (name, data) in enumerate(libraries.items())
        }


def _load_kernel(data: bytes, path: Path) -> Callable[..., None]:
    path.write_bytes(data)
    name = f"pabc_{hashlib.sha256(data).hexdigest()}.kernel"  # the function that the module has
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(name, None)
    kernel: Callable[..., None] = module.kernel
    return kernel
