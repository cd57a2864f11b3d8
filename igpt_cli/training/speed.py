"""What makes a training step fast or small, put around a model from outside: no key of its state dict changes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from igpt_cli.errors import InputError
from igpt_cli.training.objectives import Objective


class Recomputed:
    """A block's forward that keeps its input alone and computes the rest again in the backward pass.

    Args:
        random: the block draws random numbers (stochastic depth), which must be the same the second time.
    """

    def __init__(self, forward, random: bool = False):
        self.forward, self.random = forward, random

    def __call__(self, h):
        return checkpoint(self.forward, h, use_reentrant=False, preserve_rng_state=self.random)


def checkpoint_activations(model: Any, random: bool = False) -> None:
    """Let every block recompute its activations: about a third more arithmetic for a fraction of the memory."""
    for block in model.blocks:
        block.forward = Recomputed(block.forward, random)


def require_compiler(device: torch.device) -> None:
    """Whether what `torch.compile` runs on this device is there, before anything is made.

    Raises:
        InputError: there is no compiler.
    """
    language, variable, names = ("C++", "CXX", ["g++"]) if device.type == "cpu" else ("C", "CC", ["gcc", "clang", "cc"])
    if sys.platform == "darwin":
        names = ["clang++"]
    named = shlex.split(os.environ.get(variable, ""))[:1] or names
    if sys.platform != "win32" and not any(map(shutil.which, named)):
        raise InputError(
            f"no {language} compiler ({' or '.join(named)}) is here, which torch.compile needs: install it "
            f"(apt install g++, xcode-select --install), or train with --no-compile"
        )


def compile_blocks(objective: Any) -> None:
    """Compile one block and the loss, not the whole model.

    All blocks share the compiled code, so a deep model starts as fast as a shallow one; another shape is compiled anew,
    as code for any shape is slower. Call it after
    `checkpoint_activations`, whose recomputation then runs the compiled code too.
    """
    for block in objective.model.blocks:
        if isinstance(block.forward, Recomputed):
            block.forward.forward = torch.compile(block.forward.forward, dynamic=False)
        else:
            block.forward = torch.compile(
                block.forward, dynamic=False
            )  # inside the hooks of FSDP, which stay as they are
    if isinstance(objective, Objective):
        objective.head_loss = torch.compile(objective.head_loss, dynamic=False)
