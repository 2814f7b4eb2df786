"""Small graphs: traced from Python, written as text, compared by structure.

A graph as text has a line per node, as the docstrings of passes have them::

    graph(%x, %w, %b):
        # x: a note about an input
        %n = layer_norm(%x, [8])
        %h = linear(%n, %w, %b)  # a note
        %r = call_module[full_0](%h)
        return (%r,)

    full_0(%y):
        %g = gelu(%y, approximate='tanh')
        return (%g,)

An op of ATen goes by its name, and by its overload where this is neither `default` nor `Tensor`:
`pow.Tensor_Scalar`. Other ops have their namespace before it, `pabc.short_attention`; functions of
Python their own name, `getitem`. Attributes are `get_attr[blocks.0.weight]`.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from pabc import passes

Note = Callable[[Node], str]
_NODE, _INPUT = "_node_", "_input_"
"""In a line that is parsed as Python: a prefix of names of nodes; the place of a node's value."""


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> GraphModule:
    """Returns the graph of a function or module, captured as pabc captures a model."""
    model = function if isinstance(function, nn.Module) else Function(function)
    return passes.capture(model.eval(), inputs, {})[0]


def ops(gm: GraphModule) -> list[Any]:
    """Returns the targets of all calls of functions, in order."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def assert_same_graph(
    gm: GraphModule, expected: GraphModule | str, *, note: Note | None = None
) -> None:
    """Fails with a diff unless two graphs have the same inputs, ops, arguments and results.

    Names of nodes and the order of nodes that do not follow from one another are not compared. The
    graphs of called modules are where `expected` is a graph, or a text that has them.

    Args:
        expected: the other graph, or its text.
        note: what to compare besides: what it says of a node of `gm`, if anything, stands in the
            text behind a #.
    """
    wanted = _read(expected) if isinstance(expected, str) else dict(_graphs_of(expected, note))
    assert "graph" in wanted, f"expected: expected the text of a graph, found {expected!r}"
    found = {name: lines for name, lines in _graphs_of(gm, note) if name in wanted}
    texts = [_write(graphs, wanted) for graphs in (wanted, found)]
    if texts[0] != texts[1]:
        lines = (text.splitlines() for text in texts)
        diff = difflib.unified_diff(*lines, "expected", "found", n=99, lineterm="")
        raise AssertionError("the graphs differ:\n" + "\n".join(diff))


def text_of(gm: GraphModule, note: Note | None = None) -> str:
    """Returns a graph, and those of the modules that it calls, as text."""
    graphs = dict(_graphs_of(gm, note))
    return _write(graphs, graphs)


@dataclass(eq=False)
class Line:
    """A node: an input, an op, or (`op` is "return") the output."""

    op: str
    arguments: str = ""
    """With {} where the value of another line stands."""
    inputs: list[Line] = field(default_factory=list)
    note: str = ""
    name: str = ""


def _graphs_of(gm: GraphModule, note: Note | None, name: str = "graph") -> Iterator[Any]:
    """Yields the name and the lines of a graph, then of each module that it refers to."""
    lines: dict[Node, Line] = {}
    for node in gm.graph.nodes:
        parts: list[Line] = []
        if node.op == "output":
            arguments = _argument(node.args[0], lines, parts)
        else:
            given = [_argument(a, lines, parts) for a in node.args if node.op != "placeholder"]
            named = sorted(node.kwargs.items())
            given += [f"{key}={_argument(value, lines, parts)}" for key, value in named]
            arguments = f"({', '.join(given)})" if "call" in node.op else ""
        said = "" if note is None else note(node)
        lines[node] = Line(_op(node), arguments, parts, said, str(node.target))
    yield name, [*lines.values()]
    inner = (str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr"))
    for target in dict.fromkeys(inner):
        body = passes.ir.attribute(gm, target)
        if isinstance(body, GraphModule):
            yield from _graphs_of(body, note, target)


def _op(node: Node) -> str:
    if node.op == "call_function":
        if not isinstance(node.target, torch._ops.OpOverload):
            return node.target.__name__
        namespace, name = node.target._schema.name.split("::")
        overload = node.target._overloadname
        parts = [namespace if namespace != "aten" else "", name]
        parts.append("" if overload in ("default", "Tensor") else overload)
        return ".".join(filter(None, parts))
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "return"}[node.op]
    return f"{node.op}[{node.target}]"


def _argument(value: Any, lines: dict[Node, Line], parts: list[Line]) -> str:
    if isinstance(value, Node):
        parts.append(lines[value])
        return "{}"
    if isinstance(value, (tuple, list)):
        items = ", ".join(_argument(item, lines, parts) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    return f"device('{value}')" if isinstance(value, torch.device) else _escape(repr(value))


def _escape(text: str) -> str:
    """Returns text for `str.format` to leave as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def _read(text: str) -> dict[str, list[Line]]:
    """Returns the lines of each graph of a text."""
    graphs: dict[str, list[Line]] = {}
    for each in filter(str.strip, text.splitlines()):
        code, _, note = (part.strip() for part in each.partition("#"))
        head = re.fullmatch(r"([\w.]+)\((.*)\):", code)
        if head:
            names = head[2].replace("%", "").replace(" ", "").split(",")
            known = {name: Line("input", name=name) for name in names if name}
            graphs[head[1]] = lines = [*known.values()]
            continue
        if not code:
            name, _, said = note.partition(": ")
            known[name].note = said
            continue
        code = re.sub(r"(call_module|get_attr)\[([^\]]*)\]", r"\1['\2']", code)
        code = re.sub(r"%(\w+)", _NODE + r"\1", code)
        (statement,) = ast.parse(code.replace("return ", "result = ")).body
        assert isinstance(statement, ast.Assign), f"expected %name = op(...), found {each}"
        line = _read_line(statement, known)
        line.note = note
        lines.append(line)
        known[ast.unparse(statement.targets[0]).removeprefix(_NODE)] = line
    return graphs


