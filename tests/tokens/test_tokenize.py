"""Images become tokens: against brute force, in any number of processes, shards and attempts."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_cli.errors import FormatError, InputError, MismatchError, OutputError
from igpt_cli.images import parallel
from igpt_cli.images.sources import Record, Source, open_source
from igpt_cli.images.transforms import Preprocess, prepare
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.merge import merge
from igpt_cli.tokens.shards import Shard
from igpt_cli.tokens.spool import Spool
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.tokenize import tokenize, unfinished

R = 8
PREPROCESS = Preprocess(R)
RNG = np.random.default_rng(1)
PALETTE = Palette(np.array([[0, 0, 0], [60, 60, 60], [200, 30, 30], [30, 200, 30], [120, 120, 255], [255, 255, 255]]))


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


def png(seed: int, side: int = 11) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + seed % 3, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SPLIT = {"a": "train", "x": "train", "v": "val", "y": "val", "t": "test"}


class Memory(Source):
    """Images in memory, one a letter: a for train, v for val, t for test; x and y are broken ones of train and val."""

    def __init__(self, plan: str):
        self.kept = [
            Record(f"{i:03d}", SPLIT[c], i % 2, b"\x89PNG broken" if c in "xy" else png(i)) for i, c in enumerate(plan)
        ]
        splits = [r.split for r in self.kept]
        super().__init__("memory", ["even", "odd"], {s: splits.count(s) for s in splits})

    def records(self):
        return iter(self.kept)


PLAN = "aavtaxtaavyattvaaxaavtaaattaaaaataxata" * 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The one run that the others are compared with."""
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    path = tmp_path_factory.mktemp("whole") / "t.h5"
    tokenize(Memory(PLAN), PALETTE, path, PREPROCESS, workers=1)
    os.environ.pop("SOURCE_DATE_EPOCH") if before is None else os.environ.update(SOURCE_DATE_EPOCH=before)
    return path


def test_tokens_are_the_nearest_colours_of_the_prepared_images(whole):
    file = open_tokens(whole)
    good = [r for r in Memory(PLAN).records() if not r.data.endswith(b"broken")]
    for name, split in file.splits.items():
        records = [r for r in good if r.split == name]
        assert split.names == [r.name for r in records]
        assert split.labels.tolist() == [r.label for r in records]
        for row, record in zip(split.tokens, records, strict=True):
            pixels = prepare(record.data, PREPROCESS, record.name).reshape(-1, 1, 3).astype(float)
            distances = ((pixels - PALETTE.centers.astype(float)) ** 2).sum(axis=2)
            assert np.array_equal(row, distances.argmin(axis=1))
    assert file.skipped == {"train": 12, "val": 4}
    assert file.classes == ["even", "odd"]


