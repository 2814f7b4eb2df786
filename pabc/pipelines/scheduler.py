"""Observes the calls of a diffusers scheduler, for those who follow it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol

import torch

_TOLERANCE = 1e-4
"""The largest distance of two spellings of one timestep, as a share of the largest timestep."""


class GenerationFollower(Protocol):
    """An observer of a scheduler's calls."""

    def timesteps_set(self) -> None:
        """Is called when the steps of a new loop were set."""

    def input_scaled(self, timestep: Any) -> None:
        """Is called before the model is called at this timestep."""

    def stepped(self, timestep: Any) -> None:
        """Is called after the step of this timestep."""

    def copy_stepped(self) -> None:
        """Is called after a copy of the scheduler made a step."""


def follow(scheduler: Any, current: Callable[[], GenerationFollower]) -> Callable[[], None]:
    """Tells the follower that `current` gives of calls of the scheduler; returns what ends that.

    The methods are wrapped as attributes of this one object, and stay methods: they keep their
    signatures, which pipelines look at, and a deep copy of the scheduler has its own. When the last
    follower leaves, the attributes go.
    """
    followers = _followers(scheduler)
    if followers is None:
        followers = []
        for name, tell in _TOLD.items():
            if hasattr(scheduler, name):
                setattr(scheduler, name, _wrap(scheduler, name, tell, followers))
    told = followers
    told.append(current)

    def leave() -> None:
        if current in told:
            told.remove(current)
            if not told:
                _unwrap(scheduler)

    return leave


def describe(scheduler: Any) -> str:
    """Returns the class of a scheduler and its settings."""
    config = getattr(scheduler, "config", None)
    settings = config if isinstance(config, Mapping) else {}
    public = {name: value for name, value in settings.items() if not str(name).startswith("_")}
    return f"{type(scheduler).__qualname__} {sorted(public.items(), key=str)}"


def index_of(timestep: Any, timesteps: Any, expected: int) -> int | None:
    """Returns which of the timesteps this one is; None if that would wait for a device.

    Where several are equal, as those of second-order schedulers are: the expected one, or the next.
    """
    if not isinstance(timestep, torch.Tensor):
        return _find_value(timestep, timesteps, expected)
    if timestep.numel() != 1:
        return None
    if isinstance(timesteps, torch.Tensor) and _share_memory(timestep, timesteps):
        offset = timestep.storage_offset() - timesteps.storage_offset()
        return int(offset // max(timesteps.stride(0), 1))
    at_hand = timestep.device.type == "cpu"
    return _find_value(timestep.item(), timesteps, expected) if at_hand else None


def are_same(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Returns whether these are the same timesteps, up to rounding."""
    far = _TOLERANCE * max(map(abs, expected), default=0)
    return len(found) == len(expected) and all(
        abs(a - b) <= far for a, b in zip(found, expected, strict=True)
    )


def _find_value(timestep: Any, timesteps: Any, expected: int) -> int | None:
    if not isinstance(timestep, int | float):
        return None
    if isinstance(timesteps, torch.Tensor) and timesteps.device.type != "cpu":
        return None
    values = [float(t) for t in timesteps]
    far = _TOLERANCE * max(map(abs, values), default=0)
    equal = [i for i, value in enumerate(values) if abs(value - timestep) <= far]
    return next((i for i in equal if i >= expected), equal[0] if equal else None)


def _share_memory(timestep: torch.Tensor, timesteps: torch.Tensor) -> bool:
    return (
        timestep.dtype == timesteps.dtype
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
    )


_Tell = Callable[[GenerationFollower, Any], None]
_Followers = list[Callable[[], GenerationFollower]]
_TOLD: dict[str, _Tell] = {
    "set_timesteps": lambda follower, _: follower.timesteps_set(),
    "scale_model_input": lambda follower, timestep: follower.input_scaled(timestep),
    "step": lambda follower, timestep: follower.stepped(timestep),
}


def _followers(scheduler: Any) -> _Followers | None:
    """Returns the followers of the scheduler; None if it is not wrapped."""
    wrapped = next((vars(scheduler)[name] for name in _TOLD if name in vars(scheduler)), None)
    return getattr(wrapped, "pabc_followers", None)


def _wrap(scheduler: Any, name: str, tell: _Tell, followers: _Followers) -> MethodType:
    function = getattr(scheduler, name).__func__
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        arguments = signature.bind_partial(self, *args, **kwargs).arguments
        for current in tuple(followers):
            if self is scheduler:
                tell(current(), arguments.get("timestep"))
            elif name == "step":
                current().copy_stepped()
        return result

    call.pabc_followers = followers  # type: ignore[attr-defined]
    call.pabc_replaced = vars(scheduler).get(name)  # type: ignore[attr-defined]
    return MethodType(call, scheduler)


def _unwrap(scheduler: Any) -> None:
    for name in _TOLD:
        wrapped = vars(scheduler).get(name)
        if hasattr(wrapped, "pabc_followers"):
            delattr(scheduler, name)
            if wrapped.pabc_replaced is not None:
                setattr(scheduler, name, wrapped.pabc_replaced)
