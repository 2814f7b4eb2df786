"""The model's tensors that graphs read; follows the model when they are replaced."""

from __future__ import annotations

import gc
import logging
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pabc.internals.modules import buffers_of, parameters_of
from pabc.passes import CONSTANTS, Captured, attribute, find_tensor
from pabc.runtime.state import StateCheck, Watch

logger = logging.getLogger(__name__)


class Weights:
    """Parameters, buffers and other tensors by qualified name, shared with the model.

    Values that change in place need no attention. Replaced tensors are found by :meth:`is_current`
    at each call, and by :meth:`follow` where a generation starts.

    Attributes:
        state: how often tensors were replaced.
    """

    def __init__(self, graphs: Sequence[GraphModule], captured: Captured) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for module in (m for gm in graphs for m in gm.modules()):
            if isinstance(module, GraphModule):
                reads = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
                values = ((name, attribute(module, name)) for name in reads)
                self._tensors.update((n, v) for n, v in values if isinstance(v, torch.Tensor))
        self._aliases = captured.aliases
        self._modules = StateCheck(captured.modules)
        self._watch: Watch | None = None
        self._layouts = {name: _layout(tensor) for name, tensor in self._tensors.items()}
        self._holders_of_tensors: _TensorHolders | None = None
        self._live: list[tuple[tuple[str, ...], list[torch.Tensor]]] = []
        self.state = 0

    def live(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Returns the tensors of these names, in a list that :meth:`follow` updates."""
        known = tuple(names)
        tensors = self.get(known)
        self._live.append((known, tensors))
        return tensors

    def get(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Returns the tensors of these names."""
        return [self._tensors[name] for name in names]

    def all(self) -> list[torch.Tensor]:
        """Returns all tensors."""
        return list(self._tensors.values())

    def share(self, watch: Watch) -> None:
        """Compares the model's Python state through `watch`, which programs of the model share."""
        self._watch = watch

    def state_difference(self, model: nn.Module) -> str | None:
        """Returns what of the model's Python state, as last looked at, is not as it was captured,
        in words; None: nothing."""
        return self._modules.difference(self._watching(model))

    @property
    def are_of_this_state(self) -> bool:
        """Returns True if the model's Python state, as last looked at, is the one at capture."""
        return self._watch is None or self._modules.hold(self._watch)

    def are_there(self, model: nn.Module) -> bool:
        """Returns whether the model still has these very tensors."""
        own = ((n, t) for n, t in self._tensors.items() if not n.startswith(CONSTANTS))
        return all(find_tensor(model, name) is tensor for name, tensor in own)

    def is_current(self, model: nn.Module) -> bool:
        """Returns whether the model has the Python state of the capture, and these very tensors.

        Made for each call: some 60 microseconds for 500 tensors and as many modules, in loops
        without Python code. A move (`.to`) of a part of the model is found by :meth:`follow` alone.
        """
        if self._holders_of_tensors is None:
            own = {n: t for n, t in self._tensors.items() if not n.startswith(CONSTANTS)}
            expected = {alias: t for n, t in own.items() for alias in self._aliases.get(n, ())}
            self._holders_of_tensors = _TensorHolders(model, own | expected)
        watch = self._watching(model)
        watch.look()
        return self._modules.hold(watch) and self._holders_of_tensors.hold()

    def follow(self, model: nn.Module, graphs: Sequence[GraphModule]) -> list[str] | None:
        """Rebinds tensors that were replaced in the model, in `graphs` too; returns their names.

        None if the graphs no longer fit: a tensor is gone, changed its shape, strides, dtype or
        device, or is no longer shared by the modules that shared it; or the state changed.
        """
        self._watching(model).look(closely=True)
        replaced = {}
        reason = self.state_difference(model)
        for name, old in self._tensors.items():
            if name.startswith(CONSTANTS):
                continue
            new = find_tensor(model, name)
            if new is None or _layout(new) != self._layouts[name]:
                reason = reason or f"{name} is gone, or of another layout, dtype or device"
            elif any(find_tensor(model, alias) is not new for alias in self._aliases.get(name, ())):
                reason = reason or f"{name} is no longer shared with {self._aliases[name]}"
            elif new is not old:
                replaced[name] = new
        if reason is not None:
            logger.info("the model is not as it was captured: %s", reason)
            return None
        for name, tensor in replaced.items():
            self._tensors[name] = tensor
            for gm in graphs:
                _rebind(gm, name, tensor)
        if replaced:
            self.state += 1
            for names, tensors in self._live:
                tensors[:] = self.get(names)
        if self._holders_of_tensors is not None and not self._holders_of_tensors.hold():
            self._holders_of_tensors = None
        return list(replaced)

    def _watching(self, model: nn.Module) -> Watch:
        if self._watch is None:
            self._watch = Watch(model)
        return self._watch


class _TensorHolders:
    """The dictionaries in which the model holds tensors, compared without Python code per tensor.

    All that the dictionaries of parameters and buffers refer to is compared, as one list, with what
    it was. Equal lists hold identical tensors: for two different tensors, Python asks for the truth
    value of their elementwise comparison, which raises for all but single elements. Tensors with a
    single element, of other classes, or held elsewhere are looked up one by one. So are all tensors
    where the lists differ, since a dictionary may hold more than what graphs read.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        places: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        samples: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        registers: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            samples.setdefault((tensor.dtype, tensor.device), tensor)
            holder: Any = model
            *owners, leaf = name.split(".")
            for owner in owners:
                inner = getattr(holder, owner, None)
                if isinstance(inner, torch.Tensor):  # one made of several
                    _add_place(places, holder, owner, inner)
                holder = inner
            _add_place(places, holder, leaf, tensor)
            if isinstance(holder, nn.Module):
                registers.update(
                    {id(d): d for d in (parameters_of(holder), buffers_of(holder)) if d}
                )
        self._all = _Entries(list(places.values()))
        self._others = _Entries([p for p in places.values() if not _is_told(p, registers)])
        self._registers = tuple(registers.values())
        self._as_found: list[Any] | None = None  # until all was looked up once
        self._samples = [(t, dtype, device) for (dtype, device), t in samples.items()]

    def hold(self) -> bool:
        """Returns whether the tensors are there, and one of each dtype and device still has it."""
        if not (self._others.hold() and (self._are_as_found() or self._hold_all())):
            return False
        for tensor, dtype, device in self._samples:
            if tensor.dtype is not dtype or tensor.device != device:
                return False
        return True

    def _are_as_found(self) -> bool:
        try:
            return gc.get_referents(*self._registers) == self._as_found
        except Exception:  # whatever the comparison of unlike tensors says
            return False

    def _hold_all(self) -> bool:
        """Returns whether all that graphs read is there, whatever else changed in a dictionary."""
        if not self._all.hold():
            return False
        self._as_found = gc.get_referents(*self._registers)
        return True


class _Entries:
    """Entries of dictionaries, looked up in loops without Python code."""

    def __init__(self, entries: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
        self._holders = [holder for holder, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._values = [value for _, _, value in entries]

    def hold(self) -> bool:
        """Returns whether each dictionary still has its entry."""
        return all(map(operator.is_, map(dict.get, self._holders, self._names), self._values))


def _is_told(place: tuple[dict[str, Any], str, Any], registers: dict[int, dict[str, Any]]) -> bool:
    """Returns whether another value in this place makes the comparison of dictionaries fail."""
    holder, _, value = place
    is_plain = type(value) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return id(holder) in registers and is_plain and value.numel() > 1


def _add_place(
    places: dict[tuple[int, str], tuple[dict[str, Any], str, Any]],
    holder: Any,
    name: str,
    value: torch.Tensor,
) -> None:
    """Notes the dictionary in which a module, or a tensor, holds `value`; an empty one if none."""
    dictionaries = [vars(holder)] if hasattr(holder, "__dict__") else []
    if isinstance(holder, nn.Module):
        dictionaries = [parameters_of(holder), buffers_of(holder), *dictionaries]
    found: dict[str, Any] = next((d for d in dictionaries if name in d), {})
    places[id(found), name] = (found, name, value)


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _rebind(gm: GraphModule, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        try:
            holder = module.get_submodule(owner)
        except AttributeError:
            continue
        if leaf in parameters_of(holder) or leaf in buffers_of(holder):
            setattr(holder, leaf, tensor)
