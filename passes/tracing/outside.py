"""outside: modules that a trace does not enter; the graph calls them, and they run as they are.

Each call of such a module becomes an op of its own, whose results have the shapes that were seen
when the model was run once. So the rest of the model is one graph around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pabc.base.structure import Structure, flatten

from ..attention_ops import is_attention
from ..ir import EFFECT, OUTSIDE, SOFTMAXES
from .python_state import Snapshot

_numbers = count()


@dataclass(frozen=True, slots=True)
class TensorCall:
    """A call's arguments but for its tensors, and where those go."""

    leaves: tuple[Any, ...]
    places: tuple[int, ...]
    structure: Structure

    @classmethod
    def of(
        cls, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[TensorCall, tuple[torch.Tensor, ...]]:
        """The call and its tensors."""
        leaves, structure = flatten((tuple(args), dict(kwargs)))
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        others = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        return cls(others, places, structure), tuple(leaves[i] for i in places)

    def fill(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Args and kwargs with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = self.structure.unflatten(leaves)
        return args, kwargs

    def run(self, function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        """Calls `function` with these tensors."""
        args, kwargs = self.fill(tensors)
        return function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """What a tensor among the results looked like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ResultLayout:
        """The layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        """A tensor of this layout, with any values."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(slots=True)
class OutsideCall:
    """One call of a module by the graph.

    Attributes:
        path: the module's qualified name.
        reason: why it is not part of the graph.
        num_attentions: how many attentions ran in it.
        layouts: of the tensors among its results.
        keeps: whether it leaves something behind: such a call is made whoever needs its results,
            which have one more, empty tensor.
        op: what the graph calls: a list of tensors -> a list of tensors.
    """

    model: nn.Module
    path: str
    reason: str
    num_attentions: int
    call: TensorCall
    layouts: tuple[ResultLayout, ...]
    results: TensorCall
    keeps: bool = False
    op: Any = None
    library: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        count = f"; {self.num_attentions} attentions in it" if self.num_attentions else ""
        return f"{self.path} runs as it is: {self.reason}{count}"

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the module as it is now."""
        with torch._C._EnableTorchFunction():
            result = self.call.run(self.model.get_submodule(self.path).forward, tensors)
        results, found = TensorCall.of((result,), {})
        layouts = tuple(map(ResultLayout.of, found))
        if layouts != self.layouts or results != self.results:
            raise RuntimeError(
                f"{self.path} runs outside of the graph: expected results like those captured, "
                f"{self.layouts} in {self.results}, found {layouts} in {results}"
            )
        # The module may go on using what it returns; a compiler may write to that memory.
        return [*(t.clone() for t in found), *self._token()]

    def _token(self) -> list[torch.Tensor]:
        return [torch.empty(0)] if self.keeps else []

    def fake(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Empty results of the right layout."""
        return [*(layout.empty() for layout in self.layouts), *self._token()]

    def register(self) -> None:
        """Makes this call an op; it lives as long as `library`."""
        name = f"{EFFECT if self.keeps else 'call'}_{next(_numbers)}"
        self.library = torch.library.Library(OUTSIDE, "FRAGMENT")
        self.library.define(f"{name}(Tensor[] inputs) -> Tensor[]")
        self.library.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{OUTSIDE}::{name}", self.fake, lib=self.library)
        self.op = getattr(getattr(torch.ops, OUTSIDE), name).default


class OutsideRecorder:
    """Runs chosen modules as they are and notes each of their calls, in order, in `calls`."""

    def __init__(
        self, model: nn.Module, reasons: Mapping[str, str], keeping: Collection[str] = ()
    ) -> None:
        """`reasons`: qualified names of modules -> why they are not part of the graph; `keeping`:
        of those that leave something behind."""
        self.calls: list[OutsideCall] = []
        self._model, self._reasons, self._keeping = model, reasons, keeping
        self._is_within = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the modules' calls are noted."""
        with ExitStack() as stack:
            for path in self._reasons:
                module = self._model.get_submodule(path)
                stack.enter_context(patched(module, partial(self._run, path, module.forward)))
            yield

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_within:
            return forward(*args, **kwargs)  # by another module that runs as it is
        call, inputs = TensorCall.of(args, kwargs)
        versions = [tensor._version for tensor in inputs]
        module = self._model.get_submodule(path)
        before = Snapshot([(path, path, module)], values="all")
        self._is_within = True
        try:
            with torch._C.DisableTorchFunction(), _AttentionCounter() as counter:
                result = forward(*args, **kwargs)  # what it reads is its own affair
        finally:
            self._is_within = False
        if versions != [tensor._version for tensor in inputs]:
            raise ValueError(
                f"{path} cannot be traced ({self._reasons[path]}), nor run outside of a graph: it "
                "writes to its arguments"
            )
        results, tensors = TensorCall.of((result,), {})
        layouts = tuple(map(ResultLayout.of, tensors))
        self.calls.append(
            OutsideCall(
                self._model,
                path,
                self._reasons[path],
                counter.count,
                call,
                layouts,
                results,
                path in self._keeping or bool(before.changes()),
            )
        )
        return result


class _AttentionCounter(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += is_attention(func) or func in SOFTMAXES
        return func(*args, **(kwargs or {}))


@contextmanager
def replayed_outside(
    model: nn.Module, calls: Sequence[OutsideCall], tokens: list[torch.Tensor]
) -> Iterator[None]:
    """While active, the modules' forwards call the recorded ops instead; `tokens` gains what is to
    be returned of those that leave something behind."""
    coming: dict[str, deque[OutsideCall]] = {}
    for call in calls:
        call.register()
        coming.setdefault(call.path, deque()).append(call)

    def replay(path: str, *args: Any, **kwargs: Any) -> Any:
        call = coming[path].popleft()
        _, tensors = TensorCall.of(args, kwargs)
        found = call.op(list(tensors))
        if call.keeps:
            *found, token = found
            tokens.append(token)
        (result,), _ = call.results.fill(found)
        return result

    with ExitStack() as stack:
        for path in coming:
            stack.enter_context(patched(model.get_submodule(path), partial(replay, path)))
        yield


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another forward for a while."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
