"""What all importers share: the model's description, one message on all differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt_cli.errors import FormatError, OutputError
from igpt_cli.models.registry import BACKENDS, all_presets

#: Settings that do not decide which preset a model is.
NOT_IN_NAME = ("n_classes", "head_layer", "norm_eps", "drop_path_rate")
#: How many differences a message names; the rest is counted.
NAMED = 8


def describe(backend: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The part `model` of a config.json; its name is that of the preset with the same sizes, or the backend's.

    >>> describe("vit", {"embed_dim": 192, "num_heads": 3, "n_classes": 7})["name"]
    'vit-ti16'

    Raises:
        ValueError, TypeError: the sizes do not fit together.
    """
    config_class = BACKENDS[backend][1]
    config = config_class(**sizes).to_dict()
    other = {*NOT_IN_NAME, *(("resolution", "n_vocab", "objective") if backend == "igpt" else ())}

    def shape(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in other}

    presets = (p for p in all_presets().values() if p.backend == backend)
    same = (p.name for p in presets if shape(config_class(**p.sizes).to_dict()) == shape(config))
    return {"name": next(same, backend), "backend": backend, **config}


def describe_read(where: Path | str, backend: str, sizes: Mapping[str, Any], what: str = "an iGPT") -> dict[str, Any]:
    """As `describe`, of sizes that were read from a file.

    Raises:
        FormatError: they do not fit together.
    """
    try:
        return describe(backend, sizes)
    except (ValueError, TypeError) as e:
        raise FormatError(f"{where} cannot be read as {what}: {e}") from e


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
