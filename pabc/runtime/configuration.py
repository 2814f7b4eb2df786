"""Tells configurations of a model apart: which tensors, adapters, hooks and flags it runs with."""

from __future__ import annotations

import gc
import threading
from collections import deque
from typing import Any, NamedTuple

from torch import nn

from pabc.internals.modules import buffers_of, parameters_of
from pabc.passes import ModelState
from pabc.runtime.state import StateCheck, Watch

MAX_KNOWN = 8
"""Python states that are told apart; a flag may be set for one call, and reset after it."""


class Configuration(NamedTuple):
    """A configuration of a model.

    Attributes:
        python: a number of the Python state: modules, adapters, hooks, flags.
        tensors: how often parameters or buffers were replaced between two calls.
    """

    python: int
    tensors: int


class Configurations:
    """The configurations that one model was seen in.

    What changes during a call of the model is the call's own doing, such as weights that are moved
    to a device and back, and makes no other configuration. What changes between two calls does.

    Attributes:
        last: the configuration when it was last looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()  # calls of several threads end at the same time
        self._watch = Watch(model)
        self._known: deque[tuple[StateCheck, int]] = deque(maxlen=MAX_KNOWN)
        self._num_states = self._num_replaced = self._python = 0
        self._serial = -1
        self._holders: tuple[dict[str, Any], ...] = ()
        self._tensors: list[Any] = []
        self.last = self.look(closely=True)

    def look(self, *, closely: bool = False) -> Configuration:
        """Returns the configuration now. `closely`: whether a generation starts, when attributes of
        modules that PyTorch defines are compared, too."""
        with self._lock:
            return self._look(closely)

    def _look(self, closely: bool) -> Configuration:
        if self._watch.look(closely=closely) != self._serial:
            self._serial = self._watch.serial
            self._python = self._find_number()
            self._find_holders()
        elif not self._are_there():
            self._num_replaced += 1
            self._tensors = gc.get_referents(*self._holders)
        self.last = Configuration(self._python, self._num_replaced)
        return self.last

    def end_call(self) -> None:
        """Takes the state that a call of the model leaves for the one that it found."""
        with self._lock:
            if self._watch.look() != self._serial:
                self._serial = self._watch.serial
                self._known.append((self._check(), self._python))
                self._find_holders()
            else:
                self._tensors = gc.get_referents(*self._holders)

    def _find_number(self) -> int:
        """Returns the number of the state that the watch last saw, a new one for a new state."""
        for known, number in self._known:
            if known.hold(self._watch):
                return number
        self._num_states += 1
        self._known.append((self._check(), self._num_states))
        return self._num_states

    def _check(self) -> StateCheck:
        """Returns what compares later states with the one that the watch last saw."""
        return StateCheck(ModelState(self._watch.state, frozenset(), frozenset()))

    def _find_holders(self) -> None:
        modules = list(self._model.modules())
        registers = (r for m in modules for r in (parameters_of(m), buffers_of(m)))
        self._holders = tuple(register for register in registers if register)
        self._tensors = gc.get_referents(*self._holders)

    def _are_there(self) -> bool:
        """Returns whether the model holds the tensors that it held. Equal lists hold identical
        tensors: the comparison of two different ones raises, but for single elements."""
        try:
            return gc.get_referents(*self._holders) == self._tensors
        except Exception:  # whatever the comparison of unlike tensors says
            return False
