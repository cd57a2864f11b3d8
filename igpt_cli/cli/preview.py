"""Small images in the terminal, two pixels a character."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import numpy as np

#: Characters between images side by side.
GAP = 2
RESET = "\x1b[0m"


def true_colour(stream: TextIO | None = None) -> bool:
    """Whether a stream (default: stdout) is a terminal that says it has 24-bit colours, and the user wants colour."""
    return (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR") and os.environ.get("COLORTERM") in _TRUE


_TRUE = ("truecolor", "24bit")


def room() -> int:
    """Characters on a line of the terminal."""
    return shutil.get_terminal_size().columns


def half_blocks(image: np.ndarray) -> list[str]:
    """An image (H, W, 3) uint8 as H / 2 lines: upper half blocks in one pixel's colour on the lower one's.

    >>> import numpy as np
    >>> half_blocks(np.array([[[1, 2, 3]], [[4, 5, 6]]], np.uint8))
    ['\\x1b[38;2;1;2;3m\\x1b[48;2;4;5;6m▀\\x1b[0m']
    """
    lines = []
    for y in range(0, len(image), 2):
        cells = []
        for x in range(image.shape[1]):
            upper = "38;2;{};{};{}".format(*image[y, x])
            lower = "48;2;{};{};{}".format(*image[y + 1, x]) if y + 1 < len(image) else "49"
            cells.append(f"\x1b[{upper}m\x1b[{lower}m▀")
        lines.append("".join(cells) + RESET)
    return lines


def previews(images: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> str:
    """Images (H, W, 3) uint8 of one size, as many side by side as `columns` characters hold, each above its caption."""
    width = images[0].shape[1]
    across = max(1, (columns + GAP) // (width + GAP))
    lines = []
    for start in range(0, len(images), across):
        part = slice(start, start + across)
        lines += [(" " * GAP).join(line) for line in zip(*map(half_blocks, images[part]))]
        lines.append((" " * GAP).join(caption[:width].ljust(width) for caption in captions[part]).rstrip())
    return "\n".join(lines)
