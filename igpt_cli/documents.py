"""Untrusted JSON: read once, with the types of its fields checked.

>>> check_fields({"model": {"n_layer": "8"}}, {"model.n_layer": COUNT}, "config.json")
FormatError: config.json: model.n_layer is '8', a whole number from 0 is needed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_cli.errors import FormatError
from igpt_cli.files import replacing, require_file

#: The largest number of ours; floats and 64-bit arrays hold it.
LARGEST = 2**63 - 1
#: Bytes of the largest JSON file that is read.
LARGEST_FILE = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """What a field may hold, and its name in messages."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and (isinstance(value, float) or abs(value) <= LARGEST)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def numbers(value: Any, n: int) -> bool:
    """Whether it is a list of `n` numbers."""
    return isinstance(value, list) and len(value) == n and all(map(_is_number, value))


COUNT = Kind("a whole number from 0", _is_count)
#: Sizes of an architecture.
SIZE = Kind("a whole number from 0 to 1,000,000", lambda value: _is_count(value) and value <= 1_000_000)
#: Numbers of blocks, which take time to build.
DEPTH = Kind("a whole number from 0 to 1,000", lambda value: _is_count(value) and value <= 1000)


def _for_stages(kind: Kind) -> Kind:
    """One value, or one for each stage of a pyramid."""
    return Kind(
        f"{kind.words}, or a list of at most 16 of them",
        lambda v: len(v) <= 16 and all(map(kind.holds, v)) if isinstance(v, list) else kind.holds(v),
    )


