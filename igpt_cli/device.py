"""Choose the device and the precision."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from igpt_cli.errors import InputError
from igpt_cli.files import proc_bytes

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """The device called "auto" (the best there is), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        InputError: an unknown name, or a device that this machine or this PyTorch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"there is no device {name!r}; use --device auto, cpu, cuda, cuda:0 (cuda:1, ...) or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise InputError(f"device {name} is not here: PyTorch {torch.__version__} sees {n} GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device mps is not here: PyTorch {torch.__version__} sees no Apple GPU")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "float32" or "bfloat16"; "auto" is bfloat16 if the hardware multiplies it natively (a CPU that emulates it was
    measured ten times slower than with float32)."""
    if name not in PRECISIONS:
        raise InputError(f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if device.type == "cpu":
        has: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
        return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
    return "float32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16, or nothing for float32. Weights stay float32.

    A forward pass uses each weight once, so autocast caches no copies, which fill memory with activation checkpointing.
    """
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def out_of_memory(e: BaseException) -> bool:
    """Whether the device had too little memory; only CUDA's error has a class of its own."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e) or "out of memory" in str(e)


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a GPU, or those available on this machine without swapping; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if available := proc_bytes("/proc/meminfo", "MemAvailable"):
        return available
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
