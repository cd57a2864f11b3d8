"""Write the tokens of images as a token file.

>>> from igpt_cli.images.sources import open_source
>>> report = tokenize(open_source(["photos"]), Palette.load("palette.npz"), "tokens.h5")
>>> report.rows, report.n_bad
({'train': 900, 'test': 100}, 0)
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from igpt_cli.documents import check_fields, differing
from igpt_cli.errors import InputError, MismatchError
from igpt_cli.images.parallel import EVALUATION_SPLITS, Job, Prepared, cores, prepared, views_of
from igpt_cli.images.records import in_split_order
from igpt_cli.images.sources import Source
from igpt_cli.images.transforms import Preprocess
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.shards import Shard
from igpt_cli.tokens.spool import NOTE, read_note
from igpt_cli.tokens.writer import TokenWriter, check_space, part_folder

#: Number of unreadable images that a report names; all are counted.
NAMED_BAD = 1000
#: A killed process loses at most so many seconds of work.
_NOTE_EVERY = 1.0


@dataclass
class TokenizeReport:
    """The result of `tokenize`.

    Attributes:
        path: the token file.
        rows: {split: number of rows written}.
        images, n_bad: the numbers of tokenized images, and of unreadable, excluded ones.
        bad: (name, reason) of the first 1,000 unreadable images.
        alike: images whose K views are the same row, because they are R x R already.
        resumed: images that an interrupted run had done.
        seconds: wall-clock time.
    """

    path: Path
    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    n_bad: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    alike: int = 0
    resumed: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        bad = [{"name": name, "reason": reason} for name, reason in self.bad]
        return {**asdict(self), "path": str(self.path), "bad": bad}


def unfinished(out: str | os.PathLike) -> int:
    """How many images an interrupted run left in `<out>.part` for `resume`."""
    note = read_note(part_folder(Path(out)))
    return (note.get("done") or 0) if note else 0


def tokenize(
    source: Source,
    palette: Palette,
    out: str | os.PathLike,
    preprocess: Preprocess | None = None,
    *,
    workers: int | None = None,
    split: str | None = None,
    shard: str | Shard | None = None,
    limit: int | None = None,
    keep_rgb: bool = False,
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_bad: Callable[[str, str], None] | None = None,
) -> TokenizeReport:
    """Write the tokens of every image of a source; the result does not depend on the number of processes.

    Each image becomes one row, or with `preprocess.views` = K each image outside val and test becomes K rows, named
    "name@0".."name@K-1". Unreadable images are excluded, reported and counted. Until the file is complete, rows lie in
    the folder `<out>.part`, where an interrupted run leaves them for `resume`.

    Args:
        source: from `open_source`.
        palette: the colours.
        out: the token file to write.
        preprocess: how images become R x R; default the evaluation crop to 32 x 32.
        workers: processes that decode; default one for each core.
        split: the only split to tokenize; of a source without splits, the name of the split to write.
        shard: "i/n" with i in 0..n-1: every n-th image of each split, beginning with the i-th, for `merge`.
        limit: the most images of each split of the source.
        keep_rgb: store the prepared images too.
        strict: stop at the first image that cannot be read.
        resume: continue an interrupted run of the same arguments, if there is one.
        force: replace an existing file, and the rows of an interrupted run.
        progress: called with (images done, images to do), without those of the interrupted run.
        on_bad: called with (name, reason) for each image that cannot be read.

    Raises:
        InputError: no image can be read, or with `strict` one cannot; no such split.
        OutputError: `out` exists or cannot be written, or the disk is full.
        MismatchError: with `resume`, the interrupted run had other arguments.
        WorkerError: a worker process ended unexpectedly.
    """
    started = time.monotonic()
    preprocess = preprocess or Preprocess()
    workers = workers or cores()
    part = Shard.parse(shard) if isinstance(shard, str) else shard or Shard(0, 1)
    plan = _Plan(source, split, part, limit)
    settings = {
        "source": source.description,
        "selection": source.selection or None,
        "images": plan.counts,
        "classes": source.classes,
        "palette": palette.sha256,
        "preparation": preprocess.to_dict(),
        "split": split,
        "shard": str(part),
        "limit": limit,
        "keep_rgb": keep_rgb,
    }
    writer = TokenWriter(
        out,
        palette,
        preprocess.resolution,
        classes=source.classes,
        preprocess=preprocess.to_dict(),
        source=source.description,
        selection=source.selection,
        keep_rgb=keep_rgb,
        shard=str(part) if part.n > 1 else None,
        resume=resume,
        force=force,
    )
    run = _Run(writer, palette, TokenizeReport(writer.out), settings, strict, on_bad)
    try:
        check_space(writer.out, plan.bytes_needed(preprocess, keep_rgb))
        run.resume()
        jobs = run.skip_done(plan.jobs())
        with closing(prepared(jobs, preprocess, workers)) as chunks:
            for chunk, results in chunks:
                run.add(chunk, results)
                if progress:
                    progress(run.done - run.report.resumed, plan.total - run.report.resumed)
        run.finish()
    except BaseException:
        # Rows stay for --resume; a folder without any is removed.
        if writer.spool.note or any(writer.spool.rows.values()):
            with suppress(Exception):
                writer.spool.save_note()
            writer.spool.close()
        else:
            writer.discard()
        raise
    run.report.seconds = time.monotonic() - started
    return run.report


class _Plan:
    """The images of the source to tokenize, and the splits to write them to."""

    def __init__(self, source: Source, split: str | None, shard: Shard, limit: int | None):
        self.source, self.shard, self.limit = source, shard, limit
        # {split of the source: the split it is written as}
        self.splits = {name: name for name in source.counts if split in (None, name)}
        if split is not None and list(source.counts) == ["train"]:
            self.splits = {"train": split}
        if not self.splits:
            raise InputError(f"{source.description} has no split {split!r}; its splits: {', '.join(source.counts)}")
        sizes = {to: source.counts[name] for name, to in self.splits.items()}
        sizes = {to: n if limit is None else min(limit, n) for to, n in sizes.items()}
        self.counts = {to: shard.share(n) for to, n in sizes.items()}
        self.total = sum(self.counts.values())
        if not self.total:
            most = max(sizes.values())
            raise InputError(f"{source.description} has no images for shard {shard}; give at most {most:,} shards")

    def jobs(self) -> Iterator[Job]:
        seen: Counter[str] = Counter()
        given = 0
        for record in self.source.records():
            if (split := self.splits.get(record.split)) is None:
                continue
            index = seen[split]
            seen[split] += 1
            if (self.limit is not None and index >= self.limit) or not self.shard.takes(index):
                continue
            yield Job(record, split, index)
            given += 1
            if given == self.total:  # skips the rest of a large archive
                return

    def bytes_needed(self, preprocess: Preprocess, keep_rgb: bool) -> int:
        """About the bytes of disk that the rows take: once in the folder, once in the file."""
        row = preprocess.resolution**2 * (5 if keep_rgb else 2) + 100
        return 2 * row * sum(n * views_of(split, preprocess) for split, n in self.counts.items())


class _Run:
    """Passes rows to the writer, with the state that a resumed run needs."""

    def __init__(self, writer: TokenWriter, palette: Palette, report: TokenizeReport, settings: dict, strict, on_bad):
        self.writer, self.palette, self.report = writer, palette, report
        self.settings, self.strict, self.on_bad = settings, strict, on_bad
        self.done = 0  # images taken from the source, good and bad
        self.last_name = ""
        self.skipped: Counter[str] = Counter()
        self.noted = time.monotonic()

    def resume(self) -> None:
        if (note := self.writer.spool.note) is None:
            return
        folder = self.writer.spool.folder
        check_fields(note, {}, f"{folder}/{NOTE}", ("settings", "done", "last_name", "skipped", "bad"))
        for key, now in self.settings.items():
            if (before := note["settings"].get(key)) != now:
                before, now = differing(before, now)
                todo = "resume with the same, or start anew with --force"
                raise MismatchError(f"{folder} was begun with {key} {before}, this run has {now}; {todo}")
        self.done = self.report.resumed = note["done"]
        self.last_name, self.skipped = note["last_name"], Counter(note["skipped"])
        self.report.bad = [(name, reason) for name, reason in note["bad"]]
        self.report.alike = note.get("alike") or 0

    def skip_done(self, jobs: Iterator[Job]) -> Iterator[Job]:
        last = next(itertools.islice(jobs, self.done - 1, None), None) if self.done else None
        if self.done and (last is None or last.record.name != self.last_name):
            raise MismatchError(
                f"{self.writer.spool.folder} was begun with other images: image {self.done:,} was {self.last_name}, "
                f"now it is {last.record.name if last else 'missing'}; start anew with --force"
            )
        return jobs

    def add(self, chunk: list[Job], results: list[Prepared]) -> None:
        good = []
        for job, result in zip(chunk, results, strict=True):
            if result.views is None:
                self._bad(job, result.reason)
            else:
                good.append((job, result.views))
        for split in dict.fromkeys(job.split for job, _ in good):
            self._append(split, [(job, views) for job, views in good if job.split == split])
        self.done += len(chunk)
        self.last_name = chunk[-1].record.name
        self.writer.spool.mark(
            settings=self.settings,
            done=self.done,
            last_name=self.last_name,
            skipped=dict(self.skipped),
            bad=self.report.bad[:NAMED_BAD],
            alike=self.report.alike,
        )
        if time.monotonic() - self.noted > _NOTE_EVERY:
            self.writer.spool.save_note()
            self.noted = time.monotonic()

    def finish(self) -> None:
        report = self.report
        report.n_bad = sum(self.skipped.values())
        report.images = self.done - report.n_bad
        report.rows = {s: self.writer.spool.rows[s] for s in in_split_order(self.writer.spool.rows)}
        if not report.images:
            name, reason = report.bad[0]
            raise InputError(f"none of the {self.done:,} images can be read; the first is {name}: {reason}")
        self.writer.skipped = dict(self.skipped)
        self.writer.finish()

    def _append(self, split: str, group: list[tuple[Job, np.ndarray]]) -> None:
        rgb = np.concatenate([views for _, views in group])  # (n, R, R, 3) uint8
        self.report.alike += sum(len(views) > 1 and bool((views[1:] == views[:1]).all()) for _, views in group)
        several = self.settings["preparation"]["views"] and split not in EVALUATION_SPLITS
        name = "{}@{}" if several else "{}"
        rows = [(job, view) for job, views in group for view in range(len(views))]
        self.writer.append(
            split,
            self.palette.quantize(rgb).reshape(len(rgb), -1),
            np.array([job.record.label for job, _ in rows]),
            [name.format(job.record.name, view) for job, view in rows],
            rgb=rgb,
            index=np.array([job.index for job, _ in rows]),
        )

    def _bad(self, job: Job, reason: str) -> None:
        name = job.record.name
        if self.strict:
            raise InputError(f"{name}: {reason}; without --strict such images are left out and counted")
        self.skipped[job.split] += 1
        if len(self.report.bad) < NAMED_BAD:
            self.report.bad.append((name, reason))
        if self.on_bad:
            self.on_bad(name, reason)
