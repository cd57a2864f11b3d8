"""Read CIFAR's pickles without running their code.

Unpickling calls whatever the file names. Here it can name three NumPy functions and one of codecs, each replaced by a
harmless stand-in that accepts only bytes of a known type; any other name is refused before it is called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from igpt_cli.errors import FormatError

#: Element types of CIFAR, and those of downsampled ImageNet, which holds a mean image, too.
TYPES = ("u1", "i1", "i4", "i8", "b1")
FLOATS = ("f4", "f8")


class _DType:
    """Replaces numpy.dtype; of its state, only the byte order is used."""

    def __init__(self, code: Any, *_, types: Sequence[str] = TYPES):
        code = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if code not in types:
            raise FormatError(f"it holds an array of type {code!r}, not of whole numbers")
        self.dtype = np.dtype(code).newbyteorder("<")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Replaces numpy.ndarray while it is built; `value` is the array."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, (bytes, str)):
            raise FormatError("it holds an array of Python objects")
        data = data.encode("latin-1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if columns_first else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Replaces _codecs.encode, by which Python 3 writes bytes in the old protocols."""
    if encoding != "latin1":
        raise FormatError(f"it holds text in the encoding {encoding!r}")
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}


class RestrictedUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler that accepts only `names`, {(module, name): replacement}; `what` is the file, for messages.

    It is the one in Python: the one in C reserves as much memory as a damaged file requests.
    """

    names: Mapping[tuple[str, str], Any] = STAND_INS
    what = "CIFAR file"
    dispatch = pickle._Unpickler.dispatch.copy()  # type: ignore[attr-defined]
    del dispatch[pickle.BYTEARRAY8[0]]  # it reserves memory, too

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise FormatError(f"it asks for {module}.{name}, which no {self.what} needs; it is refused") from None


def load_pickle(data: bytes, floats: bool = False) -> dict[bytes, Any]:
    """The dictionary in a CIFAR pickle: keys are bytes, values are lists, bytes, numbers and arrays.

    Args:
        floats: allow arrays of floating-point numbers, too.

    Raises:
        FormatError: it is no such pickle, broken, or asks for anything but NumPy arrays of whole numbers.
    """
    try:
        unpickler = RestrictedUnpickler(io.BytesIO(data), encoding="bytes")
        if floats:
            unpickler.names = {**STAND_INS, ("numpy", "dtype"): partial(_DType, types=TYPES + FLOATS)}
        found = unpickler.load()
    except FormatError:
        raise
    except Exception as e:  # a broken pickle may raise anything
        raise FormatError(f"it is a broken or truncated pickle ({type(e).__name__}: {e})") from e
    if not isinstance(found, dict):
        raise FormatError(f"it holds a {type(found).__name__}, not a dictionary")
    keyed = {k.encode("utf-8", "replace") if isinstance(k, str) else k: v for k, v in found.items()}
    return {k: v.value if isinstance(v, _Array) else v for k, v in keyed.items()}
