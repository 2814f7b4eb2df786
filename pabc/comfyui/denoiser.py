"""The diffusion model as pabc calls it: as the host would, or captured and compiled."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from pabc.api import compile
from pabc.comfyui.calls import HostCall
from pabc.compiled import CompiledModel
from pabc.options import Backend
from pabc.schedule import Schedule

logger = logging.getLogger(__name__)


class Denoiser(nn.Module):
    """Calls a diffusion model with what the host does around it; this is what steps skip."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False  # hosts leave models in the mode in which they are made

    def forward(self, call: HostCall, *args: Any, **kwargs: Any) -> Any:
        """Returns what the diffusion model returns for latents, a timestep and conditions."""
        return call(*args, **kwargs)


class _WithoutOptions(nn.Module):
    """Calls a diffusion model without the options of a host; this is what is captured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, control=None, transformer_options={}, **kwargs)


class CompiledDenoiser:
    """A diffusion model that pabc captures and compiles, and calls as it is where it cannot.

    Attributes:
        model: the diffusion model.
    """

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self.model = model
        self._name = type(model).__name__
        self._refused: set[str] = set()
        self._compiled: CompiledModel | None = None
        each_alone = Schedule.none((0,))  # a call is a generation: nothing is kept between calls
        try:
            self._compiled = compile(_WithoutOptions(model), each_alone, backend=backend)
        except ValueError as error:
            self._refuse(str(error))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, with the arguments that the host passes."""
        options = kwargs.get("transformer_options", {})
        given = {k: v for k, v in kwargs.items() if k not in ("control", "transformer_options")}
        reason = self._find_obstacle(HostCall(self.model, dict(kwargs)), options)
        if reason is not None:
            self._refuse(reason)
        elif self._compiled is not None:
            try:
                return self._compiled(*args, **given)
            except ValueError as error:
                self._compiled = None
                self._refuse(str(error))
        return self.model(*args, **kwargs)

    def _find_obstacle(self, call: HostCall, options: dict[str, Any]) -> str | None:
        """Returns why a call cannot run without the host's options; None: it can."""
        if call.has_control:
            return "a ControlNet takes part in its calls"
        if call.is_patched:
            return "other nodes have patched it"
        if options.get("wrappers", {}).get("diffusion_model"):
            return "other nodes have wrapped it"
        return None

    def _refuse(self, reason: str) -> None:
        if reason not in self._refused:
            self._refused.add(reason)
            logger.warning("pabc: %s is not compiled, but called as it is: %s", self._name, reason)
