"""Keeps plans in a folder, so that other processes need not record what they are found from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pabc.automatic.plans import AutoPlan
from pabc.calibration.calibration import Calibration
from pabc.calibration.files import parsing, replacing

logger = logging.getLogger(__name__)

KIND = "plan of pabc.auto"
VERSION = 3
"""The version of the format; also raised where plans of earlier versions may be wrong."""


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
            except (OSError, ValueError) as error:
                logger.warning("a plan is left out: %s", error)
        return found

    def save(self, plan: AutoPlan, replaced: Iterable[AutoPlan] = ()) -> None:
        """Writes a plan, and beside it its calibration, each whole or not at all; removes those
        that it takes the place of."""
        folder = self._folder_of(plan.kind.family)
        path = folder / f"{_digest(plan)}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            plan.calibration.save(path.with_suffix(".npz"))
            with replacing(path) as beside:
                beside.write_text(_pack(plan.to_content()))
            for other in {_digest(old) for old in replaced} - {path.stem}:
                for suffix in (".json", ".npz"):
                    (folder / f"{other}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a plan is not kept for other processes: %s", error)

    def _folder_of(self, family: str) -> Path:
        return self.folder / "plans" / family


def _read(path: Path) -> AutoPlan:
    data = path.read_bytes()
    with parsing(path, KIND):
        content = json.loads(data)
        version, checksum = content.pop("version"), content.pop("checksum", None)
    if version != VERSION:
        raise ValueError(f"{path}: expected a {KIND} of version {VERSION}, found version {version}")
    calibration = Calibration.load(path.with_suffix(".npz"))
    day = time.strftime("%Y-%m-%d", time.localtime(_written(path)))
    with parsing(path, KIND):
        if checksum != _checksum(content):
            raise ValueError("checksum: expected that of the contents, found another")
        return AutoPlan.from_content(content, calibration, f"recorded on {day}, from {path}")


def _pack(content: Mapping[str, Any]) -> str:
    """Returns what is known of a plan as JSON, with a checksum: damage may leave it well-formed."""
    whole = {"version": VERSION, "checksum": _checksum(content), **content}
    return json.dumps(whole, indent=1)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
