"""Importers on damaged files: config.json, headers of safetensors, preprocessor_config.json, changed by a seed.

Whatever a file holds, the outcome is our error, with one line of text and nothing left behind, or a model directory
that `load_model` takes and that computes; nothing else is raised, no case takes 10 s, and memory stays below 1 GB.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.test_timm import SWIN, TOY

from igpt_cli.errors import IgptError
from igpt_cli.interop.huggingface import export_huggingface, import_huggingface
from igpt_cli.interop.resnet_keys import NAMES
from igpt_cli.interop.timm import export_timm, import_timm
from igpt_cli.interop.weights import describe
from igpt_cli.model_dir import WEIGHTS, load_model, new_config, write_model, write_weights
from igpt_cli.models.registry import build_model
from igpt_cli.palette.palette import Palette

VIT = {**TOY, "embed_dim": 12}
SIZES = {"vit": VIT, "deit_distilled": VIT, "deit_two_tokens": VIT, "swin": SWIN}
SOURCES = [
    *(("huggingface", name) for name in ("imagegpt", *SIZES)),
    *(("timm", name) for name in ("vit", "deit_distilled", "swin", "resnet")),
]
SECONDS, BYTES = 10, 10**9
#: What a value is replaced by.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 1.5, 1e-5, -0.0, 1e308, float("nan"),
    float("inf"), "", "2", "gelu", "vit", "deit", "swin", "imagegpt", "x" * 300, "\ud800", "a\nb", "\0", [], [2], [8, 8],
    [8, 9], [[1], [2]], [None], [0.5] * 3, [1e999] * 3, ["a"] * 3, {}, {"height": 8, "width": 8}, {"shortest_edge": 9},
    {"shortest_edge": {}}, {"a": [1, {"b": None}]}, {"0": "a", "1": "b", "2": "c"},
]  # fmt: skip
SHAPES = [[], [0], [1], [3], [0, 8], [8, 0], [2**31, 2**31], [1, 2**62], [-1, 8], [1] * 70]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F99", None, 3]


def write_source(form: str, name: str, folder: Path) -> Path:
    """A toy model in another library's form: what the cases are changed from."""
    torch.manual_seed(0)
    if name == "imagegpt":
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "resolution": 4, "n_vocab": 5, "objective": "ar"}
        model = {"name": "igpt", "backend": "igpt", **sizes}
        palette = Palette(torch.arange(15.0).reshape(5, 3).numpy())
    elif name == "resnet":
        model = describe("resnet", {"depths": [1, 1], "width": 4, "resolution": 32, "n_classes": 3})
        palette = None
    else:
        model, palette = describe(name, SIZES[name]), None
    weights = build_model(model).state_dict()
    if name == "resnet":
        folder.mkdir()
        write_weights(folder, {timms(k): v for k, v in weights.items()})
        config = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3}}
        (folder / "config.json").write_text(json.dumps({**config, "model_args": {"layers": [1, 1], "aa_layer": None}}))
        return folder
    run = write_model(folder.with_name(f"{folder.name}-run"), weights, palette, new_config(model))
    (export_timm if form == "timm" else export_huggingface)(run, folder)
    return folder


def timms(name: str) -> str:
    """The name in timm of a tensor of our ResNet with two stages."""
    from igpt_cli.interop.keys import NameTable

    return NameTable(("ours", "timm"), NAMES).rename(name, "ours", "timm")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[str, str], dict[str, bytes]]:
    """The files of each source by name."""
    root = tmp_path_factory.mktemp("sources")
    found = {key: write_source(*key, root / "-".join(key)) for key in SOURCES}
    return {key: {file.name: file.read_bytes() for file in folder.iterdir()} for key, folder in found.items()}


