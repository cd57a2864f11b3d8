"""Shard i of n: every n-th image from the i-th on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from igpt_cli.errors import InputError
from igpt_cli.workspace import tokens_path


@dataclass(frozen=True)
class Shard:
    """Part `i` of `n`, with i in 0..n-1.

    >>> [index for index in range(7) if Shard(1, 3).takes(index)]
    [1, 4]
    """

    i: int
    n: int

    def __post_init__(self):
        if not 0 <= self.i < self.n:
            shards = f"shards of {self.n} are 0/{self.n}..{self.n - 1}/{self.n}" if self.n > 0 else "n is at least 1"
            raise InputError(f"there is no shard {self.i}/{self.n}: {shards}")

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> Shard:
        """ "i/n", or "auto": from torchrun's RANK and WORLD_SIZE, or the task numbers of a Slurm array job.

        Raises:
            InputError: neither, or "auto" and none of these variables is set.
        """
        if text == "auto":
            return cls._from_environment(environ)
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match:
            raise InputError(f"--shard {text} is not i/n, such as 0/4, nor auto")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _from_environment(cls, environ: Mapping[str, str]) -> Shard:
        try:
            if "RANK" in environ and "WORLD_SIZE" in environ:
                return cls(int(environ["RANK"]), int(environ["WORLD_SIZE"]))
            if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_TASK_COUNT" in environ:
                # An array may be numbered 1-8 or 0-14:2; its tasks are counted from the first.
                first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
                step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
                i = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step
                return cls(i, int(environ["SLURM_ARRAY_TASK_COUNT"]))
        except (ValueError, ZeroDivisionError) as e:
            raise InputError(f"--shard auto: the number of this shard cannot be read from the environment: {e}") from e
        raise InputError(
            "--shard auto needs RANK and WORLD_SIZE (torchrun) or SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT "
            "in the environment, and neither pair is set; give --shard i/n"
        )

    def path(self, resolution: int) -> Path:
        """The workspace's name for this part: data/tokens-32.h5, or data/tokens-32.shard-0-of-4.h5."""
        whole = tokens_path(resolution)
        return whole if self.n == 1 else whole.with_suffix(f".shard-{self.i}-of-{self.n}.h5")

    def takes(self, index: int) -> bool:
        """Whether the image at this index of its split belongs to this shard."""
        return index % self.n == self.i

    def share(self, count: int) -> int:
        """The number of `count` images that belong to this shard."""
        return len(range(self.i, count, self.n))

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"
