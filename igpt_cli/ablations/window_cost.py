"""The cost of attention by image size: global, and in windows (Swin, section 3.2, equations 1, 2).

Shapes: B batch, n x n the grid of patches, C width, M side of a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from igpt_cli.bench.machine import is_memory_short, wait_for
from igpt_cli.device import autocast, choose_device, choose_precision
from igpt_cli.errors import InputError
from igpt_cli.models.swin import Block
from igpt_cli.models.vit import Attention
from igpt_cli.models.windows import partition, unpartition

#: Swin-T's first stage: width, heads, side of a window, pixels of a patch.
WIDTH, HEADS, WINDOW, PATCH = 96, 3, 7, 4
#: Sides of the image in pixels.
SIDES = {"small": (56, 112, 224, 336, 448), "full": (112, 224, 448, 672, 896)}
#: What is timed: (key, what it is called).
LAYERS = {"global": "all patches", "windows": "windows", "swin": "windows, shifted, with bias"}


def multiply_adds(n: int, C: int = WIDTH, M: int = WINDOW) -> tuple[int, int]:
    """Of a layer on n x n patches: global, 4 n^2 C^2 + 2 n^4 C (equation 1), and in windows, 4 n^2 C^2 + 2 M^2 n^2 C.

    At 224 pixels, the first stage of Swin-T: 2,004 million against 145 million.

    >>> multiply_adds(56)
    (2003828736, 145108992)
    """
    maps = 4 * n**2 * C**2
    return maps + 2 * n**4 * C, maps + 2 * M**2 * n**2 * C


def layers(seed: int = 0) -> dict[str, Callable[[Tensor], Tensor]]:
    """{key of `LAYERS`: (B, n, n, C) -> (B, n, n, C)}, all of one width: attention of all patches, the same layer in
    windows, and Swin's own, which shifts them and adds a bias for each relative position."""
    torch.manual_seed(seed)
    attention = Attention(WIDTH, HEADS).eval()
    block = Block(WIDTH, HEADS, WINDOW, WINDOW // 2, 4.0, 0.0).eval()
    nn.init.trunc_normal_(block.attn.bias_table, std=0.02)

    def everywhere(x: Tensor) -> Tensor:
        return attention(x.flatten(1, 2)).view_as(x)

    def windows(x: Tensor) -> Tensor:
        B, n = x.shape[:2]
        y = attention(partition(x, WINDOW).flatten(0, 1))
        return unpartition(y.view(B, -1, WINDOW**2, WIDTH), n, n)

    return {"global": _on(attention, everywhere), "windows": _on(attention, windows), "swin": _on(block, block.attend)}


def _on(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Moves the module where the input is."""
    return lambda x: (module.to(x.device), call(x))[1]


@torch.inference_mode()
def measure(
    sides: Sequence[int],
    passes: int,
    *,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time each of `LAYERS` on one image of each size; the fastest of `passes` counts.

    On a CPU seconds are processor time, those of all threads together, so that other work does not count.

    Args:
        sides: of the image in pixels, multiples of `PATCH` * `WINDOW` = 28; others raise InputError.

    Returns:
        For each side: resolution, patches, multiply_adds and seconds by key of `LAYERS`; seconds are None where memory
            is
        short. Swin's layer has the multiply-adds of windows.
    """
    if wrong := [side for side in sides if side < PATCH * WINDOW or side % (PATCH * WINDOW)]:
        raise InputError(f"images of {wrong[0]} pixels do not divide into windows; take multiples of {PATCH * WINDOW}")
    chosen = choose_device(device)
    precision, timed, out = choose_precision(precision, chosen), layers(seed), []
    for i, side in enumerate(sides):
        n = side // PATCH
        x = torch.randn(1, n, n, WIDTH, generator=torch.Generator().manual_seed(seed)).to(chosen)
        seconds: dict[str, float | None] = {}
        for k, (key, layer) in enumerate(timed.items()):
            seconds[key] = _fastest(layer, x, passes, precision)
            progress(len(timed) * i + k + 1, len(timed) * len(sides))
        everywhere, windows = multiply_adds(n)
        counted = {"global": everywhere, "windows": windows, "swin": windows}
        out.append({"resolution": side, "patches": n * n, "multiply_adds": counted, "seconds": seconds})
    return out


def _fastest(layer: Callable[[Tensor], Tensor], x: Tensor, passes: int, precision: str) -> float | None:
    """Seconds of a pass; None where memory is short."""
    times, clock = [], time.process_time if x.device.type == "cpu" else time.perf_counter
    try:
        for _ in range(passes + 1):  # the first does what is done once only
            wait_for(x.device)
            began = clock()
            with autocast(precision, x.device):
                layer(x)
            wait_for(x.device)
            times.append(clock() - began)
    except RuntimeError as e:
        if not is_memory_short(e):
            raise
        return None
    return min(times[1:])
