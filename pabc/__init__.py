"""pabc: a compiler pass that makes diffusion transformers reuse work across diffusion steps."""

from pathlib import Path

# In a checkout that is on the path without being installed, `passes` and `kernels` lie beside this
# folder; setup.py maps them inside.
if (Path(__file__).parents[1] / "setup.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

from pabc import presets
from pabc.api import compile, explain, load
from pabc.artifact.errors import ArtifactError
from pabc.automatic import auto
from pabc.calibration.calibrate import calibrate
from pabc.calibration.calibration import Calibration
from pabc.compiled import CompiledModel
from pabc.explanation import Explanation
from pabc.passes import (
    register_attention_op,
)
from pabc.pipelines import CompiledPipeline, compile_pipeline
from pabc.plan import Action, Plan, SlotSpec
from pabc.runtime.guards import GuardError
from pabc.runtime.peers import RankError
from pabc.runtime.stats import Stats
from pabc.runtime.trajectory import Trajectory
from pabc.schedule import Schedule

__version__ = "0.2.0"

__all__ = [
    "Action",
    "ArtifactError",
    "Calibration",
    "CompiledModel",
    "CompiledPipeline",
    "Explanation",
    "GuardError",
    "Plan",
    "RankError",
    "Schedule",
    "SlotSpec",
    "Stats",
    "Trajectory",
    "auto",
    "calibrate",
    "compile",
    "compile_pipeline",
    "explain",
    "load",
    "presets",
    "register_attention_op",
]
