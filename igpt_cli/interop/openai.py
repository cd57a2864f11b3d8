"""OpenAI's iGPT checkpoints of TensorFlow 1: import.

Names and shapes are those of `src/model.py` in openai/image-gpt. Shapes: T positions, D width, H heads, K = D / H,
V colours. A matrix there has its input first, but for query, key and value, (H, K, D), whose last axis is the input.
TensorFlow only reads the arrays, without a graph or a session; it is an extra, imported inside `open_checkpoint`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from igpt_cli.errors import FormatError, InputError, MismatchError, OutputError
from igpt_cli.files import check_folder
from igpt_cli.interop.weights import describe_read, differences, refuse
from igpt_cli.model_dir import CONFIG, new_config, write_model
from igpt_cli.palette.palette import Palette

#: Gives the array of a variable.
Read = Callable[[str], np.ndarray]
Shapes = Mapping[str, Sequence[int]]

PALETTE = "kmeans_centers.npy"
#: What an optimizer stores with the variables: Adam's moments and counters, under the names that are in use.
OPTIMIZER = re.compile(r"(?:^|/)(?:adam\w*|beta[12]_power\w*|global_step|_step)(?:/|$)", re.IGNORECASE)
CLASSIFIER = "model/clf/"
_PARTS = re.compile(r"\.(?:index|meta|data-\d{5}-of-\d{5})$")


def import_openai(
    checkpoint: str | Path,
    out: str | Path,
    *,
    palette: str | Path | None = None,
    bert: bool = False,
    force: bool = False,
    note: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Write a model directory from a checkpoint.

    Args:
        checkpoint: what `find_checkpoint` takes.
        out: the model directory to write.
        palette: the model's colours; default kmeans_centers.npy in the folder of the checkpoint.
        bert: the model was trained to predict masked pixels. Only these have no `sos`, so the two must agree.
        force: replace a model directory that is there.
        note: called with what was excluded, in sentences.

    Returns:
        The config.json that was written.

    Raises:
        InputError, FormatError, MismatchError: something is missing, damaged, or does not fit; nothing is written.
        OutputError: something is at `out` already, or the place cannot be written.
    """
    out = check_folder(Path(out), CONFIG, force)
    prefix = find_checkpoint(checkpoint)
    if out.resolve() in prefix.resolve().parents:
        raise OutputError(f"{out} holds {prefix.name}, which is to be read; choose another --out")
    palette = palette or _default_palette(prefix)
    colours = Palette.load(palette)
    shapes, read = open_checkpoint(prefix)
    left_out = sorted(name for name in shapes if OPTIMIZER.search(name) or name.startswith(CLASSIFIER))
    heads = [name for name in left_out if not OPTIMIZER.search(name)]
    if heads:
        note(f"excluded: {', '.join(heads)}, the head of a classifier")
    if len(heads) < len(left_out):
        note(f"excluded: {len(left_out) - len(heads):,} variables of the optimizer")
    shapes = {name: tuple(shape) for name, shape in shapes.items() if name not in left_out}
    model = openai_model(shapes, bert, prefix)
    if model["n_vocab"] != colours.n_vocab:
        raise MismatchError(
            f"{prefix} has {model['n_vocab']} colours and {palette} {colours.n_vocab}; give the palette it was trained "
            f"with, --palette {PALETTE}"
        )
    weights = openai_weights(model, read, prefix)
    step = re.search(r"-(\d+)$", prefix.name)
    imported = {
        "from": str(prefix),
        "form": "openai",
        "step": int(step[1]) if step else None,
        "left_out": heads,
        "palette": str(palette),
        "palette_sha256": colours.sha256,
        "n_parameters": sum(w.numel() for w in weights.values()),
    }
    config = new_config(model, imported=imported)
    write_model(out, weights, colours, config, force)
    return config


