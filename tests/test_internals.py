"""What PyTorch does not promise to keep is used by the modules of pabc/internals alone.

Names are read from the source: imports, attributes of PyTorch's modules and objects, and strings
that name such attributes.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_structure

from pabc import internals
from pabc.internals import aotinductor
from pabc.internals.release import SUPPORTED, expecting

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pabc", "passes", "kernels")
INTERNALS = ROOT / "pabc/internals"
MODULES = sorted(path.stem for path in INTERNALS.glob("*.py") if path.stem != "__init__")
ALLOWED = {"torch._check", "_orig_mod", "_load_from_state_dict"}
"""The docstring of :mod:`pabc.internals` says why."""
OPS = ("torch.ops.aten.", "aten.")
"""What follows is the name of an op."""


@cache
def private_attributes() -> frozenset[str]:
    """Returns the private attributes of those objects of PyTorch that pabc handles."""
    graph = torch.fx.symbolic_trace(nn.Identity())
    examples = (
        torch.Tensor,
        torch.UntypedStorage,
        nn.Module(),
        OptimizedModule,
        torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
        torch.ops.higher_order.cond,
        torch.library.custom_op,
        torch.distributed.ProcessGroup,
        torch.export.ExportedProgram,
        graph,
        graph.graph,
        next(iter(graph.graph.nodes)),
        tree_structure([0]),
    )
    names = {name for example in examples for name in dir(example)}
    names |= {"_opoverload", "_boxed_call", "_children"}
    return frozenset(name for name in names if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def find_private_names(source: str) -> list[str]:
    """Returns the private names of PyTorch that a module uses, each with its line."""
    tree = ast.parse(source)
    roots, own, affixes = _find_roots(tree), _find_own(tree), _find_affixes(tree)
    found: dict[tuple[int, str], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [name for name in _imported(node) if any(map(is_private, name.split(".")))]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            names = [_private_name(node, roots, own)]
        elif isinstance(node, ast.Constant) and node not in affixes:
            text = node.value if isinstance(node.value, str) else ""
            is_attribute = text in private_attributes() - own
            names = [text] if is_attribute or re.match(r"torch(\.\w+)*\._\w", text) else []
        else:
            continue
        found.update(((node.lineno, name), None) for name in names if name and name not in ALLOWED)
    return [f"line {line}: {name}" for line, name in sorted(found)]


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yields the names of PyTorch that are imported."""
    home = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
    for alias in node.names:
        if f"{home}{alias.name}".partition(".")[0] == "torch":
            yield f"{home}{alias.name}"


def _private_name(node: ast.Attribute, roots: dict[str, str], own: set[str]) -> str:
    """Returns the private name that an attribute is, or "" if it is none of PyTorch's."""
    text = ast.unparse(node)
    root, _, rest = text.partition(".")
    if root in roots and re.fullmatch(r"[\w.]+", rest):
        text = f"{roots[root]}.{rest}"
        return "" if text.startswith(OPS) else text
    is_own = text.startswith(OPS) or node.attr in own
    return "" if is_own or node.attr not in private_attributes() else node.attr


def _find_roots(tree: ast.AST) -> dict[str, str]:
    """Returns the names that a module gives to modules of PyTorch, each with its own."""
    roots = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias, name in zip(node.names, _imported(node), strict=False):
                is_top = isinstance(node, ast.Import) and alias.asname is None
                roots["torch" if is_top else alias.asname or alias.name] = (
                    "torch" if is_top else name
                )
    return {root: name for root, name in roots.items() if root[0].islower()}


def _find_own(tree: ast.AST) -> set[str]:
    """Returns the names that a module gives to functions and to attributes of its objects."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr if ast.unparse(node.value) in ("self", "cls") else "")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    return own


def _find_affixes(tree: ast.AST) -> set[ast.AST]:
    """Returns the strings that names are only compared with in part."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    methods = ("startswith", "endswith", "removeprefix", "removesuffix")
    return {
        argument
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in methods
        for argument in call.args
    }


