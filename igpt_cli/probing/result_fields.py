"""The fields of a probe result, checked when read."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from igpt_cli.documents import COUNT, LIST, NUMBER, OBJECT, OBJECTS, TEXT, TEXTS, Kind, check_fields
from igpt_cli.errors import FormatError
from igpt_cli.probing.layers import SITES

#: What every result of a linear probe holds, and every row of its layers.
RESULT = {"protocol", "checkpoint_sha256", "layers", "accuracy", "interval", "layer", "n_layers", "n_test", "chance"}
ROW = {"layer", "accuracy", "interval"}


def _is_percent(value: Any) -> bool:
    return NUMBER.holds(value) and -1000 <= value <= 1000  # a mean and its standard deviation may leave 0..100


def _is_layer(value: Any) -> bool:
    site = re.fullmatch(r"\d{1,5}\.(\w+)", value) if isinstance(value, str) else None
    return (COUNT.holds(value) and value < 10**5) or bool(site and site[1] in SITES)


def _is_square(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) and len(row) == len(value) for row in value)
    return rows and all(map(COUNT.holds, chain(*value)))


_LAYER = Kind("a layer", _is_layer)
_PERCENT = Kind("a percentage", _is_percent)
_SPREAD = {
    "accuracy": _PERCENT,
    "accuracy_mean": _PERCENT,
    "accuracy_deviation": _PERCENT,
    "interval": Kind("two percentages", lambda v: LIST.holds(v) and len(v) == 2 and all(map(_is_percent, v))),
}
_ROW = {**_SPREAD, "layer": _LAYER, "val_accuracy": _PERCENT, "n_features": COUNT, "C": NUMBER}
_RESULT = {
    **_ROW,
    **dict.fromkeys(("protocol", "model", "checkpoint_sha256", "images_sha256", "precision", "pool", "run"), TEXT),
    **dict.fromkeys(("n_layers", "n_test", "n_train", "n_classes", "seed", "bert_masks"), COUNT),
    "tokens": TEXT,
    "chance": _PERCENT,
    "layers": OBJECTS,
    "seeds": LIST,
    "floors": Kind("an object of objects", lambda v: OBJECT.holds(v) and all(map(OBJECT.holds, v.values()))),
    "few_labels": OBJECTS,
    "heads": OBJECTS,
    "details.classes": TEXTS,
    "details.class_accuracy": LIST,
    "details.confusion": Kind("a square of counts", _is_square),
}
_FEW = {"labels_per_class": COUNT, "accuracy": _PERCENT, "deviation": _PERCENT}
_HEAD = {"kind": TEXT, "run": TEXT, "accuracy": _PERCENT}


def check_result(found: dict[str, Any], where: str) -> None:
    """Check a document that holds the keys of a probe result. Raises FormatError, naming it, for a wrong or missing
    field.
    """
    check_fields(found, _RESULT, where, RESULT)
    several = {"accuracy_mean", "accuracy_deviation"}
    baselines = (found.get("floors") or {}).items()
    untrained = {f"floors.{name}.layers": row["layers"] for name, row in baselines if "layers" in row}
    for name, rows in {"layers": found["layers"], **untrained}.items():
        if not OBJECTS.holds(rows):
            raise FormatError(f"{where}: {name} is no list of objects")
        for i, row in enumerate(rows):
            check_fields(row, _ROW, f"{where}: {name}[{i}]", ROW | (several if several & row.keys() else set()))
    for name, row in baselines:
        check_fields(row, _SPREAD, f"{where}: floors.{name}", () if "layers" in row else ("accuracy", "interval"))
    for name, fields in (("few_labels", _FEW), ("heads", _HEAD)):
        for i, row in enumerate(found.get(name) or []):
            check_fields(row, fields, f"{where}: {name}[{i}]", fields.keys() - {"deviation"})
    if found.get("seeds"):
        check_fields(found, _SPREAD, where, several)
    if (found.get("details") or {}).get("confusion"):
        check_fields(found["details"], {}, f"{where}: details", ("classes",))
    if found["layer"] not in [row["layer"] for row in found["layers"]] and not found.get("concat"):
        raise FormatError(f"{where}: layer {found['layer']} is none of its layers")
