"""What all importers share: the model's description, one message on all differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt_cli.errors import FormatError, OutputError
from igpt_cli.models.igpt import IGPTConfig
from igpt_cli.models.presets import PRESETS

#: How many differences a message names; the rest is counted.
NAMED = 8


def describe_model(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The part `model` of a config.json for an iGPT of these sizes, the arguments of `IGPTConfig`.

    Its name is that of the preset with the same layers, width and heads, or "igpt".

    >>> describe_model({"n_layer": 24, "n_embd": 512, "n_head": 8})["name"]
    'igpt-s'

    Raises:
        ValueError: the sizes do not fit together.
    """
    config = IGPTConfig(**sizes).to_dict()
    shape = ("n_layer", "n_embd", "n_head")
    same = (p.name for p in PRESETS.values() if p.backend == "igpt" and all(p.sizes[k] == config[k] for k in shape))
    return {"name": next(same, "igpt"), "backend": "igpt", **config}


def differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """What differs between two sets of tensors, {name: shape}: one sentence each, in the order of `expected`."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return problems


def refuse(where: Path | str, problems: Sequence[str], what: str = "an iGPT") -> None:
    """Nothing, if there are no problems with reading it as `what`.

    Raises:
        FormatError: all of them in one message.
    """
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise FormatError(f"{where} cannot be read as {what}: {'; '.join(problems[:NAMED])}{more}")


def require_apart(source: Path, out: Path) -> None:
    """
    Raises:
        OutputError: writing `out` would remove what is to be read.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out} is, or holds, {source}, which is to be read; choose another --out")
