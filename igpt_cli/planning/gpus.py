"""GPUs as data: memory, and the dense bfloat16 peak (NVIDIA's data sheets)."""

from __future__ import annotations

from dataclasses import dataclass

from igpt_cli.errors import unknown

#: The part of a GPU's memory that a plan counts on; the rest is for the CUDA context, communication and fragmentation.
USABLE = 0.9


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. `memory` is in units of 1e9 bytes; boards show somewhat more. `devices`: what torch calls it."""

    name: str
    memory: int
    tflops: float
    devices: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """As sold."""
        return self.memory * 10**9

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return int(USABLE * self.memory_bytes)

    @property
    def peak_flops(self) -> float:
        """FLOP/s."""
        return self.tflops * 1e12


GPUS: dict[str, GPU] = {
    g.name: g
    for g in (
        GPU("b200", 180, 2250, ("NVIDIA B200",)),
        GPU("h200", 141, 989, ("NVIDIA H200",)),
        GPU("h100", 80, 989, ("NVIDIA H100 80GB HBM3",)),
        GPU("h100-pcie", 80, 756, ("NVIDIA H100 PCIe",)),
        GPU("h100-nvl", 94, 835, ("NVIDIA H100 NVL",)),
        GPU("a100-80", 80, 312, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB")),
        GPU("a100-40", 40, 312, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB")),
        GPU("l40s", 48, 362, ("NVIDIA L40S",)),
        GPU("l40", 48, 181, ("NVIDIA L40",)),
        GPU("l4", 24, 121, ("NVIDIA L4",)),
        GPU("a10", 24, 125, ("NVIDIA A10",)),
        GPU("rtx4090", 24, 165, ("NVIDIA GeForce RTX 4090",)),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name.

    Raises:
        InputError: there is none; the message lists the known names and the nearest.
    """
    if name in GPUS:
        return GPUS[name]
    raise unknown("GPU", name, GPUS)


def peak_flops(device_name: str) -> float | None:
    """The peak in FLOP/s of what `torch.cuda.get_device_name` names; None for one that is not in the table.

    Names must be equal: a part of a GPU (MIG), a laptop's or another variant has another peak.

    >>> peak_flops("NVIDIA H200"), peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (989000000000000.0, None)
    """
    return next((g.peak_flops for g in GPUS.values() if device_name in g.devices), None)
