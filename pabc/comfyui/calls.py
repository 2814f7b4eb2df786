"""Describes a call that the host makes of its diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

_SIDES = {0: "cond", 1: "uncond"}
_PATCHES = ("patches", "patches_replace", "optimized_attention_override")
"""The host's options that change what its diffusion model computes."""


class HostCall:
    """The diffusion model with the options of one call, which is not repeated by a skipped one.

    Two are equal if values kept of one call may stand for the other: the same patches, and a
    control in both or in none. Nothing else is read from the options.

    Attributes:
        has_control: whether a ControlNet takes part.
        is_patched: whether patches do.
    """

    # Slots: pabc looks for tensors in the attributes of arguments, and these are none of its.
    __slots__ = ("_control", "_function", "_patches", "has_control", "is_patched", "options")

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        """`kwargs`: those of the call; what is not for pabc to look at is taken out."""
        self._function = function
        self.options: dict[str, Any] = kwargs.pop("transformer_options", {})
        self._control = kwargs.pop("control", None)
        self.has_control = self._control is not None
        self._patches = _identities({k: self.options[k] for k in _PATCHES if k in self.options})
        self.is_patched = bool(self._patches)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the diffusion model; some models take the parts out of the control that they use,
        so it gets a copy."""
        return self._function(
            *args, control=_copy(self._control), transformer_options=self.options, **kwargs
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostCall) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Hashable, ...]:
        return self.has_control, self._patches


class CallNames:
    """Names the calls of one run by the conditions that the host says are in their batch.

    The same conditions have the same name at every step of the run, and, if they come in the same
    order, in the next run: `cond`, `uncond`, `uncond+cond` for both in one batch, `cond 1` for a
    second prompt, such as that of an area.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[Hashable, int]] = {}
        """Side -> identity of a condition -> how many of this side came before it."""

    def name(self, options: Mapping[str, Any]) -> str:
        """Returns the name of a call with these options."""
        sides = options["cond_or_uncond"]
        identities = options.get("uuids") or [None] * len(sides)
        parts = [self._name(side, each) for side, each in zip(sides, identities, strict=True)]
        window = getattr(options.get("context_window"), "index_list", None)
        frames = "" if window is None else f" of frames {','.join(map(str, window))}"
        return "+".join(parts) + frames

    def _name(self, side: int, identity: Hashable) -> str:
        known = self._known.setdefault(side, {})
        order = known.setdefault(identity, len(known))
        name = _SIDES.get(side, f"cond[{side}]")
        return f"{name} {order}" if order else name


def _identities(value: Any) -> tuple[Hashable, ...]:
    """Returns what tells nested containers of functions apart by the functions in them."""
    if isinstance(value, Mapping):
        return tuple((key, _identities(inner)) for key, inner in value.items() if inner)
    if isinstance(value, list | tuple):
        return tuple(_identities(inner) for inner in value)
    return (_Same(value),)


class _Same:
    """An object that equals itself alone; a method equals the same method of the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        mine, theirs = self._value, other._value
        if hasattr(mine, "__func__") and hasattr(theirs, "__func__"):
            return mine.__func__ is theirs.__func__ and mine.__self__ is theirs.__self__
        return mine is theirs

    def __hash__(self) -> int:
        return hash(id(getattr(self._value, "__func__", self._value)))


def _copy(control: Any) -> Any:
    """Returns a control in containers of its own, with the same tensors."""
    if isinstance(control, dict):
        return {key: _copy(value) for key, value in control.items()}
    return list(control) if isinstance(control, list) else control
