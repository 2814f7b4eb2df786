"""Wraps a model in a module that is called in its place, like that of torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import nn

from pabc.internals.modules import children_of, compiled_call, forward_hooks, forward_pre_hooks


class Wrapper(nn.Module):
    """Holds a model as `_orig_mod`; attributes are read from it, set on it and deleted from it.

    Its own are those of its class, and what it holds once :meth:`_begin_passing_on` was called.
    State dicts are the model's, keys unchanged.
    """

    _orig_mod: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def _begin_passing_on(self) -> None:
        """Makes attributes that this object does not have be set on the model from now on."""
        vars(self)["_passes_on"] = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` within hooks that were registered on this object, if there are any."""
        if torch.compiler.is_dynamo_compiling():
            return call_apart(self, args, kwargs)
        hooked = compiled_call(self) or forward_hooks(self) or forward_pre_hooks(self)
        return super().__call__(*args, **kwargs) if hooked else self.forward(*args, **kwargs)

    @property
    def training(self) -> bool:
        """The model's own mode."""
        return children_of(self)["_orig_mod"].training  # type: ignore[union-attr]

    @training.setter
    def training(self, mode: bool) -> None:
        if "_passes_on" in vars(self):  # else it is the default that nn.Module begins with
            self._orig_mod.training = mode

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's own state dict, keys unchanged."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a state dict into the model. Copied values take effect at the next call, replaced
        tensors (`assign=True`) at the next generation; neither recompiles."""
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self._orig_mod, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self._orig_mod, name)

    def _is_own(self, name: str) -> bool:
        own = vars(self)
        return (
            "_passes_on" not in own
            or name == "_orig_mod"
            or name in own
            or hasattr(type(self), name)
        )

    def __dir__(self) -> Iterable[str]:
        return sorted({*super().__dir__(), *dir(self._orig_mod)})

    def __len__(self) -> int:
        if isinstance(self._orig_mod, Sized):
            return len(self._orig_mod)
        raise TypeError(f"object of type '{type(self._orig_mod).__name__}' has no len()")

    def __bool__(self) -> bool:
        return True if not isinstance(self._orig_mod, Sized) else bool(self._orig_mod)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: what is compiled belongs to this process."""
        raise TypeError(
            "a compiled model cannot be copied or pickled: copy the model, and compile the copy"
        )


@torch.compiler.disable(reason="pabc compiles this model itself")
def call_apart(called: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Makes a call of a compiled model that torch.compile meets, which does not trace into it."""
    warnings.warn(
        "pabc: a model that follows a schedule is called within torch.compile, which compiles "
        "nothing of it: pabc compiles its phases (backend='inductor'). With backend='original' "
        "call model.compile() instead: computed steps run what it makes",
        stacklevel=3,
    )
    return called(*args, **kwargs)