def _read_line(statement: ast.Assign, known: dict[str, Line]) -> Line:
    inputs: list[Line] = []

    class Refer(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if not node.id.startswith(_NODE):
                return node
            inputs.append(known[node.id.removeprefix(_NODE)])
            return ast.Name(_INPUT)

    value = statement.value
    if ast.unparse(statement.targets[0]) == "result":
        op, arguments = "return", ast.unparse(Refer().visit(value))
    elif isinstance(value, ast.Call):
        op = ast.unparse(value.func)
        value.keywords.sort(key=lambda keyword: str(keyword.arg))
        given = [Refer().visit(each) for each in (*value.args, *value.keywords)]
        arguments = f"({', '.join(map(ast.unparse, given))})"
    else:
        op, arguments = ast.unparse(value), ""
    op = re.sub(r"\['(.*)'\]", r"[\1]", op)
    return Line(op, _escape(arguments).replace(_INPUT, "{}"), inputs)


def _write(graphs: dict[str, list[Line]], wanted: dict[str, list[Line]]) -> str:
    """Returns graphs as text, in an order and with names that follow from the structure alone."""
    return "\n\n".join(
        _write_graph(name, graphs[name], wanted[name]) for name in wanted if name in graphs
    )


def _write_graph(name: str, lines: list[Line], wanted: list[Line]) -> str:
    """The inputs of both graphs go by the names that they have in the one that is wanted."""
    names: dict[Line, str] = {}
    theirs = [line.name for line in wanted if line.op == "input"]
    inputs = [line for line in lines if line.op == "input"]
    for place, line in enumerate(inputs):
        names[line] = theirs[place] if place < len(theirs) else line.name
    (result,) = (line for line in lines if line.op == "return")
    text = [f"{name}({', '.join(f'%{names[line]}' for line in inputs)}):"]
    text += [f"    # {names[line]}: {line.note}" for line in inputs if line.note]
    unused = [line for line in lines if line.op not in ("input", "return")]
    for line in _in_order([result, *sorted(unused, key=lambda line: line.op)]):
        if line in names:
            continue
        word = re.sub(r"\W+", "_", re.sub(r"get_attr|call_module", "", line.op)).strip("_")
        labels = (f"{word}_{count}" for count in itertools.count())
        names[line] = next(label for label in labels if label not in names.values())
        value = line.op + line.arguments.format(*(f"%{names[each]}" for each in line.inputs))
        note = f"  # {line.note}" if line.note else ""
        if line is not result:
            text.append(f"    %{names[line]} = {value}{note}")
        else:
            end = value.replace("return", "return ") + note
    return "\n".join([*text, f"    {end}"])


def _in_order(roots: list[Line]) -> Iterator[Line]:
    """Yields all that `roots` follow from before them: the order in which they read it."""
    seen: set[Line] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        line, is_ready = stack.pop()
        if is_ready:
            yield line
        elif line not in seen:
            seen.add(line)
            stack.append((line, True))
            stack += [(each, False) for each in reversed(line.inputs)]
