"""Write a token file split by split, atomically.

    >>> with TokenWriter("out.h5", palette, resolution=32, classes=["cat", "dog"]) as writer:
    ...     writer.append("train", tokens, labels, names)

The same rows give the same bytes, but for the time in the attribute `created`, which SOURCE_DATE_EPOCH fixes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import h5py
import numpy as np

from igpt_cli import __version__
from igpt_cli.errors import FormatError, OutputError
from igpt_cli.files import check_output, replacing
from igpt_cli.images.records import in_split_order
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens import schema
from igpt_cli.tokens.checks import BLOCK_BYTES, check_tokens
from igpt_cli.tokens.spool import Spool, encoded, full_disk, read_note

_PAGE = 4096


class TokenWriter:
    """Writes a token file, with its rows in the folder `<out>.part` until `finish`.

    As a context manager it finishes after the block, or removes the rows if the block raises.

    Args:
        out: the file to write; checked at once.
        palette: stored with the tokens.
        resolution: R.
        classes: names of the classes that labels index.
        preprocess: how images became R x R, from `Preprocess.to_dict()`.
        source: a description of the images.
        selection: the options that selected and split them (`Source.selection`).
        keep_rgb: store the prepared images too.
        shard: "i/n" for a part to `merge`; its rows have their index in the source (`index`).
        resume: continue with the rows of an interrupted writer in `<out>.part`; `spool.note` describes them.
        force: replace an existing file, and the rows of an interrupted writer.

    Raises:
        OutputError: `out` exists, cannot be written, is written by another process, or has rows of an interrupted one.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        palette: Palette,
        resolution: int,
        *,
        classes: Sequence[str] = (),
        preprocess: dict | None = None,
        source: str = "",
        selection: Mapping[str, str | int | float] | None = None,
        keep_rgb: bool = False,
        shard: str | None = None,
        resume: bool = False,
        force: bool = False,
    ):
        self.out = check_output(Path(out), force)
        self.palette, self.resolution, self.classes = palette, resolution, list(classes)
        self.preprocess, self.source, self.shard = preprocess or {}, source, shard
        self.selection = dict(selection or {})
        self.skipped: dict[str, int] = {}  # images of each split that could not be read
        columns = {
            schema.TOKENS: (schema.TOKEN_DTYPE, (resolution**2,)),
            schema.LABELS: (schema.LABEL_DTYPE, ()),
            schema.RGB: ("u1", (resolution, resolution, 3)),
            schema.INDEX: (schema.INDEX_DTYPE, ()),
        }
        if not keep_rgb:
            del columns[schema.RGB]
        if shard is None:
            del columns[schema.INDEX]
        folder = part_folder(self.out)
        if not (resume or force) and (note := read_note(folder)):
            n = f"{folder} holds {sum(note['rows'].values()):,} images of an interrupted run"
            raise OutputError(f"{n}; continue with --resume, or start anew with --force")
        self.spool = Spool(folder, columns, resume)

    def append(self, split: str, tokens, labels, names: Sequence[str], rgb=None, index=None) -> None:
        """Add n rows to a split.

        Args:
            tokens: (n, R * R) integers in [0, n_vocab).
            labels: (n,) integers in -1..C-1.
            names: n names.
            rgb: (n, R, R, 3) uint8, with keep_rgb.
            index: (n,) the indices of the images in their split of the source, for a shard.

        Raises:
            FormatError: a token or label out of range, or another shape.
        """
        if not re.fullmatch(r"[^/\0.][^/\0]*", split) or split in (schema.PALETTE, schema.CLASSES):
            raise FormatError(f"{split!r} cannot name a split of a token file; choose another name")
        tokens, labels = np.asarray(tokens), np.asarray(labels)
        n = len(names)
        if tokens.shape != (n, self.resolution**2) or labels.shape != (n,):
            shapes = f"{n} names, labels {labels.shape} and tokens {tokens.shape}"
            raise FormatError(f"{shapes} do not fit together; tokens are (n, {self.resolution**2})")
        if n == 0:
            return
        check_tokens(tokens, self.palette.n_vocab, f"a batch for {self.out}")
        if labels.min() < -1 or labels.max() >= len(self.classes):
            raise FormatError(f"labels {labels.min()}..{labels.max()} do not fit {len(self.classes)} classes")
        values = {schema.TOKENS: tokens, schema.LABELS: labels, schema.RGB: rgb, schema.INDEX: index}
        self.spool.append(split, names, values)

    def finish(self) -> Path:
        """Write the file and remove the folder.

        Raises:
            OutputError: the disk is full; the folder stays, with the rows.
            FormatError: no row was appended.
        """
        if not any(self.spool.rows.values()):
            raise FormatError(f"there is nothing to write to {self.out}: no image became tokens")
        check_space(self.out, self.spool.size)
        # Datasets begin at a page, so that memory maps are aligned.
        aligned = {"alignment_threshold": _PAGE, "alignment_interval": _PAGE}
        with full_disk(self.out), replacing(self.out) as part, h5py.File(part, "w", **aligned) as h5:
            self._write(h5)
        self.spool.remove()
        return self.out

    def discard(self) -> None:
        """Remove the rows; the file under the final name is unchanged."""
        self.spool.remove()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def _write(self, h5: h5py.File) -> None:
        h5.attrs.update(
            format=schema.FORMAT,
            format_version=schema.FORMAT_VERSION,
            resolution=self.resolution,
            n_vocab=self.palette.n_vocab,
            preprocess=json.dumps(self.preprocess, sort_keys=True),
            source=encoded(self.source).decode(),
            tool_version=f"igpt-cli {__version__}",
            created=now(),
            palette_sha256=self.palette.sha256,
            **self.selection,
        )
        if any(self.skipped.values()):
            h5.attrs["skipped"] = json.dumps({s: n for s, n in sorted(self.skipped.items()) if n})
        if self.shard is not None:
            h5.attrs["shard"] = self.shard
        h5[schema.PALETTE] = np.ascontiguousarray(self.palette.centers, schema.PALETTE_DTYPE)
        if self.classes:
            write_texts(h5, schema.CLASSES, self.classes)
        for split in in_split_order(s for s, n in self.spool.rows.items() if n):
            group = h5.create_group(split)
            for column, (dtype, row) in self.spool.columns.items():
                self._copy(group, split, column, np.dtype(dtype), row)
            self._copy(group, split, schema.NAMES, h5py.string_dtype("utf-8", self.spool.name_bytes[split]), ())

    def _copy(self, group: h5py.Group, split: str, column: str, dtype: np.dtype, row: tuple) -> None:
        """One column, with the SHA-256 of its bytes as an attribute."""
        n = self.spool.rows[split]
        data = group.create_dataset(column, (n, *row), dtype)
        digest, at = hashlib.sha256(), 0
        rows = max(1, BLOCK_BYTES // (data.dtype.itemsize * max(1, data.size // n)))
        for block in self.spool.blocks(split, column, rows):
            data[at : at + len(block)] = block.view(dtype)  # the view marks bytes as UTF-8
            digest.update(block.tobytes())
            at += len(block)
        data.attrs["sha256"] = digest.hexdigest()


def part_folder(out: Path) -> Path:
    """The folder of the rows until `out` is finished: tokens.h5 -> tokens.h5.part."""
    return out.with_name(out.name + ".part")


def check_space(out: Path, needed: int) -> None:
    """Check that the disk has room. Raises OutputError: it has not; the message has both numbers."""
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        sizes = f"about {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free"
        raise OutputError(f"not enough space for {out}: {sizes} in {out.parent.resolve()}")


def write_texts(group: h5py.Group, name: str, texts: Sequence[str]) -> None:
    values = [encoded(t) for t in texts]
    dtype = h5py.string_dtype("utf-8", max(1, *map(len, values)))
    group.create_dataset(name, data=np.array(values, dtype))


def now() -> str:
    """The time as ISO 8601 in UTC, or what SOURCE_DATE_EPOCH fixes it to."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    time = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdigit() else datetime.now(timezone.utc)
    return time.isoformat(timespec="seconds")
