"""Count the colours of images: `count_colours`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing

from igpt_cli.errors import InputError
from igpt_cli.images.parallel import Job, cores, prepared
from igpt_cli.images.sources import Source
from igpt_cli.images.transforms import Preprocess
from igpt_cli.palette.histogram import ColourCounts

#: The value of `split` for the images of all splits.
ALL = "all"


def count_colours(
    source: Source,
    preprocess: Preprocess | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_bad: Callable[[str, str], None] | None = None,
) -> ColourCounts:
    """Count the colours of the images of a source, prepared as for tokens; the same whatever the number of processes.

    Args:
        source: from `open_source`.
        preprocess: how images become R x R; default the evaluation crop to 32 x 32.
        split: see `selected_split`.
        limit: the most images to count, the first ones.
        workers: processes that decode; default one for each core.
        strict: stop at the first unreadable image instead of excluding and counting it.
        progress: called with (images done, images in all).
        on_bad: called with (name, reason) for each image that cannot be read.

    Returns:
        The counts; the one object in `sources` has `source`, `split`, `preprocess`, `images`, `left_out`.

    Raises:
        InputError: no image can be read, or with `strict` one cannot; no such split.
    """
    preprocess = preprocess or Preprocess()
    split = selected_split(source, split)
    there = len(source) if split == ALL else source.counts[split]
    total = there if limit is None else min(limit, there)
    counts, done, left_out = ColourCounts(), 0, 0
    with closing(prepared(_jobs(source, split, total), preprocess, workers or cores())) as chunks:
        for jobs, results in chunks:
            for job, result in zip(jobs, results, strict=True):
                if result.views is not None:
                    counts.add(result.views)
                    counts.images += 1 - len(result.views)  # views of one image are one image
                    continue
                if strict:
                    problem = f"{job.record.name} cannot be read: {result.reason}"
                    raise InputError(f"{problem}; without --strict it is left out")
                left_out += 1
                if on_bad:
                    on_bad(job.record.name, result.reason)
            done += len(jobs)
            if progress:
                progress(done, total)
    if not counts.images:
        raise InputError(f"none of the {total:,} images of {source.description} could be read")
    origin = {"source": source.description, "split": split, "preprocess": preprocess.to_dict()}
    counts.sources.append({**origin, "images": counts.images, "left_out": left_out})
    return counts


def selected_split(source: Source, split: str | None) -> str:
    """The split to count: the requested one or "all"; by default "train" or the only one.

    Raises:
        InputError: there is no such split, or no default.
    """
    there = list(source.counts)
    if split is None:
        split = there[0] if len(there) == 1 else "train"
        if split not in there:
            raise InputError(f"{source.description} has no split 'train'; choose --split {'|'.join([*there, ALL])}")
    elif split not in (*there, ALL):
        raise InputError(f"{source.description} has no split {split!r}; its splits: {', '.join(there)}")
    return split


def _jobs(source: Source, split: str, total: int) -> Iterator[Job]:
    records = (record for record in source.records() if split in (ALL, record.split))
    for index, record in enumerate(itertools.islice(records, total)):
        yield Job(record, record.split, index)
