"""Keeps plans in a folder, so that other processes need not record what they are found from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

from pabc.automatic.plans import AutoPlan
from pabc.calibration.calibration import Calibration

logger = logging.getLogger(__name__)

VERSION = 2


def default_folder() -> Path:
    """Returns the folder in PABC_CACHE; without it, `pabc` in the user's folder for caches."""
    named = os.environ.get("PABC_CACHE")
    if named:
        return Path(named)
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "pabc"
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "pabc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pabc"


class Store:
    """A folder of plans: two files for each kind of generation and target.

    What cannot be read or written is told by the log, and does without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, family: str) -> list[AutoPlan]:
        """Returns the plans for a family of models, the latest written last."""
        found = []
        for path in sorted(self._folder_of(family).glob("*.json"), key=_written):
            try:
                found.append(_read(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("the plan in %s is left out: %s", path, error)
        return found

    def save(self, plan: AutoPlan, replaced: Iterable[AutoPlan] = ()) -> None:
        """Writes a plan, and beside it its calibration, each whole or not at all; removes those
        that it takes the place of."""
        folder = self._folder_of(plan.kind.family)
        path = folder / f"{_digest(plan)}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            plan.calibration.save(path.with_suffix(".npz"))
            beside = path.with_suffix(f".{os.getpid()}.part")
            content = {"version": VERSION, **plan.to_content()}
            beside.write_text(json.dumps(content, indent=1))
            beside.replace(path)
            for other in {_digest(old) for old in replaced} - {path.stem}:
                for suffix in (".json", ".npz"):
                    (folder / f"{other}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a plan is not kept for other processes: %s", error)

    def _folder_of(self, family: str) -> Path:
        return self.folder / "plans" / family


def _read(path: Path) -> AutoPlan:
    content = json.loads(path.read_text())
    if content["version"] != VERSION:
        raise ValueError(f"version: expected {VERSION}, found {content['version']}")
    calibration = Calibration.load(path.with_suffix(".npz"))
    day = time.strftime("%Y-%m-%d", time.localtime(_written(path)))
    return AutoPlan.from_content(content, calibration, f"recorded on {day}, from {path}")


def _digest(plan: AutoPlan) -> str:
    kind = plan.kind
    target = str(plan.target)
    sampling = kind.sampler, kind.timesteps, kind.precision
    text = repr((kind.weights, kind.form, sampling, plan.calls[0].name, target))
    guided = plan.calibration.updates.outputs[0].round(3).tolist()
    return hashlib.sha256(f"{text}{guided}".encode()).hexdigest()[:20]


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
