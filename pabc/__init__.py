"""pabc: a compiler pass that makes diffusion transformers reuse work across diffusion steps."""

from pabc import presets
from pabc.api import CompiledModel, compile, explain
from pabc.explanation import Explanation
from pabc.plan import Action, Plan, SlotSpec
from pabc.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Action",
    "CompiledModel",
    "Explanation",
    "Plan",
    "Schedule",
    "SlotSpec",
    "compile",
    "explain",
    "presets",
]
