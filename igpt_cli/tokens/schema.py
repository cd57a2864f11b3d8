"""Names, dtypes and attributes of a token file (docs/formats.md)."""

from __future__ import annotations

from igpt_cli.documents import COUNT, NUMBER, TEXT

FORMAT = "igpt-tokens"
FORMAT_VERSION = 1

PALETTE = "palette"  # (V, 3) float32, 0..255
CLASSES = "classes"  # (C,) utf-8, optional
TOKENS = "tokens"  # (N, R * R) uint16, raster order
LABELS = "labels"  # (N,) int32, -1 = none
NAMES = "names"  # (N,) utf-8
RGB = "rgb"  # (N, R, R, 3) uint8, optional
INDEX = "index"  # (N,) int64, only in a shard: the image's place in its split of the source

TOKEN_DTYPE = "<u2"
LABEL_DTYPE = "<i4"
INDEX_DTYPE = "<i8"
PALETTE_DTYPE = "<f4"
MAX_VOCAB = 2**16
MAX_RESOLUTION = 1024

#: Root attributes that are text; they decide which files can be merged.
TEXT_ATTRIBUTES = ("preprocess", "source", "tool_version", "created", "palette_sha256")

#: Optional root attributes: the options that selected and split the images (`Source.selection`).
SELECTION = {"column": TEXT, "test_part": NUMBER, "test_seed": COUNT}