# Changes.


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key or index) of every value in a document."""
    if isinstance(document, (dict, list)):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from places(document[key])


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """One to three values replaced, removed, doubled or moved under another key; or the text cut or spoilt."""
    if rng.random() < 0.15:
        return changed_bytes(content, rng)
    document = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        inside, key = rng.choice(list(places(document)) or [(document, None)])
        if key is None:
            return b"[]"
        action = rng.random()
        if action < 0.7:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.85:
            del inside[key]
        elif isinstance(inside, dict):
            inside[rng.choice(["model_type", "act_layer", "global_pool", "size", "x", ""])] = inside[key]
        else:
            inside.append(inside[key])
    return json.dumps(document).encode()


def changed_header(content: bytes, rng: random.Random) -> bytes:
    """Names, shapes, types and places of tensors in the header of a safetensors file, or its bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.2:
        return changed_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        names = [name for name in header if name != "__metadata__"]
        if not names:
            break
        name = rng.choice(names)
        entry, action = header[name], rng.randrange(8)
        if action == 0:
            header[renamed(name, rng)] = header.pop(name)
        elif action == 1:
            other = header[rng.choice(names)]
            header[name] = other if rng.random() < 0.5 else {**other, "dtype": entry["dtype"]}
        elif action == 2:
            entry["shape"] = rng.choice([*SHAPES, entry["shape"][::-1], [*entry["shape"], 1]])
        elif action == 3:
            entry["dtype"] = rng.choice(DTYPES)
        elif action == 4:
            start, end = rng.choice([(0, 0), (0, 2**63), (5, 1), (-1, 4), (0, len(data))])
            entry["data_offsets"] = [start, end]
        elif action == 5:  # a tensor without numbers, whose place fits
            header[renamed(name, rng)] = {"dtype": "F32", "shape": [0, 8], "data_offsets": [0, 0]}
        elif action == 6:
            del header[name]
        elif data:  # values that are not finite
            start = rng.randrange(len(data))
            data = data[:start] + b"\xff" * len(data[start : start + 4]) + data[start + 4 :]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def renamed(name: str, rng: random.Random) -> str:
    """Another name: a wrapper's, a number that is huge, another part of a model."""
    return rng.choice([
        f"module.{name}", f"_orig_mod.{name}", name.replace("0", "999999999"), name.replace("0", "1"),
        name.replace("0", "9" * 30), name.replace("0", "\u0663"), name.replace("weight", "bias"), f"{name}.weight",
        "reg_token", "pooler.dense.weight", "dist_token", "", ".", "x" * 5000, "head_dist.weight",
        "blocks.0.attn.qkv.weight", "layers.0.blocks.0.attn.relative_position_bias_table", "layer1.0.conv1.weight",
        "h.0.attn.masked_bias", "vit.embeddings.patch_embeddings.projection.weight", "a.q_proj.b",
    ])  # fmt: skip


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with bits turned, with a block of zeros, or nested deeply."""
    at = rng.randrange(len(content) + 1)
    return [
        lambda: content[:at],
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + bytes(len(content[at : at + 40])) + content[at + 40 :],
        lambda: b"[" * 100_000 + content,
        lambda: rng.randrange(2**64).to_bytes(8, "little") + content[8:],
        lambda: b"",
    ][rng.randrange(6)]()


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config.json": changed_json,
    "preprocessor_config.json": changed_json,
    WEIGHTS: changed_header,
}


# What must hold.


def try_case(seed: int, sources: dict, folder: Path) -> str:
    """Change one source by the seed and import it: "error" or "model"."""
    rng = random.Random(seed)
    form, name = rng.choice(SOURCES)
    files = dict(sources[form, name])
    for file in rng.sample(sorted(files), rng.choice([1, 1, 1, len(files)])):
        files[file] = CHANGES[file](files[file], rng)
    source, made = folder / f"{seed}", folder / f"{seed}-made"
    source.mkdir()
    for file, content in files.items():
        (source / file).write_bytes(content)
    reader = import_timm if form == "timm" else import_huggingface
    options = {"resolution": rng.choice([8, 16, 32])} if name != "imagegpt" and rng.random() < 0.1 else {}
    message = None
    try:
        reader(source, made, **options)
    except IgptError as e:
        message = str(e)
    if message is not None:
        assert not made.exists()
        assert message
        return "error"
    run = load_model(made)
    json.dumps(run.config, allow_nan=False)
    side = run.config["model"]["resolution"]
    with torch.no_grad():
        if name == "imagegpt":
            out = run.model(torch.zeros(1, side * side, dtype=torch.int64))
        elif run.config["model"].get("n_classes"):
            out = run.model(torch.zeros(1, 3, side, side))
        else:
            out = run.model.features(torch.zeros(1, 3, side, side), [0])[0]
    assert len(out) == 1
    return "model"


def run_cases(seeds: range, sources: dict, folder: Path) -> dict[str, int]:
    def too_long(*_):
        raise TimeoutError(f"longer than {SECONDS} s")

    counts = {"error": 0, "model": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, too_long)
    try:
        for seed in seeds:
            signal.alarm(SECONDS)
            try:
                outcome = try_case(seed, sources, folder)
            except Exception as e:
                raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e
            counts[outcome] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < BYTES, f"memory grew by {grown:,} bytes"
    return counts


def test_unchanged_sources_are_models(sources, tmp_path):
    for (form, name), files in sources.items():
        folder = tmp_path / f"{form}-{name}"
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        (import_timm if form == "timm" else import_huggingface)(folder, tmp_path / f"{form}-{name}-made")


def test_damaged_files_are_refused_or_make_models(sources, tmp_path):
    """As many seeds as 6 s take; each case depends on its seed alone."""
    end, seed, counts = time.monotonic() + 6, 0, {"error": 0, "model": 0}
    while time.monotonic() < end and seed < 2000:
        for outcome, n in run_cases(range(seed, seed + 20), sources, tmp_path).items():
            counts[outcome] += n
        seed += 20
    assert counts["error"] > counts["model"] > 0


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_make_models(sources, tmp_path):
    run_cases(range(10_000, 30_000), sources, tmp_path)