def test_private_names_are_used_by_internals_alone() -> None:
    found = {}
    for path in (p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))):
        if INTERNALS not in path.parents and (names := find_private_names(path.read_text())):
            found[str(path.relative_to(ROOT))] = names
    assert not found, "put these into a module of pabc/internals: see its docstring"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch._inductor import config", ["torch._inductor.config"]),
        ("from torch.utils import _pytree as pytree", ["torch.utils._pytree"]),
        ("import torch\nx = torch._C._is_any()", ["torch._C", "torch._C._is_any"]),
        ("from torch import fx\nx = fx.graph._x", ["torch.fx.graph._x"]),
        ("import torch\nx = torch.ops._c10d_functional.y", ["torch.ops._c10d_functional"]),
        ("x = tensor._version", ["_version"]),
        ("x = vars(module)['_forward_hooks']", ["_forward_hooks"]),
        ("x = get('torch._inductor.config')", ["torch._inductor.config"]),
        ("class A:\n    def f(self): return self._modules", ["_modules"]),
        # Ops, names of pabc's own, and what is no attribute of PyTorch's objects.
        ("import torch\nx = torch.ops.aten._to_copy.default", []),
        ("from .ir import aten\nx = aten._to_copy.default", []),
        ("import torch\ntorch._check(x)", []),
        ("class A:\n    def f(self): self._modules = 1; return self._modules", []),
        ("x = key.endswith('_version'), named._replace(a=1), sys._getframe()", []),
        ("from ._torch import x", []),
    ],
)
def test_private_names_are_found(line: str, names: list[str]) -> None:
    assert [found.partition(": ")[2] for found in find_private_names(line)] == names


def test_releases_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lowest, above = re.findall(r'"torch>=2\.(\d+),<2\.(\d+)"', text)[0]
    assert f"2.{lowest} to 2.{int(above) - 1}" == SUPPORTED


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is_about_and_since_when(name: str) -> None:
    module = importlib.import_module(f"{internals.__name__}.{name}")
    assert (module.__doc__ or "").startswith(f"{name}: ")
    assert name == "release" or "since 2." in str(module.__doc__).lower()
    assert re.search(rf"^    {name} ", str(internals.__doc__), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "lacking", "subject"),
    [
        ("dispatch", (torch._C, "_parse_dispatch_key"), "dispatcher"),
        ("dynamo", (torch._higher_order_ops.utils, "_in_hop_compile"), "Dynamo"),
        ("graphs", (torch.fx._lazy_graph_module, "_LazyGraphModule"), "torch.fx"),
        ("pytree", (torch.utils._pytree.TreeSpec, "children"), "pytree"),
        ("modules", (nn.modules.module, "_global_forward_hooks"), "torch.nn.Module"),
    ],
)
def test_what_a_release_lacks_is_an_error_of_the_import(
    name: str, lacking: tuple[object, str], subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = f"{internals.__name__}.copy_of_{name}"
    spec = importlib.util.spec_from_file_location(copy, INTERNALS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, copy, module)
    spec.loader.exec_module(module)
    monkeypatch.delattr(*lacking)
    with pytest.raises(ImportError) as raised:
        spec.loader.exec_module(module)
    expected = f"pabc: expected torch {SUPPORTED}, found {torch.__version__}, whose {subject} "
    assert str(raised.value).startswith(expected)
    assert lacking[1] in str(raised.value)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="mine"), expecting("nothing"):
        raise ValueError("mine")


@pytest.mark.parametrize(("release", "number"), [("2.11.0+cu130", 15), ("2.13.0", 13)])
def test_dtypes_of_ops_are_written_as_the_release_reads_them(
    release: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(release))
    (tmp_path / "changed").mkdir()
    calls = tmp_path / "a.wrapper.json"
    calls.write_text('{"arg": {"as_scalar_type": 13}, "other": {"as_int": 13}}')
    found = json.loads(Path(aotinductor._as_packaged(calls, tmp_path / "changed")).read_text())
    assert found == {"arg": {"as_scalar_type": number}, "other": {"as_int": 13}}
    calls.write_text('{"as_scalar_type": 8}')
    if number == 15:
        with pytest.raises(NotImplementedError, match=r"dtype: expected one of .*, found 8"):
            aotinductor._as_packaged(calls, tmp_path / "changed")


def test_source_is_not_packaged(tmp_path: Path) -> None:
    (tmp_path / "changed").mkdir()
    source = tmp_path / "a.wrapper.cpp"
    source.write_text("int x;")
    packaged = Path(aotinductor._as_packaged(source, tmp_path / "changed"))
    assert packaged.name == source.name and not packaged.read_text()
