"""Describes the machine of a measurement: versions, load, and the libraries that multiply."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pabc
from pabc.passes import onednn_is_faster


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the device, the versions and the date of the measurement."""
    import diffusers

    return {
        "device": _name_device(device),
        "processor": _name_processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pabc": pabc.__version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def find_busy_machine() -> list[str]:
    """Returns a warning if other processes keep the CPUs busy."""
    cpus, load = os.cpu_count() or 1, _find_load()
    if load <= cpus / 2:
        return []
    return [f"the machine is busy (load {load:.1f} on {cpus} CPUs): timings will be off"]


def find_libraries(device: torch.device, backend: str) -> dict[str, str]:
    """Returns code -> the library that computes its matrix products: PyTorch's own, and pabc's."""
    own = _name_own_library(device)
    uses_onednn = device.type == "cpu" and backend == "inductor" and onednn_is_faster()
    return {"torch": own, "pabc": "oneDNN" if uses_onednn else own}


def _name_own_library(device: torch.device) -> str:
    """Returns the library of PyTorch's own matrix products in float32."""
    if device.type == "cuda":
        return "hipBLAS" if torch.version.hip else "cuBLAS"
    if device.type == "cpu":
        return "MKL" if torch.backends.mkl.is_available() else "another BLAS"
    return device.type


def _find_load() -> float:
    """Returns the mean number of processes that ran in the last minute; 0 where it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})" if device.type == "cpu" else str(device)


def _name_processor() -> str:
    """Returns the processor's name and the vector instructions that PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