def test_two_processes_write_the_same_bytes_as_one(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(parallel, "CHUNK_IMAGES", 9)
    seen = []
    report = tokenize(
        *(Memory(PLAN), PALETTE, tmp_path / "t.h5", PREPROCESS),
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "t.h5").read_bytes() == whole.read_bytes()
    assert seen[-1] == (len(PLAN), len(PLAN))
    assert (report.images, report.n_bad) == (len(PLAN) - 16, 16)
    assert sum(report.rows.values()) == report.images
    assert [p.name for p in tmp_path.iterdir()] == ["t.h5"]


@settings(max_examples=15, deadline=None)
@given(plan=st.text("aavtxy", min_size=1, max_size=30), n=st.integers(2, 4), views=st.integers(0, 2))
def test_shards_merged_are_one_run(tmp_path_factory, plan, n, views):
    if set(plan) <= set("xy"):
        plan += "a"
    folder = tmp_path_factory.mktemp("shards")
    how = Preprocess(R, views=views)
    tokenize(Memory(plan), PALETTE, folder / "whole.h5", how, workers=1, keep_rgb=views > 1)
    parts = []
    for i in range(n):
        try:
            tokenize(*(Memory(plan), PALETTE, folder / f"{i}.h5", how), workers=1, shard=f"{i}/{n}", keep_rgb=views > 1)
        except InputError:  # fewer images than shards: there is nothing to compare
            return
        parts.append(folder / f"{i}.h5")
    merge(parts[::-1], folder / "merged.h5")
    assert (folder / "merged.h5").read_bytes() == (folder / "whole.h5").read_bytes()


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 40, 100, len(PLAN)])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, whole, monkeypatch, stop_at):
    monkeypatch.setattr(parallel, "CHUNK_IMAGES", 10)
    out = tmp_path / "t.h5"

    def stop(done, total):
        if done >= stop_at:
            raise Stop

    with pytest.raises(Stop):
        tokenize(Memory(PLAN), PALETTE, out, PREPROCESS, workers=1, progress=stop)
    assert not out.exists()
    assert unfinished(out) >= stop_at
    # What a killed process had written after its last note is cut away.
    with open(tmp_path / "t.h5.part" / "train.tokens", "ab") as file:
        file.write(b"half a row")
    with pytest.raises(
        OutputError, match=r"t\.h5\.part holds .* of an interrupted run; continue with --resume, or start"
    ):
        tokenize(Memory(PLAN), PALETTE, out, PREPROCESS, workers=1)
    report = tokenize(Memory(PLAN), PALETTE, out, PREPROCESS, workers=1, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert (report.resumed, report.n_bad) == (-(-stop_at // 10) * 10 if stop_at < len(PLAN) else len(PLAN), 16)
    assert not (tmp_path / "t.h5.part").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"palette": Palette(PALETTE.centers[:4])}, "was begun with palette"),
        (
            {"preprocess": Preprocess(R, exact_decode=True)},
            "preparation {'exact_decode': False}, this run has {'exact_decode': True};",
        ),
        ({"plan": PLAN + "a"}, "was begun with images"),
        ({"limit": 20}, "was begun with images"),
        ({"plan": PLAN[1:] + "a"}, "was begun with other images: image 20 was 019, now it is 019"),
    ],
)
def test_what_was_begun_otherwise_is_not_resumed(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(parallel, "CHUNK_IMAGES", 10)
    out = tmp_path / "t.h5"

    def stop(done, total):
        if done >= 20:
            raise Stop

    with pytest.raises(Stop):
        tokenize(Memory(PLAN), PALETTE, out, PREPROCESS, workers=1, progress=stop)
    plan, rest = change.get("plan", PLAN), {k: v for k, v in change.items() if k == "limit"}
    again = Memory(plan)
    if plan == PLAN[1:] + "a":  # the same counts, another image at the place where the run stopped
        again.kept = [Record("other", r.split, r.label, r.data) if r.name == "019" else r for r in Memory(PLAN).kept]
        again.counts = Memory(PLAN).counts
        message = "image 20 was 019, now it is other"
    palette, how = change.get("palette", PALETTE), change.get("preprocess", PREPROCESS)
    with pytest.raises(MismatchError, match=message):
        tokenize(again, palette, out, how, workers=1, resume=True, **rest)
    assert unfinished(out) == 20  # still there for the right arguments
    tokenize(again, palette, out, how, workers=1, force=True, **rest)
    assert out.exists()


def test_resume_without_an_interrupted_run_begins_at_the_beginning(tmp_path, whole):
    tokenize(Memory(PLAN), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, resume=True)
    assert (tmp_path / "t.h5").read_bytes() == whole.read_bytes()


def test_views_are_rows_of_training_images_only(tmp_path):
    how = Preprocess(R, views=3, seed=5)
    tokenize(Memory("atv"), PALETTE, tmp_path / "t.h5", how, workers=1, keep_rgb=True)
    file = open_tokens(tmp_path / "t.h5")
    train = file.split("train")
    assert train.names == ["000@0", "000@1", "000@2"]
    record = next(Memory("atv").records())
    for view in range(3):
        assert np.array_equal(train.rgb[view], prepare(record.data, how, "000", view))
    assert len({row.tobytes() for row in train.tokens}) == 3
    assert (file.split("test").names, file.split("val").names) == (["001"], ["002"])
    assert np.array_equal(file.split("test").rgb[0], prepare(png(1), PREPROCESS, "001"))


def test_limit_and_split_choose_images(tmp_path):
    def names(**options):
        tokenize(Memory("aavttxaat"), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, force=True, **options)
        return {s.name: s.names for s in open_tokens(tmp_path / "t.h5").splits.values()}

    assert names(limit=2) == {"train": ["000", "001"], "val": ["002"], "test": ["003", "004"]}
    assert names(split="test") == {"test": ["003", "004", "008"]}
    assert names(split="test", limit=1) == {"test": ["003"]}
    assert names(limit=3) == {"train": ["000", "001"], "val": ["002"], "test": ["003", "004", "008"]}


def test_images_without_splits_are_written_as_the_split_asked_for(tmp_path):
    tokenize(Memory("aaa"), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, split="test")
    assert list(open_tokens(tmp_path / "t.h5").splits) == ["test"]


def test_a_limited_run_does_not_read_the_rest_of_the_source(tmp_path):
    source = Memory("aaaaaaa")

    def records():
        yield from source.kept[:3]
        raise AssertionError("read on")

    source.records = records
    assert tokenize(source, PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, limit=3).images == 3


@pytest.mark.parametrize(
    ("plan", "options", "error", "message"),
    [
        ("xx", {}, InputError, "none of the 2 images can be read; the first is 000: "),
        ("axa", {"strict": True}, InputError, "001: .*; without --strict such images are left out and counted"),
        ("at", {"split": "val"}, InputError, "memory has no split 'val'; its splits: train, test"),
        ("aa", {"shard": "2/2"}, InputError, "there is no shard 2/2: shards of 2 are 0/2..1/2"),
        ("aa", {"shard": "half"}, InputError, "--shard half is not i/n, such as 0/4, nor auto"),
        ("aa", {"shard": "4/9"}, InputError, "memory has no images for shard 4/9; give at most 2 shards"),
        ("aa", {"split": ""}, FormatError, "'' cannot name a split of a token file; choose another name"),
    ],
)
def test_what_cannot_be_tokenized_is_said_and_leaves_nothing(tmp_path, plan, options, error, message):
    with pytest.raises(error, match=message):
        tokenize(Memory(plan), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, **options)
    assert not (tmp_path / "t.h5").exists()
    assert unfinished(tmp_path / "t.h5") in (0, 1)


def test_bad_images_are_reported_as_they_occur(tmp_path):
    heard = []
    report = tokenize(
        Memory("axya"), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, on_bad=lambda *bad: heard.append(bad)
    )
    assert [name for name, _ in heard] == ["001", "002"]
    assert report.bad == heard
    assert report.to_dict()["bad"][0]["name"] == "001"


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "t.h5").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        tokenize(Memory("a"), PALETTE, tmp_path / "t.h5", PREPROCESS)
    assert (tmp_path / "t.h5").read_text() == "old"


