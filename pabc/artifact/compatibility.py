"""Checks that an artifact fits the installed versions, the hardware and the model.

Each of the three is described by a flat table of strings. Tables are compared entry by entry, so
that an error can name the entries that differ.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from pabc.artifact.errors import ArtifactError
from pabc.artifact.sources import code_of_class, version

PropertyTable = dict[str, str]
_FLAGS = "CPU flags"


def describe_versions() -> PropertyTable:
    """Returns the versions of the software that makes graphs and code."""
    return {
        "pabc": importlib.import_module("pabc").__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": str(torch.__version__),
        "triton": version("triton") or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_hardware(devices: Iterable[torch.device]) -> PropertyTable:
    """Returns the properties of the CPU, and of these devices, that compiled code depends on."""
    table = {
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        _FLAGS: " ".join(_cpu_flags()),
    }
    for device in sorted({d for d in devices if d.type == "cuda"}, key=str):
        properties = torch.cuda.get_device_properties(device)
        table[str(device)] = f"{properties.name} ({properties.major}.{properties.minor})"
        table["CUDA"] = str(torch.version.cuda or torch.version.hip)
    return table


def describe_model(model: nn.Module) -> PropertyTable:
    """Returns the layouts of parameters and buffers, which of them are tied, and digests of the
    code of modules.

    The values of tensors are not included: an artifact fits any weights. Nor are settings: see
    :mod:`pabc.artifact.state`.
    """
    table: PropertyTable = {}
    seen: dict[int, str] = {}
    for name, tensor in _tensors(model):
        shared = seen.setdefault(id(tensor), name)
        layout = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"
        kind = type(tensor).__qualname__
        table[f"tensor {name}"] = f"{kind} {layout}" if shared == name else f"is {shared}"
    for module in model.modules():
        code = code_of_class(type(module))
        table[f"code of {type(module).__qualname__}"] = code.digest
        table.update((f"version of {name}", found) for name, found in code.versions)
    return table


def check_description(name: str, saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises :class:`ArtifactError` if `found` does not fit; it names the first differing entries.

    Args:
        name: the name of what is described, for the message.
        saved: the description in the artifact.
        found: the description at loading time.
    """
    differing = [entry for entry in {**saved, **found} if not _fits(entry, saved, found)]
    if not differing:
        return
    lines = [
        f"{entry}: expected {_short(saved.get(entry))}, found {_short(found.get(entry))}"
        for entry in differing[:3]
    ]
    rest = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ArtifactError(f"{name}: {'; '.join(lines)}{rest}; compile the model and save it again")


def _fits(entry: str, saved: Mapping[str, str], found: Mapping[str, str]) -> bool:
    if entry == _FLAGS:  # code runs on a CPU that has all the features it was compiled for
        return set(saved.get(entry, "").split()) <= set(found.get(entry, "").split())
    return saved.get(entry) == found.get(entry)


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cpu_flags() -> list[str]:
    """Returns the CPU's feature flags on Linux, elsewhere the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return sorted(flags.split())
    return [platform.processor()]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
