"""Writing and opening token files: what goes in comes out, and what is not as the format says is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.files import sha256_of
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.verify import verify
from igpt_cli.tokens.writer import TokenWriter

R, V = 4, 8
PALETTE = Palette(np.linspace(0, 255, V)[:, None].repeat(3, 1))
RNG = np.random.default_rng(0)


def rows(n: int) -> tuple:
    """tokens, labels, names"""
    return RNG.integers(0, V, (n, R * R)), RNG.integers(-1, 2, n), [f"train/{i:03d}.png" for i in range(n)]


def write(path, **more):
    with TokenWriter(path, PALETTE, R, classes=["cat", "dog"], source="test", force=True, **more) as writer:
        writer.append("train", *rows(20))
        writer.append("test", *rows(5))
    return path


@pytest.fixture
def tokens(tmp_path):
    return write(tmp_path / "tokens.h5")


names = st.lists(st.text(min_size=1, max_size=20).filter(lambda t: not t.endswith("\0")), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None)
@given(batches=st.lists(st.tuples(st.sampled_from(["train", "val", "zoo", "test"]), names), min_size=1, max_size=5))
def test_rows_come_back_as_they_were_written(tmp_path_factory, batches):
    path = tmp_path_factory.getbasetemp() / "round.h5"
    expected: dict[str, list] = {}
    with TokenWriter(path, PALETTE, R, classes=["a", "ß"], preprocess={"x": 1}, keep_rgb=True, force=True) as writer:
        for split, texts in batches:
            n = len(texts)
            tokens, labels, _ = rows(n)
            rgb = RNG.integers(0, 256, (n, R, R, 3)).astype(np.uint8)
            writer.append(split, tokens, labels, texts, rgb=rgb)
            expected.setdefault(split, []).append((tokens, labels, texts, rgb))
    file = open_tokens(path)
    assert list(file.splits) == [s for s in ("train", "val", "test", "zoo") if s in expected]
    assert (file.classes, file.preprocess, file.palette.sha256) == (["a", "ß"], {"x": 1}, PALETTE.sha256)
    for name, parts in expected.items():
        split = file.split(name)
        tokens, labels, texts, rgb = zip(*parts, strict=True)
        assert np.array_equal(split.tokens, np.concatenate(tokens))
        assert np.array_equal(split.labels, np.concatenate(labels))
        assert np.array_equal(split.rgb, np.concatenate(rgb))
        wanted = [t.encode("utf-8", "backslashreplace").decode() for group in texts for t in group]
        assert split.names == wanted
        assert np.array_equal(split.decode(slice(None)), PALETTE.rgb[split.tokens].reshape(-1, R, R, 3))
        assert split.sha256 == sha256_of(np.concatenate(tokens).astype("<u2").tobytes())
    assert verify(path) == []


def test_the_file_is_as_the_format_page_draws_it(tokens):
    with h5py.File(tokens) as h5:
        attrs = dict(h5.attrs)
        assert set(attrs) == {
            *("format", "format_version", "resolution", "n_vocab", "preprocess", "source", "tool_version", "created"),
            "palette_sha256",
        }
        assert (attrs["format"], attrs["format_version"]) == ("igpt-tokens", 1)
        assert attrs["palette_sha256"] == sha256_of(h5["palette"][:].astype("<f4").tobytes())
        assert sorted(h5) == ["classes", "palette", "test", "train"]
        for name, dtype in (("tokens", "<u2"), ("labels", "<i4")):
            data = h5["train"][name]
            assert (data.dtype, data.chunks, data.compression) == (np.dtype(dtype), None, None)
            assert data.id.get_offset() is not None
        assert h5py.check_string_dtype(h5["train/names"].dtype).encoding == "utf-8"


def test_the_same_rows_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    global RNG
    contents = []
    for name in ("a.h5", "b.h5"):
        RNG = np.random.default_rng(7)
        contents.append(write(tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert open_tokens(tmp_path / "a.h5").attrs["created"] == "1970-01-02T00:00:00+00:00"


def test_decode_takes_an_integer_a_list_or_a_slice(tokens):
    split = open_tokens(tokens).split("train")
    assert split.decode(3).shape == (1, R, R, 3)
    assert np.array_equal(split.decode([3, 5]), split.decode(slice(3, 6, 2)))


def test_no_handle_stays_open_and_the_file_may_be_replaced(tokens):
    split = open_tokens(tokens).split("train")
    before = np.array(split.tokens)
    write(tokens)  # opened for writing and renamed over: an open HDF5 handle or lock would refuse
    assert np.array_equal(split.tokens, before)


def _sum_of_rows(split, rows):
    return [int(split.tokens[r].sum()) for r in rows]


def test_a_split_travels_to_other_processes_as_its_path(tokens):
    split = open_tokens(tokens).split("train")
    assert len(pickle.dumps(split)) < 500
    jobs = [list(range(i, 20, 4)) for i in range(4)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.starmap(_sum_of_rows, [(split, rows) for rows in jobs])
    assert sums == [_sum_of_rows(split, rows) for rows in jobs]


def test_a_missing_split_names_those_there_are(tokens):
    with pytest.raises(InputError) as error:
        open_tokens(tokens).split("val")
    assert str(error.value) == f"{tokens} has no split 'val'; its splits: train, test"


def replaced(name, data, **options):
    def change(h5):
        del h5[name]
        h5.create_dataset(name, data=data, **options)

    return change


def attribute(name, value):
    return lambda h5: h5.attrs.__setitem__(name, value)


def changed_in_place(name, index, value):
    return lambda h5: h5[name].__setitem__(index, value)


TOKENS = np.zeros((20, R * R), "<u2")
BROKEN = {
    "another format": (attribute("format", "igpt-features"), "its format is 'igpt-features', 'igpt-tokens' is needed"),
    "no format": (lambda h5: h5.attrs.__delitem__("format"), "not a token file: it has no attribute 'format'"),
    "later version": (attribute("format_version", 2), "has format_version 2, this program reads version 1; upgrade"),
    "no resolution": (lambda h5: h5.attrs.__delitem__("resolution"), "the attribute resolution is None, a whole"),
    "huge resolution": (attribute("resolution", 10**6), "the attribute resolution is 1000000, a whole number 1..1024"),
    "other resolution": (attribute("resolution", 5), "/train/tokens is (20, 16) uint16, (N, 25) uint16 is needed"),
    "text for a number": (attribute("n_vocab", "8"), "the attribute n_vocab is '8', a whole number 2..65536"),
    "no preparation": (lambda h5: h5.attrs.__delitem__("preprocess"), "the attribute preprocess is missing or not"),
    "preparation not JSON": (attribute("preprocess", "{"), "the attribute preprocess is not a JSON object: '{'"),
    "part no number": (attribute("test_part", "0.2"), "the attribute test_part is '0.2', a number is needed"),
    "palette of another size": (attribute("n_vocab", 9), "/palette is (8, 3) float32, (9, 3) float32 is needed"),
    "palette changed": (changed_in_place("palette", (0, 0), 3.0), "/palette was changed: its SHA-256 is"),
    "no palette": (lambda h5: h5.__delitem__("palette"), "holds no dataset /palette"),
    "token out of range": (
        changed_in_place("train/tokens", (7, 3), 600),
        "/train/tokens holds the token 600 in row 7; the palette has 8 colours, so tokens are 0..7",
    ),
    "label out of range": (
        changed_in_place("train/labels", 2, 2),
        "/train/labels holds 2; with 2 classes labels are -1..1",
    ),
    "label below -1": (changed_in_place("train/labels", 2, -2), "/train/labels holds -2; with 2 classes"),
    "classes gone": (lambda h5: h5.__delitem__("classes"), "labels holds 1; with 0 classes labels are -1..-1"),
    "compressed tokens": (
        replaced("train/tokens", TOKENS, compression="gzip"),
        "/train/tokens is chunked or compressed; it must be contiguous and uncompressed to be memory-mapped",
    ),
    "tokens of another dtype": (
        replaced("train/tokens", TOKENS.astype("i8")),
        "/train/tokens is (20, 16) int64, (N, 16) uint16 is needed",
    ),
    "fewer labels": (replaced("train/labels", np.zeros(19, "<i4")), "/train/labels is (19,) int32, (20,) int32 is"),
    "no names": (lambda h5: h5.__delitem__("train/names"), "holds no dataset /train/names"),
    "tokens a group": (
        lambda h5: (h5.__delitem__("train/tokens"), h5.create_group("train/tokens")),
        "holds no dataset /train/tokens",
    ),
    "no split": (lambda h5: (h5.__delitem__("train"), h5.__delitem__("test")), "holds no split: there is no group"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_as_the_format_says_is_refused(tokens, name):
    change, message = BROKEN[name]
    with h5py.File(tokens, "r+") as h5:
        change(h5)
    with pytest.raises(FormatError) as error:
        open_tokens(tokens)
    assert message in str(error.value)
    assert str(tokens) in str(error.value)
    assert any(message in problem for problem in verify(tokens)) or name == "classes gone"


def test_verify_lists_every_problem(tokens):
    with h5py.File(tokens, "r+") as h5:
        h5["train/tokens"][3, 3] = 99
        h5["test/tokens"][0] = (h5["test/tokens"][0] + 1) % V
        h5["test/names"][0] = b"other.png"
        h5["test/labels"][1] = 7
        h5.attrs["created"] = 5
    problems = verify(tokens)
    wanted = (
        "the attribute created is missing or not text",
        "/train/tokens holds the token 99 in row 3",
        "/train/tokens was changed after it was written",
        "/test/labels holds 7",
        "/test/tokens was changed after it was written",
        "/test/labels was changed after it was written",
        "/test/names was changed after it was written",
    )
    assert len(problems) == len(wanted)
    for problem, part in zip(problems, wanted, strict=True):
        assert part in problem


def test_verify_of_another_kind_of_file_says_only_that(tmp_path):
    (tmp_path / "x.h5").write_text("hello")
    assert verify(tmp_path / "x.h5") == [f"{tmp_path}/x.h5 is a text file; a token file (HDF5) was expected there"]


@pytest.mark.parametrize(
    ("append", "message"),
    [
        (("train", np.full((1, 16), 8), [0], ["a"]), "holds the token 8 in row 0; the palette has 8 colours"),
        (("train", np.full((1, 16), -1), [0], ["a"]), "holds the token -1 in row 0"),
        (("train", np.zeros((1, 16), int), [2], ["a"]), "labels 2..2 do not fit 2 classes"),
        (("train", np.zeros((2, 16), int), [0], ["a"]), "1 names, labels (1,) and tokens (2, 16) do not fit together"),
        (("palette", np.zeros((1, 16), int), [0], ["a"]), "'palette' cannot name a split"),
        (("a/b", np.zeros((1, 16), int), [0], ["a"]), "'a/b' cannot name a split"),
    ],
)
def test_bad_rows_are_refused_and_leave_no_file(tmp_path, append, message):
    with pytest.raises(FormatError) as error, TokenWriter(tmp_path / "t.h5", PALETTE, R, classes=["a", "b"]) as writer:
        writer.append(*append)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_without_rows_writes_nothing(tmp_path):
    with pytest.raises(FormatError, match="no image became tokens"), TokenWriter(tmp_path / "t.h5", PALETTE, R):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with TokenWriter(tmp_path / "t.h5", PALETTE, R, classes=["a", "b"]) as writer:
        writer.append("train", *rows(3))
        with pytest.raises(OutputError, match=r"another process is writing .*t\.h5; wait for it"):
            TokenWriter(tmp_path / "t.h5", PALETTE, R)
    assert len(open_tokens(tmp_path / "t.h5").split("train")) == 3


def test_too_small_a_disk_is_said_before_the_file_is_written(tmp_path, monkeypatch):
    full = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match=r"not enough space for .*t\.h5: about .* MB are needed, 0 MB are free in"):
        write(tmp_path / "t.h5")
    assert list(tmp_path.iterdir()) == []


def test_skipped_images_are_noted(tmp_path):
    with TokenWriter(tmp_path / "t.h5", PALETTE, R, classes=["a", "b"]) as writer:
        writer.append("train", *rows(3))
        writer.skipped = {"train": 2, "val": 1, "test": 0}
    file = open_tokens(tmp_path / "t.h5")
    assert file.skipped == {"train": 2, "val": 1}
    assert json.loads(file.attrs["skipped"]) == {"train": 2, "val": 1}