def test_too_small_a_disk_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(OutputError, match=r"not enough space for .*t\.h5"):
        tokenize(Memory(PLAN), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_was_done(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(parallel, "CHUNK_IMAGES", 10)
    append, calls = Spool.append, []

    monkeypatch.setattr(
        Spool, "_file", lambda self, *key, get=Spool._file: _Full() if len(calls) > 6 else get(self, *key)
    )
    monkeypatch.setattr(Spool, "append", lambda self, *args: (calls.append(1), append(self, *args)))
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device; free some space and try again"):
        tokenize(Memory(PLAN), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1)
    monkeypatch.undo()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert not (tmp_path / "t.h5").exists()
    assert unfinished(tmp_path / "t.h5") == 20
    tokenize(Memory(PLAN), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, resume=True)
    assert (tmp_path / "t.h5").read_bytes() == whole.read_bytes()


class _Full:
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


PROGRAM = """
    import sys, time
    from igpt_cli.images import parallel
    from igpt_cli.images.sources import open_source
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens import tokenize as module

    parallel.CHUNK_IMAGES = 4
    module._NOTE_EVERY = 0

    def slowly(done, total):
        print(done, flush=True)
        time.sleep(0.05)

    if __name__ == "__main__":
        palette = Palette.load(sys.argv[2])
        module.tokenize(open_source(sys.argv[1:2]), palette, sys.argv[3], Preprocess(8), workers=2, progress=slowly)
"""


@pytest.fixture
def photos(tmp_path):
    """A folder of 200 images, which the program takes some seconds for."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03d}.png").write_bytes(png(3))
    PALETTE.save(tmp_path / "p.npz")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    return folder


def started(tmp_path, photos) -> subprocess.Popen:
    command = [sys.executable, tmp_path / "program.py", photos, tmp_path / "p.npz", tmp_path / "t.h5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):  # chunks are done
        assert int(process.stdout.readline()) > 0
    return process


def children(pid: int) -> list[int]:
    tasks = f"/proc/{pid}/task"
    return [int(c) for t in os.listdir(tasks) for c in Path(tasks, t, "children").read_text().split()]


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{p}") for p in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{p}") for p in pids)


needs_proc = pytest.mark.skipif(not os.path.exists(f"/proc/{os.getpid()}/task"), reason="looks processes up in /proc")


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_file_and_no_process_and_can_be_resumed(tmp_path, photos, how):
    process = started(tmp_path, photos)
    workers = children(process.pid)
    process.send_signal(how)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert len(workers) >= 2
    assert gone(workers)
    assert not (tmp_path / "t.h5").exists()
    done = unfinished(tmp_path / "t.h5")
    assert 0 < done < 200
    report = tokenize(open_source([photos]), PALETTE, tmp_path / "t.h5", PREPROCESS, workers=1, resume=True)
    assert (report.resumed, report.images) == (done, 200)
    assert len({row.tobytes() for row in open_tokens(tmp_path / "t.h5").split("train").tokens}) == 1


@needs_proc
def test_a_worker_that_dies_ends_the_run(tmp_path, photos):
    process = started(tmp_path, photos)
    for pid in children(process.pid):
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            break
    _, stderr = process.communicate(timeout=10)
    assert "WorkerError: a worker process ended unexpectedly" in stderr
    assert not (tmp_path / "t.h5").exists()


@pytest.mark.parametrize(
    ("environ", "shard"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8"}, "3/8"),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, "2/4"),
        (
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}
            | {"SLURM_ARRAY_TASK_STEP": "2"},
            "2/4",
        ),
    ],
)
def test_auto_takes_the_shard_from_the_environment(environ, shard):
    assert str(Shard.parse("auto", environ)) == shard


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "3"}, "neither pair is set; give --shard i/n"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "cannot be read from the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "there is no shard 2/2"),
    ],
)
def test_auto_without_a_place_is_refused(environ, message):
    with pytest.raises(InputError, match=message):
        Shard.parse("auto", environ)
