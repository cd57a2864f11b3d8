"""Mutated files of every kind that is read: our error, or a value that passes our own checks; never anything else.

Seeded, so that a failure comes again; `pytest -m slow tests/test_fuzz_files.py` tries many more.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import stop_at, write_tokens

from igpt_cli.errors import IgptError, Interrupted
from igpt_cli.images.sources import open_source
from igpt_cli.model_dir import load_model, read_config
from igpt_cli.palette.formats import write_palette
from igpt_cli.palette.palette import Palette
from igpt_cli.probing.feature_file import open_features
from igpt_cli.probing.probe import probe, read_result, write_result
from igpt_cli.probing.store import extract_features
from igpt_cli.report.budgets import mixed_budgets, training_cost
from igpt_cli.report.page import page
from igpt_cli.report.page_run import read_runs
from igpt_cli.tokens import tokenize as tokenizing
from igpt_cli.tokens.import_ import find_arrays, import_openai
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings, read_settings

#: Files tried of each kind, and in the longer run.
QUICK, LONG = 12, 300
SECONDS, MEMORY = 10, 10**9

#: What no field expects: wrong types, huge, tiny and odd values.
ODD = [
    *(
        None,
        True,
        -1,
        0,
        0.5,
        10**30,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\ud800",
        "\x00",
        "a" * 5000,
    ),
    *([], [[]], [1, "a"], {}, {"a": {}}, [None] * 3, [10**30] * 3, "../../x", "1e5"),
]
#: Headers of .npy files that make NumPy raise more than ValueError.
HEADERS = [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"(" * 3000 + b"}",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    b"{'descr': [('a', '<f4'), 3], 'fortran_order': False, 'shape': (2, 3), }",
    b"{'descr': ('<f4', 7, 8), 'fortran_order': 3, 'shape': (2, 3), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': ('a', 3), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': 3L, }",
    b"'''unterminated",
    b"{'descr'",
    b"[1, 2]",
    b"{1: 2, 'descr': 3, 'shape': 4}",
    b"\xff\xfe",
]


def npy(header: bytes) -> bytes:
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(96)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, zeroed, repeated, removed, or all that follows cut off."""
    block = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(block) or 1), rng.choice((1, 2, 8, 64, 512))
        kind = rng.randrange(6)
        if kind == 0:
            block[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            block[at : at + n] = bytes(len(block[at : at + n]))
        elif kind == 2:
            block[at : at + n] = rng.randbytes(len(block[at : at + n]))
        elif kind == 3:
            del block[at : at + n]
        elif kind == 4:
            block[at:at] = block[at : at + n]
        elif rng.random() < 0.3:
            del block[at:]
    return bytes(block)


def odd_document(document: Any, rng: random.Random) -> Any:
    """The same JSON with one value replaced or removed, anywhere in it."""
    document = json.loads(json.dumps(document))
    places = []

    def walk(thing: Any) -> None:
        for key in thing if isinstance(thing, dict) else range(len(thing)):
            places.append((thing, key))
            if isinstance(thing[key], (dict, list)):
                walk(thing[key])

    walk(document)
    thing, key = rng.choice(places)
    if rng.random() < 0.2:
        del thing[key]
    else:
        thing[key] = rng.choice(ODD)
    return document


def variants(content: bytes, rng: random.Random, n: int) -> list[bytes]:
    """Mutated bytes, and where it is JSON or an array also what is well-formed and odd."""
    out = [mutated(content, rng) for _ in range(n)]
    if content.startswith(b'{"step"'):
        lines = content.splitlines()
        for _ in range(2 * n):
            odd = json.dumps(odd_document(json.loads(rng.choice(lines)), rng)).encode()
            out.append(b"\n".join([*lines, odd, b"[1]", b"3"]))
    elif content.lstrip()[:1] == b"{":
        document = json.loads(content)
        out += [json.dumps(odd_document(document, rng)).encode() for _ in range(2 * n)]
        out += [
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"null",
            b"[]",
            b"3",
            b"\xff\xfe{}",
            b'{"clusters": [[1e999, 0, 0]]}',
        ]
    if content.startswith(b"\x93NUMPY"):
        out += map(npy, HEADERS)
    return out


@dataclass
class Files:
    """A small workspace: a run that can be resumed, tokens, features, palettes, a probe, an interrupted tokenize."""

    folder: Path

    def make(self) -> Files:
        tokens = open_tokens(write_tokens(self.folder / "t.h5"))
        recipe = PretrainSettings(n_layer=1, n_embd=8, steps=4, batch_size=6)
        with pytest.raises(Interrupted):
            pretrain(
                tokens, self.folder / "run", recipe, Execution(precision="float32"), device="cpu", on_record=stop_at(2)
            )
        run = load_model(self.folder / "run")
        extract_features(run, tokens, self.folder / "f.h5", layers=[0, 1])
        found = probe(run, tokens, baselines=False, details=True)
        write_result(found, self.folder / "run" / "probe.json")
        tokens.palette.save(self.folder / "p.npz")
        for name in ("p.npy", "p.json"):
            write_palette(tokens.palette, self.folder / name)
        np.save(self.folder / "a_trX.npy", np.array(tokens.split("train").tokens))
        np.save(self.folder / "a_trY.npy", np.arange(len(tokens.split("train"))) % 2)
        return self


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz")).make()


def check(value: Any) -> None:
    """What our own checks say of a value."""
    if isinstance(value, Palette):
        assert 2 <= value.n_vocab <= 65536
        assert np.isfinite(value.centers).all()
        assert value.centers.min() >= 0
        assert value.centers.max() <= 255


def tried(path: Path, n: int, seed: int, read) -> None:
    """Read `n` mutations of the file and more, in its place."""
    content, rng = path.read_bytes(), random.Random(seed)
    try:
        for i, variant in enumerate(variants(content, rng, n)):
            path.write_bytes(variant)
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                check(read())
            except IgptError:
                pass
            except BaseException as e:
                raise AssertionError(f"{path.name}, variant {i}: {type(e).__name__}: {e}: {variant[:300]!r}") from e
            assert time.monotonic() - began < SECONDS, f"{path.name}, variant {i}"
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            assert grown < MEMORY, f"{path.name}, variant {i}"
    finally:
        path.write_bytes(content)


long = pytest.mark.parametrize("n", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])


