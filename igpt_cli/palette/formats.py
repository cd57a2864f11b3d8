"""Palette files, ours and others', recognised by content.

Colours range over -1..1 (OpenAI, Hugging Face), 0..1 or 0..255. If the values fit more than one range, the file is
refused, and the user states the range with `--scale`.
"""

from __future__ import annotations

import lzma
import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.documents import numbers, parse_json, short, write_json
from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.files import check_output, replacing, require_file
from igpt_cli.hdf5 import kind_of, open_hdf5
from igpt_cli.palette.palette import MAX_COLOURS, Palette
from igpt_cli.workspace import BUILTIN, LATEST, resolve_run

SCALES = ("-1..1", "0..1", "0..255")

#: The settings of a Hugging Face image processor, without clusters and size.
HUGGING_FACE = {
    "image_processor_type": "ImageGPTImageProcessor",
    **dict.fromkeys(("do_color_quantize", "do_normalize", "do_rescale", "do_resize"), True),
    **{key: [0.5, 0.5, 0.5] for key in ("image_mean", "image_std")},
    "resample": 2,
    "rescale_factor": 1 / 255,
}
#: The palette in a model directory: the first of these that exists.
IN_FOLDER = ("palette.npz", "preprocessor_config.json")
#: What NumPy raises for a damaged or malicious header of an array.
ARRAY_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, EOFError, OSError, MemoryError, ArithmeticError, SyntaxError),
    *(RecursionError, tokenize.TokenError),
)
#: Bytes of the largest palette file; 65,536 colours with counts take 2 MB, as JSON 6 MB.
LARGEST = 64 * 2**20


def read_palette(path: str | os.PathLike, scale: str | None = None) -> Palette:
    """The implementation of `Palette.load`."""
    if scale is not None and scale not in SCALES:
        raise InputError(f"scale {scale!r} is not known; the scales are {', '.join(SCALES)}")
    path = _inside_folder(path)
    with open(require_file(path, "a palette"), "rb") as file:
        head = file.read(8)
    try:
        if head.startswith(b"PK"):
            palette = _from_npz(path)
        elif head.startswith(b"\x89HDF"):
            palette = _from_tokens(path)
        elif head.startswith(b"\x93NUMPY"):
            return _foreign(path, _read_npy(path), scale, "npy")
        elif head.lstrip()[:1] == b"{":
            return _foreign(path, _read_clusters(path), scale, "preprocessor_config.json")
        else:
            raise FormatError(f"it is {kind_of(path)}, which holds no palette")
    except FormatError as e:
        raise FormatError(str(e) if str(e).startswith(str(path)) else f"{path}: {e}") from e
    if scale not in (None, "0..255"):
        raise InputError(f"{path}: an igpt file holds colours in 0..255; --scale {scale} does not apply")
    return palette


def write_palette(palette: Palette, path: str | os.PathLike, force: bool = False) -> Path:
    """Write a palette in the format of the suffix.

    `*.npz` is ours; `*.npy` is OpenAI's, (V, 3) in [-1, 1]; `*.json` is Hugging Face's preprocessor_config.json. Both
    are float64, so that reading them gives the same palette and hash.

    Raises:
        OutputError: another suffix, an existing file without `force`, or the place cannot be written.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return palette.save(path, force)
    if path.suffix == ".npy":
        check_output(path, force)
        with replacing(path) as part, open(part, "wb") as file:
            np.save(file, _centered(palette))
    elif path.suffix == ".json":
        check_output(path, force)
        write_json(preprocessor_config(palette), path)
    else:
        raise OutputError(
            f"{path}: the form is taken from the name, and {path.suffix or 'no suffix'} is none of: .npz (igpt), "
            ".npy (OpenAI), .json (Hugging Face's preprocessor_config.json)"
        )
    return path


def preprocessor_config(palette: Palette, resolution: int = 32) -> dict[str, Any]:
    """Hugging Face's preprocessor_config.json for images with `resolution` pixels a side."""
    size = {"height": resolution, "width": resolution}
    return {"clusters": _centered(palette).tolist(), **HUGGING_FACE, "size": size}


def names_in(path: str | os.PathLike) -> set[str]:
    """The names of the arrays in an .npz file; none for another file."""
    if not os.path.isfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return set()


def read_arrays(path: Path, largest: int, *, what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, at most `largest` bytes, without unpickling.

    Raises:
        FormatError: too large, cut off, damaged, or no .npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > largest:
                raise FormatError(f"{path} unpacks to {size:,} bytes, more than {what} can have")
            if any(member.flag_bits & 1 for member in archive.infolist()):
                raise FormatError(f"{path} is encrypted; {what} was expected")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FormatError:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, *ARRAY_ERRORS) as e:
        raise FormatError(f"{path} is damaged or cut off, or holds Python objects ({e}); {what} was expected") from e
    if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise FormatError(f"{path} is {kind_of(path)} with {', '.join(other[:3])}; {what} was expected")
    return arrays


