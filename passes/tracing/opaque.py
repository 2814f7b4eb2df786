"""opaque: modules that a trace does not enter, and that the graph calls.

Each call of such a module becomes an op of its own, whose fake results have the layouts of a
recorded run, so that the rest of the model is one graph around it. The op's implementation is the
module as the user wrote it. It is registered with the op, at capture: the graph of a capture can be
run by itself, which is how each stage is compared with the model.
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

from pabc.internals.dispatch import DisableTorchFunction, EnableTorchFunction, TorchDispatchMode
from pabc.internals.tensors import version_of

from ..attention_ops import is_attention
from ..ir import EFFECT, OPAQUE
from ..relations.groups import SOFTMAXES
from .patch import patched
from .python_state import Snapshot
from .tensor_call import ResultLayout, TensorCall

_numbers = count()


@dataclass(slots=True)
class OpaqueCall:
    """One call of a module by the graph.

    Attributes:
        model: the model that the module is in.
        path: the module's qualified name.
        reason: why the module is opaque.
        num_attentions: the number of attentions that ran in it.
        call: its arguments.
        layouts: the layouts of the tensors in its result.
        results: its result.
        keeps: True if the call has side effects: it must run even if nothing needs its results,
            which have one more, empty tensor.
        op: the op that the graph calls: a list of tensors -> a list of tensors.
        library: what keeps the op registered.
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
        """Runs the module as it is now.

        Raises: RuntimeError if its results are laid out otherwise than when captured.
        """
        with EnableTorchFunction():
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
        """Returns empty results of the right layout."""
        return [*(layout.empty() for layout in self.layouts), *self._token()]

    def register(self) -> None:
        """Registers this call as an op, for as long as `library` lives."""
        name = f"{EFFECT if self.keeps else 'call'}_{next(_numbers)}"
        self.library = torch.library.Library(OPAQUE, "FRAGMENT")
        self.library.define(f"{name}(Tensor[] inputs) -> Tensor[]")
        self.library.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{OPAQUE}::{name}", self.fake, lib=self.library)
        self.op = getattr(getattr(torch.ops, OPAQUE), name).default


class OpaqueRecorder:
    """Records each call of opaque modules, in order, in `calls`."""

    def __init__(
        self, model: nn.Module, reasons: Mapping[str, str], keeping: Collection[str] = ()
    ) -> None:
        """Takes the modules, each with why it is opaque, and those of them with side effects."""
        self.calls: list[OpaqueCall] = []
        self._model, self._reasons, self._keeping = model, reasons, keeping
        self._is_within = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the modules' calls are recorded."""
        with ExitStack() as stack:
            for path in self._reasons:
                module = self._model.get_submodule(path)
                stack.enter_context(patched(module, partial(self._run, path, module.forward)))
            yield

    def _run(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_within:
            return forward(*args, **kwargs)  # called by another opaque module
        call, inputs = TensorCall.of(args, kwargs)
        versions = [version_of(tensor) for tensor in inputs]
        module = self._model.get_submodule(path)
        before = Snapshot([(path, path, module)], values="all")
        self._is_within = True
        try:
            with DisableTorchFunction(), _AttentionCounter() as counter:
                result = forward(*args, **kwargs)  # its reads need no check: it runs at every call
        finally:
            self._is_within = False
        if versions != [version_of(tensor) for tensor in inputs]:
            raise ValueError(
                f"{path} cannot be traced ({self._reasons[path]}), nor run outside of a graph: it "
                "writes to its arguments"
            )
        results, tensors = TensorCall.of((result,), {})
        layouts = tuple(map(ResultLayout.of, tensors))
        self.calls.append(
            OpaqueCall(
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
def replaying_opaque(
    model: nn.Module, calls: Sequence[OpaqueCall], tokens: list[torch.Tensor]
) -> Iterator[None]:
    """While active, the modules' forwards call the recorded ops instead.

    `tokens` gains, for the trace to return, the empty tensors of those with side effects.
    """
    coming: dict[str, deque[OpaqueCall]] = {}
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