@long
@pytest.mark.parametrize("name", ["p.npz", "p.npy", "p.json", "t.h5"])
def test_palettes(files, name, n):
    tried(files.folder / name, n, 1, lambda: Palette.load(files.folder / name))


@long
def test_token_files(files, n):
    def read():
        file = open_tokens(files.folder / "t.h5")
        for split in file.splits.values():
            assert len(split.names) == len(split.labels) == len(split.tokens)
            split.decode(slice(0, 2))
        return file.skipped

    tried(files.folder / "t.h5", n, 2, read)


@long
def test_feature_files(files, n):
    def read():
        file = open_features(files.folder / "f.h5")
        file.describe()
        for name in file.splits:
            np.array(file.read(name, file.layers[0])), file.names(name)

    tried(files.folder / "f.h5", n, 3, read)


@long
@pytest.mark.parametrize("name", ["a_trX.npy", "a_trY.npy"])
def test_openai_arrays(files, name, n):
    palette, out = Palette.load(files.folder / "p.npz"), files.folder / "out.h5"
    tried(
        files.folder / name, n // 3, 4, lambda: import_openai(find_arrays(files.folder / "a"), palette, out, force=True)
    )


@long
def test_configs_of_runs(files, n):
    run = files.folder / "run"

    def read():
        config = read_config(run)
        training_cost(config), mixed_budgets({"a": config, "b": {**config, "result": {}}})
        read_runs([run], None, measure=False, draw=False)
        load_model(run)
        read_settings(run / "config.json")

    tried(run / "config.json", n, 5, read)


@long
@pytest.mark.parametrize("name", ["config.json", "probe.json"])
def test_pages_of_odd_runs(files, name, n):
    run = files.folder / "run"

    def read():
        accounts = read_runs([run], None, measure=False, draw=False)
        page(accounts)

    tried(run / name, n // 3, 6, read)


@long
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/best", "palette.npz", "model.safetensors"])
def test_other_files_of_runs(files, name, n):
    run = files.folder / "run"

    def read():
        read_runs([run, run / "checkpoints" / "best"], None, measure=False, draw=False)
        load_model(run / "checkpoints" / "best"), load_model(run)

    if name == "checkpoints/best":
        (run / name).write_text("step-2\n")
    tried(run / name, n, 7, read)


@long
@pytest.mark.parametrize("name", ["config.json", ".metadata", "__0_0.distcp"])
def test_checkpoints_that_are_resumed(files, name, n, tmp_path):
    shutil.copytree(files.folder / "run", tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").glob(f"*/**/{name}")
    tokens = open_tokens(files.folder / "t.h5")

    def read():
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        try:
            resume(tokens, tmp_path / "copy", device="cpu")
        finally:
            shutil.rmtree(tmp_path / "copy")

    tried(path, n // 6, 8, read)


@long
def test_probe_results(files, n):
    path = files.folder / "run" / "probe.json"
    tried(path, n, 9, lambda: read_result(path))


@long
def test_notes_of_an_interrupted_tokenize(files, n, tmp_path, monkeypatch):
    from PIL import Image

    for i in range(24):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 10, 0, 0)).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    palette, out = Palette.load(files.folder / "p.npz"), tmp_path / "t.h5"
    source = open_source([tmp_path / "photos"])
    add = tokenizing._Run.add

    def interrupted(self, chunk, results):
        add(self, chunk, results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing._Run, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizing.tokenize(source, palette, out, workers=1)
    part = tmp_path / "t.h5.part"
    shutil.copytree(part, tmp_path / "copy")

    def read():
        note = (part / "progress.json").read_bytes()
        try:
            tokenizing.unfinished(out)
            tokenizing.tokenize(source, palette, out, workers=1, resume=True)
            open_tokens(out)
        finally:
            out.unlink(missing_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(tmp_path / "copy", part)
            (part / "progress.json").write_bytes(note)

    tried(part / "progress.json", n // 2, 10, read)