SIZES, DEPTHS = _for_stages(SIZE), _for_stages(DEPTH)
NUMBER = Kind("a number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECTS = Kind("a list of objects", lambda value: LIST.holds(value) and all(map(OBJECT.holds, value)))
TEXTS = Kind("a list of texts", lambda value: LIST.holds(value) and all(map(TEXT.holds, value)))
COUNTS = Kind("an object of whole numbers", lambda value: OBJECT.holds(value) and all(map(COUNT.holds, value.values())))
INTERVAL = Kind("two numbers", lambda value: numbers(value, 2))

#: What the fields of config.json hold that others compute with or show; `models` checks how the sizes fit together.
RUN_FIELDS: dict[str, Kind] = {
    "command": TEXT,
    **{f"model.{k}": TEXT for k in ("name", "backend", "objective")},
    **{f"model.{k}": SIZE for k in ("n_head", "n_embd", "resolution", "n_vocab", "n_classes", "head_layer")},
    **{f"model.{k}": SIZES for k in ("patch_size", "embed_dim", "num_heads", "window_size", "width", "window")},
    **{f"model.{k}": DEPTH for k in ("n_layer", "depth")},
    **{f"model.{k}": DEPTHS for k in ("depths", "hybrid")},
    **{f"training.{k}": TEXT for k in ("augment", "optimizer", "recipe")},
    **{f"training.{k}": COUNT for k in ("batch_size", "warmup_steps", "steps", "seed", "val_images", "n_parameters")},
    **{f"training.{k}": NUMBER for k in ("learning_rate", "head_learning_rate", "layer_decay", "epochs", "budget")},
    **{f"training.{k}": NUMBER for k in ("weight_decay", "clip", "mask_prob", "val_part", "randaugment")},
    **{f"training.{k}": NUMBER for k in ("colour_jitter", "erasing", "mixup", "cutmix", "repeats", "smoothing")},
    **dict.fromkeys(("training", "execution", "machine", "data", "result", "teacher", "preparation"), OBJECT),
    "training.from_scratch": FLAG,
    "training.betas": INTERVAL,
    **{f"execution.{k}": TEXT for k in ("precision", "shard")},
    **{f"execution.{k}": FLAG for k in ("compile", "recompute")},
    **{f"execution.{k}": COUNT for k in ("micro_batch", "accumulate", "eval_every", "keep")},
    "execution.save_every": Kind("steps or a time", lambda v: TEXT.holds(v) or COUNT.holds(v)),
    "execution.time_limit": NUMBER,
    **{f"machine.{k}": TEXT for k in ("device", "device_name", "precision", "shard")},
    **{f"machine.{k}": COUNT for k in ("ranks", "micro_batch", "accumulate", "eval_every")},
    **{f"data.{k}": TEXT for k in ("path", "from_run", "source", "column", "tokens_sha256", "palette_sha256")},
    **{f"data.{k}": COUNT for k in ("n_train", "n_val", "n_test", "test_seed", "tokens_per_step")},
    "data.test_part": NUMBER,
    "data.classes": TEXTS,
    **{f"result.{k}": TEXT for k in ("status", "run")},
    **{f"result.{k}": COUNT for k in ("steps", "tokens_seen", "images_seen", "n_test")},
    **{f"result.{k}": NUMBER for k in ("train_loss", "val_loss", "seconds", "accuracy", "val_accuracy")},
    **{f"result.{k}": NUMBER for k in ("test_accuracy", "top_5_accuracy", "log_loss")},
    "result.interval": INTERVAL,
    **{f"{k}.best": OBJECT for k in ("result", "progress")},
    **{f"progress.{k}": COUNT for k in ("step", "validated", "stale")},
    **{f"progress.{k}": NUMBER for k in ("seconds", "warm_seconds", "train_loss", "val_loss")},
    "progress.best.step": COUNT,
    "imported": OBJECT,
    "imported.classes": TEXTS,
    **{f"finetuned_from.{k}": TEXT for k in ("path", "sha256", "head")},
    "teacher.name": TEXT,
    "search": LIST,
    "preparation.size": SIZE,
    "preparation.filter": TEXT,
    **{f"preparation.{k}": Kind("three numbers", lambda v: numbers(v, 3)) for k in ("mean", "std")},
    "versions": OBJECT,
}
#: What a record of metrics.jsonl holds.
METRICS_FIELDS: dict[str, Kind] = {
    "step": COUNT,
    **dict.fromkeys(("epoch", "tokens", "loss", "lr", "grad_norm", "seconds", "tokens_per_second", "mfu"), NUMBER),
    **dict.fromkeys(("memory", "val_loss", "val_seconds", "gen_loss", "clf_loss", "accuracy", "label_loss"), NUMBER),
    **dict.fromkeys(("teacher_loss", "val_gen_loss", "val_clf_loss", "val_accuracy"), NUMBER),
}


def write_json(document: Any, path: Path | str) -> None:
    """Write an indented JSON document atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path | str, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` names it in errors ("a run's config.json").

    Raises:
        InputError, FormatError: no such file, larger than `LARGEST_FILE`, not UTF-8, not JSON, or no object.
    """
    if (size := require_file(path, what).stat().st_size) > LARGEST_FILE:
        raise FormatError(f"{path} has {size:,} bytes, more than {what} can have")
    return parse_json(Path(path).read_bytes(), str(path), what)


def parse_json(content: bytes | str, where: str, what: str) -> dict[str, Any]:
    """As `read_json`, from memory."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise FormatError(f"{where} is not readable JSON: {e or type(e).__name__}; {what} was expected") from e
    if not isinstance(document, dict):
        raise FormatError(f"{where} holds {short(document)}; {what} was expected")
    return document


def check_fields(
    document: Mapping[str, Any], fields: Mapping[str, Kind], where: str, required: Iterable[str] = ()
) -> None:
    """Check the kinds of the fields by dotted name; null is absent, and `required` fields must not be.

    Raises:
        FormatError: naming a field of another kind, or the missing ones.
    """
    if missing := sorted(name for name in required if document.get(name) is None):
        raise FormatError(f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    for dotted, kind in fields.items():
        value: Any = document
        *above, _ = parts = dotted.split(".")
        for depth, part in enumerate(parts):
            if value is None:
                break
            if not isinstance(value, dict):
                raise FormatError(_wrong(where, ".".join(above[:depth]), value, OBJECT))
            value = value.get(part)
        if value is not None and not kind.holds(value):
            raise FormatError(_wrong(where, dotted, value, kind))


def short(value: Any) -> str:
    """A value for a message, truncated if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or too deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def differing(a: Any, b: Any) -> tuple[str, str]:
    """Two unequal values for a message, truncated; of dictionaries and long lists, only what differs.

    >>> differing({"views": 2, "seed": 0}, {"views": 3, "seed": 0})
    ("{'views': 2}", "{'views': 3}")
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        a, b = ({k: d.get(k) for k in keys} for d in (a, b))
    elif isinstance(a, list) and isinstance(b, list) and len(f"{a}{b}") > 100 and set(map(str, a)) != set(map(str, b)):
        both = set(map(str, a)) & set(map(str, b))
        a, b = ([v for v in values if str(v) not in both] for values in (a, b))
    texts = [str(v) for v in (a, b)]
    first, second = (text if len(text) <= 100 else f"{text[:97]}..." for text in texts)
    return first, second


def _wrong(where: str, name: str, value: Any, kind: Kind) -> str:
    return f"{where}: {name} is {short(value)}, {kind.words} is needed"
