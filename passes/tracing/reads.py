"""reads: the Python values that a forward takes from tensor data, and what checks them later.

Text lengths by `mask.sum(1).tolist()`, `int(positions.max())`, a branch on `torch.any(mask)`, sizes
that follow from data (`x[mask]`, `nonzero`): a graph is right for the values it was traced with.
The model is run once to record them, the trace replays them, and every tensor they were read from
becomes a result of the trace, so that a later call can be checked against them.
"""

from __future__ import annotations

import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ir
from ..ir import aten, copy_into, is_call, is_tensor, user_inputs
from .numbers import Policy, TracedNumber, plain
from .outside import TensorCall

_OWN_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(file)) for file in (torch.__file__, ir.__file__)
)
_UNSEEN = (torch.Tensor.numpy, torch.Tensor.__array__)
"""Functions that read memory without an op that a dispatch mode would see."""
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)
_MASKING = (aten.index.Tensor,)
_MASKS = (torch.bool, torch.uint8)
Measure = Callable[[Sequence[torch.Tensor]], Any]
"""Takes a value from tensors, or what the size of a result follows from."""


@dataclass(frozen=True, slots=True)
class Read:
    """One value taken from data.

    Attributes:
        function: what was called, e.g. `torch.Tensor.item`.
        site: file and line of the model's code that called it.
        path: the qualified name of the module whose code that is; empty for the model itself.
        value: what came out: a number, an array.
        shapes: of a result whose size follows from data; then `value` is what the size follows
            from: how many elements of a mask are set, how many repeats there are.
        compared: whether `value` is how a number compares, in the order of comparisons.
    """

    function: Callable[..., Any]
    site: str
    path: str
    value: Any
    shapes: tuple[tuple[int, ...], ...] | None = None
    compared: bool = False

    @property
    def is_float_array(self) -> bool:
        """Whether it is an array of floating-point values: never the same twice."""
        return getattr(self.value, "ndim", 0) > 0 and self.value.dtype.kind == "f"

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        size = getattr(self.value, "shape", None)
        found = str(self.value) if size is None else f"an array of shape {tuple(size)}"
        verb = "takes" if self.shapes is not None else "compares as" if self.compared else "gives"
        return f"{name} {verb} {found} in {self.path or 'the model'} ({self.site})"


@dataclass(frozen=True, slots=True)
class Checked:
    """A read with the tensors it was taken from, as they occur in a trace or its graph."""

    read: Read
    again: Measure
    tensors: tuple[Any, ...]


class _Record(Policy):
    """Of a number read from data, notes what is asked: how it compares, or its value."""

    records = True

    def __init__(self, read: Read, checked: list[Checked]) -> None:
        self._read, self._checked = read, checked
        self._known: list[torch.Tensor] = []

    def value(self, number: TracedNumber) -> Any:
        if any(tensor is number.tensor for tensor in self._known):
            return plain(number)
        self._known.append(number.tensor)
        return self._note(number, lambda value: value, compared=False)

    def compare(self, number: TracedNumber, ask: Callable[[Any], bool]) -> bool:
        (outcome,) = self._note(number, lambda value: (bool(ask(value)),), compared=True)
        return bool(outcome)

    def _note(self, number: TracedNumber, ask: Callable[[Any], Any], *, compared: bool) -> Any:
        answer = ask(plain(number))
        read = replace(self._read, value=answer, compared=compared)
        measure: Measure = lambda tensors: ask(tensors[0].item())  # noqa: E731
        self._checked.append(Checked(read, measure, (number.tensor,)))
        return answer


class _Frames:
    """Finds where in the model's own code a call comes from."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): name for name, module in model.named_modules()}

    def site(self) -> str:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
            frame = frame.f_back
        if frame is None:
            return ""
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"

    def path(self) -> str:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = self._paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return ""


def failing_module(model: nn.Module, error: BaseException) -> str:
    """The qualified name of the innermost module whose own code raised; empty: the model itself."""
    paths = {id(module): name for name, module in model.named_modules()}
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for raised in reversed(chain):
        found = None
        trace = raised.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if not frame.f_code.co_filename.startswith(_OWN_FOLDERS):
                found = paths.get(id(frame.f_locals.get("self")), found)
            trace = trace.tb_next
        if found is not None:
            return found
    return ""


class _Watch(TorchDispatchMode):
    """Notices ops whose result, or its size, is read from data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            masked = func in _MASKING or "index" not in func.name()
            self.seen = self.seen or masked
        if func in _MASKING:
            indices = [i for i in args[1] if i is not None]
            self.seen = self.seen or any(i.dtype in _MASKS for i in indices)
        return func(*args, **(kwargs or {}))


