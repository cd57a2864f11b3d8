"""Tensors in foreign files: names, shapes and types before values."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_cli.documents import read_json
from igpt_cli.errors import FormatError, InputError
from igpt_cli.files import require_file

SAFETENSORS, BIN, INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"

#: What weights are written as.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Types of safetensors by their names in torch; others keep their own.
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: What wraps a model puts this into the names of its tensors: DistributedDataParallel, Lightning and detectors before
#: them, torch.compile, FSDP and activation checkpointing anywhere.
WRAPPERS = re.compile(
    r"^(?:(?:module|model|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|(?<=\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
#: Makes a safetensors file of one that torch.save wrote; argparse.Namespace holds the options of many training scripts.
CONVERT = (
    "import argparse, sys, torch, safetensors.torch as s; torch.serialization.add_safe_globals([argparse.Namespace]); "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = next((d[k] for k in ('model', 'state_dict', 'model_state_dict') if k in d), d); "
    "s.save_file({k: v.contiguous().clone() for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is its name in torch; `read` gives it, on the CPU, without checking its values."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def read_text(document: Mapping[str, Any], key: str) -> str | None:
    """What a JSON object has under a key, if it is text."""
    value = document.get(key)
    return value if isinstance(value, str) else None


def open_tensors(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """The weights in a folder of Hugging Face's: one file, or several with an index; safetensors before pickles.

    Returns:
        the file, or the index, and {name: tensor}.

    Raises:
        InputError, FormatError: there are none, they are damaged, or the index and its files disagree.
    """
    for name in (SAFETENSORS, BIN):
        if (folder / name).exists():
            return folder / name, _open(folder / name)
        if (folder / (name + INDEX)).exists():
            return folder / (name + INDEX), _open_all(folder / (name + INDEX))
    raise InputError(
        f"{folder} holds no weights: neither {SAFETENSORS} nor {BIN}, nor an index of several ({SAFETENSORS}{INDEX})"
    )


def _open(file: Path) -> dict[str, Stored]:
    require_file(file, "the model's weights")
    return open_safetensors(file) if file.suffix == ".safetensors" else open_bin(file)


def _open_all(index: Path) -> dict[str, Stored]:
    """The tensors of every file that the index names, which lie in its folder."""
    places = read_json(index, "an index of weights").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index} has no `weight_map` of tensors and files")
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    for name in places.values():
        # A link that lies in the folder is followed: the hub's own cache is made of links.
        plain = isinstance(name, str) and Path(name).name == name and not {"\\", "\0"} & set(name)
        if not plain or Path(name).suffix != suffix:
            raise FormatError(f"{index} names the file {name!r}; only {suffix} files in its folder are read")
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        part = _open(index.parent / name)
        stated = {tensor for tensor, file in places.items() if file == name}
        if other := sorted(stated ^ part.keys()):
            where = "only the index says it is there" if other[0] in stated else "the index does not name it there"
            raise FormatError(f"{index} and {name} disagree about {len(other)} tensors; {other[0]}: {where}")
        found |= part
    return found


def without_wrappers(file: Path, stored: dict[str, Stored], note: Callable[[str], None]) -> dict[str, Stored]:
    """Tensors by their names inside the model, without what DistributedDataParallel, torch.compile and others add.

    Raises:
        FormatError: two tensors then have the same name.
    """
    found: dict[str, Stored] = {}
    stripped: list[str] = []
    for name, tensor in stored.items():
        bare = WRAPPERS.sub("", name)
        if bare in found:
            raise FormatError(f"{file} has {bare} twice, once as {name}; it holds more than one model")
        found[bare] = tensor
        stripped += WRAPPERS.findall(name)
    if stripped:
        note(f"names of tensors: {' and '.join(sorted(set(stripped)))} stripped ({len(stripped)} times)")
    return found


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file.

    Raises:
        FormatError: damaged or cut off, or written by torch.save, with the line that converts it.
    """
    try:
        opened = safe_open(file, "pt")
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: Stored(
                tuple(part.get_shape()), TYPES.get(part.get_dtype(), part.get_dtype()), partial(opened.get_tensor, name)
            )
            for name, part in parts.items()
        }
    except (SafetensorError, OSError) as e:
        if _is_pickle(file):
            made = file.with_name(SAFETENSORS) if file.name == BIN else file.with_suffix(".safetensors")
            paths = " ".join(shlex.quote(str(path)) for path in (file, made))
            raise FormatError(
                f"{file} is a PyTorch checkpoint, and safetensors is read here; convert it: "
                f'python -c "{CONVERT}" {paths}'
            ) from e
        raise FormatError(f"{file} is not a readable safetensors file: {e}") from e


def _is_pickle(file: Path) -> bool:
    """Whether torch.save wrote it, as a zip archive or, before torch 1.6, as pickles one after the other."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        with open(file, "rb") as opened:
            head = opened.read(2)
        return head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def open_bin(file: Path) -> dict[str, Stored]:
    """The tensors of a file that torch.save wrote, read by torch's restricted reader, which makes nothing but tensors.

    Raises:
        FormatError: damaged or cut off, or other than named tensors is in it.
    """
    zipped = zipfile.is_zipfile(file)
    if zipped and _is_compressed(file):
        raise FormatError(f"{file} is compressed, which torch.save does not do and what could unpack to any size")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # a file that is not what it should be fails in any way
        # torch's own words are not passed on: they advise to switch its restrictions off.
        global_name = re.search(r"unsupported global:?\s+(?:GLOBAL\s+)?([\w.]+)", str(e), re.IGNORECASE)
        why = f"it asks for {global_name[1]}, and only tensors are read" if global_name else "it is damaged or cut off"
        raise FormatError(f"{file} is not a readable file of weights: {why}") from e
    if not isinstance(found, dict):
        raise FormatError(f"{file} holds a {type(found).__name__}, expected tensors by name")
    for name, tensor in found.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise FormatError(
                f"{file}: {name!r} is a {type(tensor).__name__}, expected a tensor of numbers with a name"
            )
    return {
        name: Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.detach)
        for name, tensor in found.items()
    }


def _is_compressed(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # damaged; torch.load refuses it
