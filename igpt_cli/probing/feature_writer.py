"""Write a features file: in batches, resumable, atomic.

The file has its final size from the start, in the folder `<out>.part`, with a note of the finished rows of each split.
Values are written to their places without HDF5, so a killed process damages nothing; at the end the file is synced and
renamed. The same features give the same bytes but for `created`, which SOURCE_DATE_EPOCH fixes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from igpt_cli import __version__
from igpt_cli.documents import COUNT, COUNTS, OBJECT, check_fields, read_json
from igpt_cli.errors import FormatError, InputError, MismatchError, OutputError
from igpt_cli.files import check_output, sync_folder, target_of
from igpt_cli.probing import feature_file
from igpt_cli.probing.layers import Layer
from igpt_cli.tokens.spool import encoded, full_disk, locked
from igpt_cli.tokens.writer import check_space, now, part_folder, write_texts

_FILE, _NOTE = "features.h5", "progress.json"
_PAGE = 4096
#: A killed process loses at most so many seconds of work.
NOTE_EVERY = 5.0


@dataclass(frozen=True)
class NewSplit:
    """What is known of a split before its features are: labels (N,), rows (N,), N names, M (0 = whole images)."""

    labels: np.ndarray
    rows: np.ndarray
    names: Sequence[str]
    masks: int
    attrs: Mapping[str, Any]


class FeatureWriter:
    """Write a features file.

    Args:
        out: the file to write; checked at once.
        attrs: root attributes, to which format, version, tool and time are added.
        splits: {name: NewSplit}, in the order of the file.
        shapes: {layer: shape of one image's features}.
        resume: continue an interrupted writer of the same features, if there is one.
        force: replace an existing file, and what an interrupted writer left.

    Attributes:
        done: {split: finished rows}; those of an interrupted writer at first.

    Raises:
        OutputError: `out` exists or cannot be written, another process is writing it, the disk has too little space, or
            an interrupted writer left rows and neither `resume` nor `force` is set.
        MismatchError: with `resume`, the interrupted writer wrote other features.
    """

    def __init__(
        self,
        out: Path,
        attrs: Mapping[str, Any],
        classes: Sequence[str],
        splits: Mapping[str, NewSplit],
        shapes: Mapping[Layer, tuple[int, ...]],
        *,
        resume: bool = False,
        force: bool = False,
    ):
        self.out = target_of(check_output(out, force))
        self.folder, self.splits, self.shapes = part_folder(self.out), splits, shapes
        self.identity = identity(attrs, splits, shapes)
        note = None if force and not resume else _read_note(self.folder)
        if note and not (resume or force):
            raise OutputError(
                f"{self.folder} holds features of {sum(note['done'].values()):,} images of an interrupted run; go on "
                f"with --resume, or start anew with --force"
            )
        with full_disk(self.out):
            self.folder.mkdir(exist_ok=True)
            self._lock = locked(self.folder)
            try:
                self._begin(note if resume else None, attrs, classes)
            except BaseException:
                if resume and note:
                    self.close()
                else:
                    self.discard()
                raise
        self._noted = time.monotonic()

    def _begin(self, note: dict | None, attrs: Mapping[str, Any], classes: Sequence[str]) -> None:
        path, written = self.folder / _FILE, 0
        if note is not None:
            if wrong := differences(note["asked"], self.identity, exact=True):
                raise MismatchError(
                    f"{self.folder} was begun with other features: {'; '.join(wrong)}; resume with the same, or start "
                    f"anew with --force"
                )
            if not path.is_file() or path.stat().st_size != note["size"]:
                raise InputError(f"{self.folder} cannot be resumed: {_FILE} is not as noted; start anew with --force")
            self.done = dict(note["done"])
            if self.done.keys() != self.splits.keys() or any(
                n > len(self.splits[k].rows) for k, n in self.done.items()
            ):
                raise FormatError(f"{self.folder / _NOTE}: done does not fit the images; start anew with --force")
            written = sum(self._bytes(name, n) for name, n in self.done.items())
        else:
            self.done = dict.fromkeys(self.splits, 0)
            for name in (_NOTE, _FILE):
                (self.folder / name).unlink(missing_ok=True)
        check_space(self.out, sum(self._bytes(name, len(s.rows)) for name, s in self.splits.items()) - written)
        if note is None:
            self._create(path, attrs, classes)
        with h5py.File(path, "r") as h5:
            self._places = {
                (s, k): h5[s][f"{feature_file.LAYER}{k}"].id.get_offset() for s in self.splits for k in self.shapes
            }
        self._file = open(path, "r+b")  # noqa: SIM115
        self._size = path.stat().st_size

    def _bytes(self, split: str, images: int) -> int:
        return 4 * images * max(1, self.splits[split].masks) * sum(int(np.prod(s)) for s in self.shapes.values())

    def _create(self, path: Path, attrs: Mapping[str, Any], classes: Sequence[str]) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        # Datasets begin at a page, so that their maps are aligned.
        with h5py.File(path, "w", alignment_threshold=_PAGE, alignment_interval=_PAGE) as h5:
            h5.attrs.update(format=feature_file.FORMAT, format_version=feature_file.FORMAT_VERSION)
            h5.attrs.update({k: encoded(v).decode() if isinstance(v, str) else v for k, v in attrs.items()})
            h5.attrs.update(tool_version=f"igpt-cli {__version__}", created=now())
            if classes:
                write_texts(h5, feature_file.CLASSES, classes)
            for name, split in self.splits.items():
                group = h5.create_group(name)
                group.attrs.update(split.attrs)
                group[feature_file.LABELS] = np.asarray(split.labels, "<i4")
                group[feature_file.ROWS] = np.asarray(split.rows, feature_file.ROW_DTYPE)
                write_texts(group, feature_file.NAMES, split.names)
                head = (split.masks, len(split.rows)) if split.masks else (len(split.rows),)
                for layer, shape in self.shapes.items():
                    group.create_dataset(
                        f"{feature_file.LAYER}{layer}", (*head, *shape), feature_file.FEATURE_DTYPE, dcpl=plan
                    )

    def write(self, split: str, at: slice, draw: int, found: Mapping[Layer, np.ndarray]) -> None:
        """Write the features {layer: (B, ...) float32} of one batch, at rows `at` of the split, under mask `draw`
        (0: whole).
        """
        n = len(self.splits[split].rows)
        with full_disk(self.out):
            for layer, values in found.items():
                if values.shape != (at.stop - at.start, *self.shapes[layer]):
                    raise InputError(
                        f"layer {layer} of a batch of {at.stop - at.start} images is {values.shape}; expected "
                        f"{self.shapes[layer]} for each image"
                    )
                row = 4 * int(np.prod(self.shapes[layer]))
                self._file.seek(self._places[split, layer] + (draw * n + at.start) * row)
                self._file.write(np.ascontiguousarray(values, feature_file.FEATURE_DTYPE).data)

    def mark(self, split: str, rows: int) -> None:
        """The first `rows` images of the split are good; the note says so every few seconds."""
        self.done = {**self.done, split: rows}  # one assignment: an interrupt leaves what was before
        if time.monotonic() - self._noted > NOTE_EVERY:
            self.save_note()

    def save_note(self) -> None:
        """Sync the file, then write the note about it."""
        with full_disk(self.out):
            done = self.done
            self._file.flush()
            os.fsync(self._file.fileno())
            part = self.folder / f"{_NOTE}.new"
            part.write_text(json.dumps({"asked": self.identity, "done": done, "size": self._size}), encoding="utf-8")
            os.replace(part, self.folder / _NOTE)
        self._noted = time.monotonic()

    def finish(self) -> Path:
        """Give the file its name and remove the folder."""
        with full_disk(self.out):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.folder / _FILE, self.out)
            sync_folder(self.out.parent)
        self.discard()
        return self.out

    def leave(self) -> None:
        """Let go after an error: rows that are good stay for `resume`, a folder without any is removed."""
        if not any(self.done.values()):
            self.discard()
            return
        with suppress(OSError, OutputError, ValueError):
            self.save_note()
        self.close()

    def close(self) -> None:
        """Let go of file and lock; the folder stays."""
        with suppress(OSError, AttributeError):  # a full disk was reported already; or it was not opened yet
            self._file.close()
        self._lock.close()

    def discard(self) -> None:
        """Close, and remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def identity(attrs: Mapping[str, Any], splits: Mapping[str, Any], layers) -> dict[str, Any]:
    """What makes these features those of another file: plain data, as the note holds it."""
    return {
        "layers": list(layers),
        "file": {k: attrs.get(k) for k in feature_file.IDENTITY},
        "splits": {name: {k: s.attrs.get(k) for k in feature_file.SPLIT_IDENTITY} for name, s in splits.items()},
    }


def differences(there: dict[str, Any], wanted: dict[str, Any], exact: bool = False) -> list[str]:
    """Why stored features are not those requested, one phrase each; with `exact`, further layers or splits differ,
    too.
    """
    out = [
        f"{k} is {_short(there['file'][k])}, wanted {_short(v)}"
        for k, v in wanted["file"].items()
        if there["file"].get(k) != v
    ]
    for name, split in wanted["splits"].items():
        if name not in there["splits"]:
            out.append(f"split {name} is missing")
            continue
        has = there["splits"][name]
        out += [
            f"{k} of {name} is {_short(has.get(k))}, wanted {_short(v)}" for k, v in split.items() if has.get(k) != v
        ]
    missing = [layer for layer in wanted["layers"] if layer not in there["layers"]]
    if missing:
        out.append(
            f"layers {feature_file.format_layers(missing)} are missing, there are "
            f"{feature_file.format_layers(there['layers'])}"
        )
    if exact and not out and (there["layers"] != wanted["layers"] or list(there["splits"]) != list(wanted["splits"])):
        out.append(
            f"it has the layers {feature_file.format_layers(there['layers'])} of {', '.join(there['splits'])}, wanted "
            f"{feature_file.format_layers(wanted['layers'])} of {', '.join(wanted['splits'])}"
        )
    return out


def unfinished(out: str | os.PathLike) -> int:
    """How many images' features an interrupted run left in `<out>.part` for `resume`."""
    note = _read_note(part_folder(Path(out)))
    return sum(note["done"].values()) if note else 0


def _short(value: Any) -> str:
    text = str(value)
    return (
        f"{text[:12]}..." if len(text) == 64 and " " not in text else text if len(text) <= 200 else f"{text[:197]}..."
    )


def _read_note(folder: Path) -> dict[str, Any] | None:
    """The content of the note in this folder, None without one. Raises FormatError if it is damaged."""
    if not (folder / _NOTE).is_file():
        return None
    try:
        note = read_json(folder / _NOTE, "the note of an interrupted run")
        fields = {"asked": OBJECT, "done": COUNTS, "size": COUNT}
        check_fields(note, fields, str(folder / _NOTE), fields)
    except FormatError as e:
        raise FormatError(f"{e}; remove {folder}, or start anew with --force") from e
    return note