def openai_model(shapes: Shapes, bert: bool, where: str | Path = "the checkpoint") -> dict[str, Any]:
    """The part `model` of config.json, recognised from the shapes of the variables, which are then compared with it.

    Raises:
        MismatchError: `bert`, and there is a `sos`; or not, and there is none.
        FormatError: a variable is missing, too many, or of another shape; the first of them are named.
    """
    H, _, D = _shape(shapes, "model/h0/attn/q_proj", 3, where)
    T, _ = _shape(shapes, "model/wpe", 2, where)
    V, _ = _shape(shapes, "model/wte", 2, where)
    if math.isqrt(T) ** 2 != T:
        raise FormatError(f"{where} has {T:,} positions (model/wpe), which is no square R * R of an image")
    if bert and "model/sos" in shapes:
        raise MismatchError(f"{where} has model/sos, so it predicts the next pixel; leave --bert out")
    if not bert and "model/sos" not in shapes:
        raise MismatchError(f"{where} has no model/sos, which only BERT models lack; if it is one, give --bert")
    sizes = {
        # Counted, not the highest: a gap then shows as variables that are missing and others that are too many.
        "n_layer": len({found[1] for name in shapes if (found := re.match(r"model/h(\d+)/", name))}),
        "n_head": H,
        "n_embd": D,
        "resolution": math.isqrt(T),
        "n_vocab": V,
        "objective": "bert" if bert else "ar",
    }
    model = describe_read(where, "igpt", sizes)
    refuse(where, differences(shapes, {name: t.shape for t in _tensors(model) for name in t.variables}))
    return model


def openai_weights(model: dict[str, Any], read: Read, where: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """The state dict of the model that `model` describes, in float32, from the variables that `read` gives.

    Raises:
        FormatError: a variable holds something else than finite floating-point numbers; the first of them are named.
    """
    weights, problems = {}, []
    for tensor in _tensors(model):
        arrays = [np.asarray(read(name)) for name in tensor.variables]
        for name, array in zip(tensor.variables, arrays):
            if array.dtype.kind not in "fV":  # V: bfloat16, which NumPy does not know by itself
                problems.append(f"{name} holds {array.dtype}, expected floating-point numbers")
            elif not np.isfinite(array.astype(np.float32, copy=False)).all():
                problems.append(f"{name} holds NaN or infinity")
        if not problems:
            made = tensor.arranged([a.astype(np.float32, copy=False) for a in arrays])
            weights[tensor.key] = torch.from_numpy(np.ascontiguousarray(made))
    refuse(where, problems)
    return weights


class _Tensor(NamedTuple):
    """A tensor of ours, the variables that it is made of (all of one shape), and how."""

    key: str
    variables: tuple[str, ...]
    shape: tuple[int, ...]
    arranged: Callable[[list[np.ndarray]], np.ndarray]


def _as_is(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0]


def _rows(arrays: list[np.ndarray]) -> np.ndarray:
    """(H, K, D) each, the last axis the input -> (3 H K, D), one below the other."""
    return np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays])


def _transposed(arrays: list[np.ndarray]) -> np.ndarray:
    """(..., D), the last axis the output -> (D, ...)."""
    return arrays[0].reshape(-1, arrays[0].shape[-1]).T


