"""Prepare images in several processes: in order, in bounded memory.

The processes only decode and resize, which is nearly all the work. The parent counts colours or looks up tokens in one
table, which is faster than one in each process.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from igpt_cli.errors import IgptError
from igpt_cli.images.sources import Record
from igpt_cli.images.transforms import BadImageError, Preprocess, prepare_views

#: Splits whose images get the evaluation crop, whatever the number of training views.
EVALUATION_SPLITS = frozenset({"val", "valid", "validation", "test"})

#: Limits of a chunk, which a process gets at a time.
CHUNK_IMAGES = 128
CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Job:
    """One image to prepare for a split; `index` is its index in the split of the source."""

    record: Record
    split: str
    index: int


@dataclass(frozen=True)
class Prepared:
    """The result of a job: `views` (K, R, R, 3) uint8, or None and the `reason` why not."""

    views: np.ndarray | None
    reason: str = ""


class WorkerError(IgptError):
    """A worker process ended unexpectedly."""


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def views_of(split: str, preprocess: Preprocess) -> int:
    """The rows that an image of this split becomes: K training views, or one evaluation crop."""
    return 1 if split in EVALUATION_SPLITS else max(1, preprocess.views)


def prepared(jobs: Iterable[Job], preprocess: Preprocess, workers: int) -> Generator[tuple[list[Job], list[Prepared]]]:
    """Yield the jobs in order, chunk by chunk, with their results.

    This process does the work itself with one worker, for one chunk, or for pixels that are R x R already.

    Raises:
        WorkerError: a process ended unexpectedly, for instance killed for lack of memory.
    """
    chunks = _chunks(jobs)
    begin = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(begin, chunks)
    side = preprocess.resolution
    pixels_are_there = begin and getattr(begin[0][0].record.data, "shape", None) == (side, side, 3)
    if workers == 1 or len(begin) < 2 or pixels_are_there:
        for chunk in chunks:
            yield chunk, _prepare_chunk(chunk, preprocess)
        return
    # A fresh interpreter each: forking a process that runs threads may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    running: deque = deque()
    try:
        for chunk in chunks:
            with _ctrl_c_held_back():
                running.append((chunk, pool.submit(_prepare_chunk, chunk, preprocess)))
            if len(running) > 2 * workers:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
    except BrokenProcessPool as e:
        raise WorkerError(
            "a worker process ended unexpectedly, perhaps killed for want of memory; try fewer --workers "
            "(a Python script must call this under `if __name__ == '__main__':`)"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    chunk, size = [], 0
    for job in jobs:
        chunk.append(job)
        size += _size(job.record.data)
        if len(chunk) == CHUNK_IMAGES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(data: Path | bytes | np.ndarray) -> int:
    if isinstance(data, Path):
        try:
            return data.stat().st_size
        except OSError:  # reported when it is read
            return 0
    return data.nbytes if isinstance(data, np.ndarray) else len(data)


def _prepare_chunk(chunk: list[Job], preprocess: Preprocess) -> list[Prepared]:
    centre_crop = replace(preprocess, views=0)
    out = []
    for job in chunk:
        how = centre_crop if job.split in EVALUATION_SPLITS else preprocess
        try:
            out.append(Prepared(prepare_views(job.record.data, how, job.record.name)))
        except BadImageError as e:
            out.append(Prepared(None, e.reason))
    return out


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A process started in this block never gets Ctrl-C; this process gets it after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Ignore Ctrl-C, and end when the parent ends, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