def read_meta(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON object in the array `meta`. Raises FormatError: it is no JSON object."""
    meta = arrays.get("meta")
    if meta is None or meta.ndim or meta.dtype.kind != "U":
        raise FormatError(f"{path}: `meta` is not a JSON object")
    return parse_json(str(meta[()]), f"{path}: `meta`", "a JSON object")


def _centered(palette: Palette) -> np.ndarray:
    """The colours in -1..1, (V, 3) float64."""
    return palette.centers.astype(np.float64) / 127.5 - 1


def _inside_folder(path: str | os.PathLike) -> Path:
    """The file to read: `path`, or the palette in that model directory."""
    text = os.fspath(path)
    if text.startswith(BUILTIN) or Path(text) == LATEST or (text == "latest" and not os.path.exists(text)):
        path = resolve_run(text)
    path = Path(path)
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise InputError(f"the folder {path} holds no palette: neither {' nor '.join(IN_FOLDER)} is in it")


def _from_npz(path: Path) -> Palette:
    arrays = read_arrays(path, LARGEST, what="a palette")
    if {"colours", "weights"} <= arrays.keys():
        raise FormatError(f"it holds colour counts; make a palette of them with `igpt palette fit {path} -o PALETTE`")
    if missing := {"centers", "counts", "meta"} - arrays.keys():
        raise FormatError(f"it lacks {', '.join(sorted(missing))}; it is not a palette that igpt wrote")
    return Palette(arrays["centers"], arrays["counts"], read_meta(path, arrays))


def _from_tokens(path: Path) -> Palette:
    with open_hdf5(path) as file:
        colours = file.get("palette")
        if getattr(colours, "ndim", 0) != 2 or len(colours) > MAX_COLOURS:
            raise FormatError("it is an HDF5 file without a /palette of (V, 3) colours")
        palette = Palette(colours[:], None, {"imported": {"from": str(path), "form": "tokens", "scale": "0..255"}})
        if palette.sha256 != (stated := str(file.attrs.get("palette_sha256"))):
            stated = f"the attribute palette_sha256 says {stated[:12]}..."
            raise FormatError(f"/palette was changed: its SHA-256 is {palette.sha256[:12]}..., {stated}")
        return palette


def _read_npy(path: Path) -> np.ndarray:
    try:
        # Mapped, so that nothing is allocated for a header that declares more than the file holds.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as e:
        raise FormatError(f"it is damaged or cut off, or holds Python objects ({e})") from e
    if array.nbytes > LARGEST:
        raise FormatError(f"it holds {array.nbytes:,} bytes, more than a palette can have")
    return np.array(array)


def _read_clusters(path: Path) -> np.ndarray:
    if path.stat().st_size > LARGEST:
        raise FormatError(f"it has {path.stat().st_size:,} bytes, more than a palette can have")
    config = parse_json(path.read_bytes(), str(path), "the preprocessor_config.json of an iGPT model")
    if not isinstance(config.get("clusters"), list):
        raise FormatError("it is JSON without a list `clusters`, so not the preprocessor_config.json of an iGPT model")
    for key in ("image_mean", "image_std"):
        value = config.get(key)
        if value not in (None, 0.5, [0.5, 0.5, 0.5]):
            raise FormatError(f"its {key} is {short(value)}; clusters are in -1..1 only when it is 0.5")
    for i, colour in enumerate(config["clusters"]):
        if not numbers(colour, 3):
            problem = "`clusters` is not a list of colours of three numbers each"
            raise FormatError(f"{problem}: number {i} is {short(colour)}")
    return np.array(config["clusters"], np.float64).reshape(-1, 3)


def _foreign(path: Path, values: np.ndarray, scale: str | None, form: str) -> Palette:
    if values.dtype.kind not in "fiu" or values.ndim != 2 or values.shape[1] != 3:
        raise FormatError(f"a palette is (V, 3) numbers; this holds {values.dtype} of shape {values.shape}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise FormatError("it holds values that are not finite")
    recognised = scale is None
    scale = _recognised_scale(path, values, form) if scale is None else scale
    low, high = (float(end) for end in scale.split(".."))
    if values.min(initial=low) < low or values.max(initial=high) > high:
        raise FormatError(f"its values go from {values.min():g} to {values.max():g}, outside the scale {scale}")
    centers = np.clip((values - low) * (255 / (high - low)), 0, 255)
    imported = {"from": str(path), "form": form, "scale": scale, "recognised": recognised}
    return Palette(centers, None, {"imported": imported})


def _recognised_scale(path: Path, values: np.ndarray, form: str) -> str:
    """The only scale that the values fit. Raises FormatError: they fit several, or none."""
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    say = f"say which it is: igpt palette convert {path} OUT.npz --scale {'|'.join(SCALES)}"
    if -1 <= low < 0 and high <= 1:
        return "-1..1"
    if low >= 0 and 1 < high <= 255 and form == "npy":
        return "0..255"
    if low >= 0 and high <= 1:
        raise FormatError(f"its values go from {low:g} to {high:g}, which fits more than one scale; {say}")
    if low >= 0 and high <= 255:
        raise FormatError(f"its values go from {low:g} to {high:g}, where this kind of file has -1..1; {say}")
    raise FormatError(f"its values go from {low:g} to {high:g}, which fits no scale of {', '.join(SCALES)}")