def _tensors(model: Mapping[str, Any]) -> Iterator[_Tensor]:
    D, H, T, V = model["n_embd"], model["n_head"], model["resolution"] ** 2, model["n_vocab"]
    heads = (H, D // H, D)
    yield _Tensor("wte.weight", ("model/wte",), (V, D), _as_is)
    yield _Tensor("wpe", ("model/wpe",), (T, D), _as_is)
    if model["objective"] == "ar":
        yield _Tensor("sos", ("model/sos",), (D,), _as_is)
    for i in range(model["n_layer"]):
        ours, theirs = f"h.{i}", f"model/h{i}"
        qkv = tuple(f"{theirs}/attn/{x}_proj" for x in "qkv")
        yield _Tensor(f"{ours}.ln_1.g", (f"{theirs}/ln_1/g",), (D,), _as_is)
        yield _Tensor(f"{ours}.attn.c_attn.weight", qkv, heads, _rows)
        yield _Tensor(f"{ours}.attn.c_proj.weight", (f"{theirs}/attn/c_proj",), heads, _transposed)
        yield _Tensor(f"{ours}.ln_2.g", (f"{theirs}/ln_2/g",), (D,), _as_is)
        yield _Tensor(f"{ours}.mlp.c_fc.weight", (f"{theirs}/mlp/c_fc/w",), (D, 4 * D), _transposed)
        yield _Tensor(f"{ours}.mlp.c_proj.weight", (f"{theirs}/mlp/c_proj/w",), (4 * D, D), _transposed)
    yield _Tensor("ln_f.g", ("model/ln_f/g",), (D,), _as_is)
    yield _Tensor("wtet.weight", ("model/wtet",), (V, D), _as_is)


def _shape(shapes: Shapes, name: str, axes: int, where: str | Path) -> Sequence[int]:
    """The shape of a variable that the sizes are read from."""
    if name not in shapes:
        there = ", ".join(sorted(shapes)[:4]) or "nothing"
        raise FormatError(f"{where} is no iGPT: {name} is missing; of {len(shapes)} variables it holds {there}")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise FormatError(f"{where} is no iGPT: {name} is {tuple(shapes[name])}, expected {axes} axes")
    return shapes[name]


# Files.


def find_checkpoint(path: str | Path) -> Path:
    """The prefix of a checkpoint's files: "model.ckpt-1000000" for model.ckpt-1000000.index and its data files.

    Args:
        path: the prefix itself, one of the files, or a folder with one checkpoint or a file `checkpoint` that names it.

    Raises:
        InputError: it is not there, several are, or some of its files are missing.
    """
    path = Path(path)
    if path.name == "checkpoint" and path.is_file():
        path = path.parent
    prefix = _in_folder(path) if path.is_dir() else path.with_name(_PARTS.sub("", path.name))
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise InputError(
            f"{prefix}.index does not exist; a TensorFlow checkpoint is NAME.index with NAME.data-00000-of-<n>, ..., "
            f"and is named by NAME"
        )
    shard = re.compile(re.escape(prefix.name) + r"\.data-\d{5}-of-(\d{5})")
    shards = {m[0]: m[1] for p in prefix.parent.iterdir() if (m := shard.fullmatch(p.name))}
    if not shards:
        raise InputError(f"{prefix}.index has no data files: {prefix.name}.data-00000-of-<n> is missing")
    gaps = {
        of: [n for i in range(int(of)) if (n := f"{prefix.name}.data-{i:05d}-of-{of}") not in shards]
        for of in set(shards.values())
    }
    of, lacking = min(gaps.items(), key=lambda gap: len(gap[1]))
    if lacking:
        raise InputError(
            f"{len(lacking)} of the {int(of)} data files of {prefix} are missing: {', '.join(lacking[:3])}"
            + ("..." if len(lacking) > 3 else "")
        )
    return prefix


def _in_folder(folder: Path) -> Path:
    """The prefix of the checkpoint in a folder: the one that the file `checkpoint` names, or the only one."""
    names = sorted(p.name.removesuffix(".index") for p in folder.glob("*.index"))
    if (listed := folder / "checkpoint").is_file():
        # The path there is that of the machine that wrote it; only its last part still holds.
        text = listed.read_text(encoding="utf-8", errors="replace")
        named = re.search(r'^model_checkpoint_path: "([^"]+)"', text, re.MULTILINE)
        if named and (name := named[1].replace("\\", "/").rpartition("/")[2]) in names:
            return folder / name
    if len(names) != 1:
        held = f"several checkpoints, {', '.join(names[:5])}; name one of them" if names else "no checkpoint (*.index)"
        raise InputError(f"the folder {folder} holds {held}")
    return folder / names[0]


def _default_palette(prefix: Path) -> Path:
    path = prefix.with_name(PALETTE)
    if not path.exists():
        raise InputError(
            f"no palette was given and none is at {path}; give --palette {PALETTE}, which OpenAI's download.py fetches "
            f"with --clusters: without it nobody knows what the model's tokens look like"
        )
    return path


def open_checkpoint(prefix: Path) -> tuple[Shapes, Read]:
    """The shapes of all variables, and a function that reads one; with TensorFlow.

    Raises:
        InputError: TensorFlow is not installed.
        FormatError: the files are damaged or cut off; also raised by the function.
    """
    # Else it writes to stderr when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as e:
        raise InputError(
            f"{prefix} is a TensorFlow checkpoint, and TensorFlow cannot be imported ({e}); install it with "
            f"pip install 'igpt-cli[openai]'"
        ) from e
    broken = (tf.errors.OpError, LookupError, RuntimeError, ValueError)

    def damaged(e: BaseException) -> FormatError:
        said = (str(e).splitlines() or [type(e).__name__])[0]
        return FormatError(f"{prefix} is damaged or cut off: {said}; fetch its files again")

    def read(name: str) -> np.ndarray:
        try:
            return reader.get_tensor(name)
        except broken as e:
            raise damaged(e) from e

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        return reader.get_variable_to_shape_map(), read
    except broken as e:
        raise damaged(e) from e
