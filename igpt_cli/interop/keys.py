"""Tables of tensor names in other libraries; query, key and value joined or separate.

Pure functions on names and {name: tensor}; the tables are in `vit_keys` and `swin_keys`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

#: Of transformers, on disk.
PARTS = ("query", "key", "value")
#: What a module's name is followed by, as patterns; the last three are BatchNorm's.
TENSORS = (r"\.weight", r"\.bias", r"\.running_mean", r"\.running_var", r"\.num_batches_tracked")


class NameTable:
    """The names of a model's tensors in several layouts.

    A template such as "blocks.{b}.norm1" stands for the tensor of that name and for its .weight, .bias and what else
    `TENSORS` has; {b} is a block, {s} a stage and {p} the stage before it.

    >>> table = NameTable(("ours", "theirs"), [("blocks.{b}.norm", "layers.{b}.ln"), ("stages.{s}.x", "s.{p}.x")])
    >>> table.rename("blocks.3.norm.bias", "ours", "theirs"), table.rename("s.0.x", "theirs", "ours")
    ('layers.3.ln.bias', 'stages.1.x')

    Args:
        layouts: their names.
        rows: for each tensor its template in each layout.
    """

    def __init__(self, layouts: tuple[str, ...], rows: Iterable[tuple[str, ...]]):
        self.layouts, self.rows = layouts, tuple(rows)
        self._patterns = cache(self._compiled)

    def _compiled(self, layout: str) -> list[tuple[re.Pattern, tuple[str, ...]]]:
        """For each row what matches its name in a layout, and the row."""
        column, out = self.layouts.index(layout), []
        for row in self.rows:
            pattern = re.sub(r"\\\{([spb])\\\}", r"(?P<\1>\\d{1,9})", re.escape(row[column]))
            out.append((re.compile(rf"{pattern}(?P<tensor>({'|'.join(TENSORS)})?)"), row))
        return out

    def rename(self, name: str, source: str, target: str) -> str:
        """The name in another layout; one that is not in the table stays, for the caller to find."""
        for pattern, row in self._patterns(source):
            if m := pattern.fullmatch(name):
                place = {k: int(v) for k, v in m.groupdict().items() if k in "spb"}
                if "p" in place:
                    place["s"] = place["p"] + 1
                elif "s" in place:
                    place["p"] = place["s"] - 1
                return row[self.layouts.index(target)].format(**place) + m["tensor"]
        return name


def rewritten(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """The name after each rule, a pattern and what takes its place.

    >>> rewritten("layers.3.norm.bias", [("^layers", "encoder.layer"), ("norm", "ln")])
    'encoder.layer.3.ln.bias'
    """
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def join_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`query`, `key` and `value` one below the other as one tensor, `qkv`, where all three are there."""
    out = dict(weights)
    for name in weights:
        three = [name.replace(".query.", f".{part}.") for part in PARTS]
        if ".query." in name and all(part in weights for part in three):
            out[name.replace(".query.", ".qkv.")] = torch.cat([out.pop(part) for part in three])
    return out


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `join_qkv` undoes."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            parts = zip(PARTS, tensor.chunk(3), strict=True)
            out |= {name.replace(".qkv.", f".{part}."): x.contiguous() for part, x in parts}
        else:
            out[name] = tensor
    return out


def fixed_problems(theirs: Mapping[str, Any], fixed: Mapping[str, tuple[Any, str]], what: str) -> list[str]:
    """What a config.json says otherwise than a model has it here, a sentence each; a key that is missing agrees.

    Args:
        fixed: {key of theirs: (value, why)}.
        what: the model here: "a ViT here".
    """
    return [
        f"{key} is {short(theirs[key])}, {what} has {value!r} ({why})"
        for key, (value, why) in fixed.items()
        if theirs.get(key, value) != value
    ]


def is_size(value: Any) -> bool:
    """Whether a value of a JSON file can be a size: a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def square(value: Any) -> Any:
    """The side where a value is a list of two equal ones; any other value as it is.

    >>> square([16, 16]), square([16, 8]), square(16)
    (16, [16, 8], 16)
    """
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def ratio(hidden: int, width: int) -> float:
    """hidden / width, such that the model's int(ratio * width) is `hidden` again in spite of rounding.

    >>> ratio(3072, 768), int(61 / 56 * 56), int(ratio(61, 56) * 56)
    (4.0, 60, 61)
    """
    found = hidden / width
    return found if int(found * width) == hidden else math.nextafter(found, math.inf)
