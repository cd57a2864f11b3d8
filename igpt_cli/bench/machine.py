"""What was measured on, and what every measurement needs."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from igpt_cli import __version__
from igpt_cli.device import choose_device
from igpt_cli.planning.gpus import peak_flops


def machine(device: str = "auto") -> dict[str, Any]:
    """What was measured on: device, its name, peak in FLOP/s (None if unknown), threads, versions."""
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    versions = {"igpt": __version__, "torch": torch.__version__, "python": platform.python_version()}
    with suppress(metadata.PackageNotFoundError):
        versions["transformers"] = metadata.version("transformers")
    return {
        "device": str(chosen),
        "device_name": name,
        "peak_flops": peak_flops(name) if chosen.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def _processor() -> str:
    """What the system calls its processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_memory_short(e: RuntimeError) -> bool:
    """Whether a device had too little memory; cuBLAS says so in its own way."""
    return isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) or "ALLOC_FAILED" in str(e)
