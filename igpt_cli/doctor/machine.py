"""The hardware: processor, memory, GPUs, and why PyTorch sees none."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from igpt_cli.bench.machine import machine
from igpt_cli.device import choose_precision

#: Files in which Linux tells of memory, and of NVIDIA's driver.
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
NVIDIA = Path("/proc/driver/nvidia/version")


def processor() -> dict[str, Any]:
    """Name, cores (of the machine, and those this process may use), threads, vector instructions, bfloat16."""
    info = machine("cpu")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else info["cores"]
    return {
        "name": info["device_name"],
        "cores": info["cores"],
        "usable_cores": usable,
        "threads": info["threads"],
        "instructions": info["cpu_capability"],
        "bfloat16": choose_precision("auto", torch.device("cpu")) == "bfloat16",
    }


def memory() -> dict[str, int | None]:
    """Bytes of memory: "total", "available" without swapping, and the "limit" of a container; None where unknown."""
    found: dict[str, int | None] = {"total": None, "available": None, "limit": None}
    with suppress(OSError, ValueError, AttributeError):
        found["total"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration):
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        found["available"] = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        found["limit"] = int(CGROUP.read_text(encoding="ascii"))
    return found


def gpus() -> list[dict[str, Any]]:
    """NVIDIA's and AMD's GPUs that PyTorch can use: name, bytes of memory, compute capability, peak in FLOP/s."""
    found = []
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        info = machine(f"cuda:{k}")
        free, total = torch.cuda.mem_get_info(k)
        capability = ".".join(map(str, torch.cuda.get_device_capability(k)))
        found.append(
            {
                "device": info["device"],
                "name": info["device_name"],
                "memory": total,
                "free": free,
                "capability": capability,
                "peak_flops": info["peak_flops"],
            }
        )
    return found


def built_for() -> str:
    """For which GPUs this PyTorch was built, such as "CUDA 12.8"."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if getattr(torch.version, "hip", None) else "no CUDA"


def has_apple_gpu() -> bool:
    """Whether PyTorch can use an Apple GPU, as the device mps."""
    return torch.backends.mps.is_available()


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none, "unknown" where it does not say."""
    if program := shutil.which("nvidia-smi"):
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [program, "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            if lines := done.stdout.split():
                return lines[0]
    return "unknown" if NVIDIA.exists() else None