class ReadRecorder(TorchFunctionMode):
    """While active, notes each value that is read from data, in order, in `reads`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._frames = _Frames(model)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:
            with self:
                return _to_list(args[0])
        if func in _INDEXING:
            with self:
                args = (args[0], _with_numbers(args[1]), *args[2:])
        with _Watch() as watch:
            result = func(*args, **kwargs)
        if result is not None and (watch.seen or func in _UNSEEN):
            shapes = tuple(tuple(tensor.shape) for tensor in _tensors(result))
            site, path = self._frames.site(), self._frames.path()
            if shapes:
                givers, measure = _size_source(func, args, kwargs)
                self.reads.append(Read(func, site, path, measure(givers), shapes))
            else:
                self.reads.append(Read(func, site, path, result))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size_source(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], Measure]:
    """The tensors that a result's size follows from, and how: masks, repeats, else the call."""
    call, tensors = TensorCall.of(args, kwargs)
    masks = tuple(tensor for tensor in tensors if tensor.dtype in _MASKS)
    if masks:
        return masks, lambda given: tuple(int(t.count_nonzero()) for t in given)
    if func in _REPEATS:
        return tensors[-1:], lambda given: int(given[0].sum())
    return tensors, lambda given: tuple(tuple(t.shape) for t in _tensors(call.run(func, given)))


def _with_numbers(index: Any) -> Any:
    """An index whose tensors without dimensions are read one by one: indexing itself would."""
    if isinstance(index, tuple):
        return tuple(map(_with_numbers, index))
    if isinstance(index, slice):
        return slice(*map(_with_numbers, (index.start, index.stop, index.step)))
    if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype not in _MASKS:
        return index.item()
    return index


def _to_list(tensor: torch.Tensor) -> Any:
    """`Tensor.tolist` element by element, as a fake tensor does it."""
    if tensor.dim() == 0:
        return tensor.item()
    return [_to_list(part) for part in tensor.unbind(0)]


class ReadReplayer(TorchFunctionMode):
    """While active, gives the recorded values in place of reading; `checked` gains the tensors."""

    def __init__(self, model: nn.Module, reads: Iterable[Read], *, watch: bool) -> None:
        """`watch`: a float of :meth:`torch.Tensor.item` is a value of the graph where it can be."""
        super().__init__()
        self.checked: list[Checked] = []
        self.watches = False
        self._watch = watch
        self._coming = deque(reads)
        self._functions = {read.function for read in self._coming}
        self._frames = _Frames(model)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            with self:
                args = (args[0], _with_numbers(args[1]), *args[2:])
        read = self._next(func) if func in self._functions else None
        if read is None:
            return func(*args, **kwargs)
        if read.shapes is not None:
            result = func(*args, **kwargs)
            if not any(free_unbacked_symbols(tensor.shape) for tensor in _tensors(result)):
                return result
            givers, measure = _size_source(func, args, kwargs)
            self.checked.append(Checked(read, measure, givers))
            return _fix_sizes(result, read.shapes)
        call, tensors = TensorCall.of(args, kwargs)
        again = partial(call.run, read.function)
        if not self._watch or func is not torch.Tensor.item or type(read.value) is not float:
            self.checked.append(Checked(read, again, tensors))
            return read.value
        self.watches = True
        tensor = tensors[0].reshape(()).to(torch.double, copy=True)  # it may be written to later
        return TracedNumber(read.value, tensor, _Record(read, self.checked))

    def _next(self, func: Any) -> Read | None:
        """The record of this call; those before it were made by code that did not run again."""
        site = self._frames.site()
        for i, read in enumerate(self._coming):
            if read.function == func and read.site == site:
                for _ in range(i + 1):
                    self._coming.popleft()
                return read
        return None


