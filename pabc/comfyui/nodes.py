"""The nodes, in the form in which ComfyUI loads them."""

from __future__ import annotations

from typing import Any

import torch

from pabc.comfyui.acceleration import Acceleration, find_acceleration
from pabc.comfyui.picture import draw
from pabc.comfyui.report import describe
from pabc.comfyui.rules import RULES
from pabc.options import Backend

_CATEGORY = "model_patches/pabc"
FASTEST = 4.0
"""The largest speed-up that can be asked for."""
BACKENDS: dict[str, Backend | None] = {"no": None, "inductor": "inductor", "eager": "eager"}
"""Choice -> the backend with which the diffusion model is compiled; None: it is not."""


class Accelerate:
    """Makes the samplers of a model skip calls of it, and forecast what these would return."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Skips calls of the model in a sampler's steps, and forecasts their outputs."
    FUNCTION = "accelerate"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs of the node."""
        number = {"default": 2.0, "min": 1.0, "max": FASTEST, "step": 0.1}
        return {
            "required": {
                "model": ("MODEL",),
                "speedup": ("FLOAT", {**number, "tooltip": "of the model's calls; 1: as without"}),
                "rule": (list(RULES), {"default": RULES[0], "tooltip": _RULE}),
                "compile": (list(BACKENDS), {"default": "no", "tooltip": _COMPILE}),
            }
        }

    def accelerate(self, model: Any, speedup: float, rule: str, compile: str) -> tuple[Any]:
        """Returns a clone of the model patcher; the one that is given stays as it is.

        Raises: ValueError for a setting that is not offered.
        """
        if not isinstance(speedup, (int, float)) or not 1.0 <= speedup <= FASTEST:
            raise ValueError(f"speedup: expected 1 to {FASTEST:g}, found {speedup!r}")
        for name, found, choices in (("rule", rule, RULES), ("compile", compile, BACKENDS)):
            if found not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {found!r}")
        return (Acceleration(speedup, rule, BACKENDS[compile]).attach(model),)


class Explain:
    """Shows what the last run of an accelerated model did."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Shows which steps of the last run called the model, and why."
    FUNCTION = "explain"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("plan", "table")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs of the node."""
        after = {"tooltip": "what the sampler returns, so that this comes after it"}
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("LATENT", after)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Returns what is another value each time: a run has changed what is shown."""
        return float("nan")

    def explain(self, model: Any, after: Any = None) -> tuple[torch.Tensor, str]:
        """Returns a picture of the plan, [1, height, width, 3], and a table as text.

        Raises: ValueError for a model that did not come from the other node.
        """
        found = find_acceleration(model)
        if found is None:
            raise ValueError(
                "model: expected what Accelerate (pabc) returns, or a later node, found a model "
                "that it has not seen"
            )
        return draw(found.report), describe(found.report)


_RULE = (
    "auto: the first run is computed and recorded, later ones follow a plan made from it. "
    "skip: evenly spread steps call the model; the others follow from the last two outputs "
    "(linear), the last three (quadratic), or repeat the last one (hold)"
)
_COMPILE = "captures the diffusion model and compiles it; the first run takes longer"
NODE_CLASS_MAPPINGS = {"PabcAccelerate": Accelerate, "PabcExplain": Explain}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PabcAccelerate": "Accelerate (pabc)",
    "PabcExplain": "Explain (pabc)",
}