def _fix_sizes(result: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
    """The result with its sizes as recorded."""
    known = iter(shapes)
    return pytree.tree_map_only(torch.Tensor, lambda t: _fix_size(t, next(known)), result)


def _fix_size(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    for size, known in zip(tensor.shape, shape, strict=True):
        torch._check(size == known)
    return tensor.view(shape)


class Reads:
    """What a graph assumes of data: reads, and a graph that computes the tensors they came from.

    Attributes:
        entries: the reads.
        inputs: per read, the names of the model's inputs that its value follows from.
        graph: the model's inputs -> nothing; run node by node by :meth:`difference`.
    """

    def __init__(self, gm: GraphModule, checked: Sequence[Checked]) -> None:
        """`checked` holds nodes of `gm` in the place of tensors."""
        sources = _sources(gm.graph)
        kept = [c for c in checked if any(sources[node] for node in c.tensors)]
        self.entries = tuple(c.read for c in kept)
        self.inputs = tuple(
            frozenset(
                source.name
                for node in c.tensors
                for source in sources[node]
                if source.op == "placeholder"
            )
            for c in kept
        )
        needed: set[Node] = set()
        stack = [node for c in kept for node in c.tensors]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        graph, mapping = Graph(), dict[Node, Node]()
        inputs = user_inputs(gm.graph)
        copy_into(graph, inputs, mapping)
        copy_into(graph, [n for n in gm.graph.nodes if n in needed and n not in inputs], mapping)
        graph.output(())
        self.graph = GraphModule(gm, graph)
        self.used = tuple(i for i, n in enumerate(inputs) if mapping[n].users or n in needed)
        self.weights = tuple(str(n.target) for n in graph.nodes if n.op == "get_attr")
        order = {node: i for i, node in enumerate(graph.nodes)}
        self._checks: dict[Node, list[tuple[Checked, tuple[Node, ...]]]] = {}
        for c in kept:
            nodes = tuple(mapping[node] for node in c.tensors)
            self._checks.setdefault(max(nodes, key=order.__getitem__), []).append((c, nodes))

    def __bool__(self) -> bool:
        return bool(self.entries)

    def difference(self, inputs: Sequence[Any]) -> tuple[Read, Any] | None:
        """The first read that gives another value for these inputs, with that value."""
        try:
            with torch.no_grad():
                _Checker(self.graph, self._checks).run(*inputs)
        except _Differs as found:
            return found.read, found.value
        return None

    def follow(self, denoised: Collection[str]) -> dict[str, str]:
        """Modules (not the model itself) that read values which follow from the latents, and why
        that keeps them out of a graph."""
        reads = zip(self.entries, self.inputs, strict=True)
        return {
            read.path: f"it reads values that follow from the latents ({read.site})"
            for read, inputs in reads
            if read.path and not inputs.isdisjoint(denoised)
        }


class _Differs(Exception):
    def __init__(self, read: Read, value: Any) -> None:
        self.read, self.value = read, value


class _Checker(Interpreter):
    """Runs a graph and stops at the first read that differs: what follows assumes its value."""

    def __init__(
        self,
        gm: GraphModule,
        checks: Mapping[Node, Sequence[tuple[Checked, tuple[Node, ...]]]],
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._checks = checks

    def run_node(self, n: Node) -> Any:
        self.env[n] = result = super().run_node(n)
        for checked, nodes in self._checks.get(n, ()):
            value = checked.again([self.env[node] for node in nodes])
            if not _same(value, checked.read.value):
                raise _Differs(checked.read, value)
        return result


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "shape") and hasattr(b, "shape"):
        return bool(a.shape == b.shape and (a == b).all())
    return bool(a == b) or (a != a and b != b)


def _sources(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Per node, the inputs and weights that it is computed from."""
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = frozenset([node])
        else:
            parts = (found[n] for n in node.all_input_nodes)
            found[node] = frozenset().union(*parts)
    return found


def with_static_sizes(graph: Graph) -> list[Node]:
    """Replaces sizes known by now by numbers, in facts and arguments.

    Returns the nodes whose sizes, or numbers, are still not known.
    """
    unknown = []
    for node in list(graph.nodes):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.maybe_as_int() is not None:
            _replace_by_number(node, val.node.maybe_as_int())
        elif isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if free_unbacked_symbols(val) and any(is_tensor(user) for user in node.users):
                unknown.append(node)
        elif val is not None and node.op != "output":
            node.meta["val"] = pytree.tree_map_only(torch.Tensor, _static, val)
            leaves = pytree.tree_leaves(node.meta["val"])
            if any(isinstance(t, torch.Tensor) and free_unbacked_symbols(t.shape) for t in leaves):
                unknown.append(node)
    return [node for node in unknown if not _take_size_from_view(node)]


def _take_size_from_view(node: Node) -> bool:
    """Whether a result is only read with its size fixed: PyTorch forgets an empty one's own."""
    readers = [user for user in node.users if is_tensor(user)]
    views = [user for user in readers if is_call(user, (aten.view.default,))]
    if not is_tensor(node) or not views or len(views) < len(readers):
        return False
    view = views[0].meta["val"]
    if view.ndim != node.meta["val"].ndim or free_unbacked_symbols(view.shape):
        return False
    node.meta["val"] = view
    return True


def _replace_by_number(node: Node, number: int) -> None:
    for user in list(node.users):
        args, kwargs = map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
        user.args, user.kwargs = args, kwargs


def _static(fake: torch.Tensor) -> torch.Tensor:
    if not any(isinstance(s, torch.SymInt) for s in (*fake.shape, *fake.stride())):
        return fake
    sizes = [size for s in (*fake.shape, *fake.stride()) if (size := _number(s)) is not None]
    if len(sizes) < 2 * fake.ndim:
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(
            sizes[: fake.ndim], sizes[fake.ndim :], dtype=fake.dtype, device=fake.device
        )


def _number(size: int | torch.SymInt) -> int | None:
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else operator.index(size)
