"""Prepare an image as R x R pixels.

Chen et al. 2020, section 3.1: for evaluation, resize the short side to 224, crop the centre 224 x 224 and resize it to
R x R; for training, resize the short side to a random length in 256..384 and crop a random 224 x 224. Neither the paper
nor OpenAI's code states a filter. Ours is Pillow's bicubic at every step: it is antialiased, keeps more contrast at
32 x 32 than a box or a triangle, and rings less than Lanczos; one step or two, full or reduced decoding agree to about
50 dB, with a box only to 35.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.decode import BadImageError, Box, decode, load_rgb

__all__ = ["BadImageError", "Preparation", "Preprocess", "load_rgb", "prepare", "prepare_views"]

#: The paper's crop, and the range of its random short sides, in pixels.
CROP = 224
SHORTEST, LONGEST = 256, 384
#: A JPEG is decoded at a reduced scale only if at least this many pixels a side remain for each one of the result, so
#: from 16 R on: 97% of the tokens are those of full decoding (56 dB), in half the time; with 2 pixels, 86% (45 dB).
OVERSAMPLING = 8
#: Of a larger resized image, in pixels, only the crop is made, which may differ by rounding.
MOST_PIXELS = 2**24

#: A file, encoded bytes, or pixels (H, W, 3) uint8.
Data = Path | bytes | np.ndarray

FILTER = Image.Resampling.BICUBIC
#: The filters and the largest side of a model's own preparation.
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LARGEST = 1024


@dataclass(frozen=True)
class Preprocess:
    """How images become R x R.

    Attributes:
        resolution: R in pixels, 1..224.
        views: 0 for the centre crop (evaluation); K > 0 for K random crops of each image (training).
        seed: of the random crops.
        exact_decode: decode large JPEGs in full instead of at a reduced scale.
    """

    resolution: int = 32
    views: int = 0
    seed: int = 0
    exact_decode: bool = False

    def __post_init__(self):
        if not 1 <= self.resolution <= CROP:
            raise InputError(f"resolution {self.resolution} is outside 1..{CROP}; the usual ones are 32, 48 and 64")
        if self.views < 0 or self.seed < 0:
            raise InputError(f"views ({self.views}) and seed ({self.seed}) must not be negative")

    def to_dict(self) -> dict[str, Any]:
        """Everything that determines the pixels, for JSON: the settings, the steps, the filter, Pillow's version."""
        return {
            **asdict(self),
            "crop": CROP,
            "short_side": [SHORTEST, LONGEST] if self.views else CROP,
            "filter": "bicubic",
            "oversampling": OVERSAMPLING,
            "pillow": PIL.__version__,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Preprocess:
        """The settings in the result of `to_dict`, possibly of another Pillow.

        Raises:
            FormatError: a setting is missing or has another type.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = stored.get(field.name) if isinstance(stored, dict) else None
            if type(value) is not type(field.default):
                raise FormatError(f"the recorded preparation of the images has no valid {field.name!r}: {value!r}")
            values[field.name] = value
        return cls(**values)


@dataclass(frozen=True)
class Preparation(Preprocess):
    """The preparation of an imported model, R = 1..1024 pixels, without random views.

    The short side is resized to floor(R / crop), the long one in proportion, rounded down, and the centre R x R is
    cropped: timm's and torchvision's steps. JPEGs are decoded in full. Only the crop is resized if the resized image
    would have more than `MOST_PIXELS`.

    Attributes:
        crop: the part of the short side in the crop, such as 0.875; None squeezes the whole image to R x R.
        filter: Pillow's, one of `FILTERS`.
    """

    crop: float | None = 1.0
    filter: str = "bicubic"

    def __post_init__(self):
        if not 1 <= self.resolution <= LARGEST:
            raise InputError(f"resolution {self.resolution} is outside 1..{LARGEST}")
        if self.crop is not None and not (isinstance(self.crop, (int, float)) and 0.1 <= self.crop <= 1):
            raise InputError(f"crop is {self.crop!r}, the part of the short side that is kept: 0.1 to 1")
        if self.filter not in FILTERS:
            raise InputError(f"filter is {self.filter!r}, expected one of {', '.join(FILTERS)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings and Pillow's version, for JSON."""
        return {**asdict(self), "pillow": PIL.__version__}

    def apply(self, image: Image.Image) -> np.ndarray:
        """An RGB image as (R, R, 3) uint8."""
        R, (width, height) = self.resolution, image.size
        method = Image.Resampling[self.filter.upper()]
        if self.crop is None:
            if R * height > MOST_PIXELS:  # Pillow resizes the width first
                image = image.resize((width, R), method)
            return np.asarray(image.resize((R, R), method))
        short, least = int(R / self.crop), min(width, height)
        across, down = short * width // least, short * height // least
        left, top = round((across - R) / 2), round((down - R) / 2)
        box = (left, top, left + R, top + R)
        if across * down > MOST_PIXELS:
            x, y = width / across, height / down
            return np.asarray(image.resize((R, R), method, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)))
        return np.asarray(image.resize((across, down), method).crop(box))


def prepare(data: Data, preprocess: Preprocess, name: str, view: int = 0) -> np.ndarray:
    """View 0..K-1 of an image, or its centre crop without views, as (R, R, 3) uint8; see `prepare_views`."""
    return _prepare(data, preprocess, name, [view])[0]


def prepare_views(data: Data, preprocess: Preprocess, name: str) -> np.ndarray:
    """All K views of an image, decoded once, as (K, R, R, 3) uint8; with `views=0` the centre crop, K = 1.

    An image that is R x R already is used as it is, K times. Others are cropped as in the paper (`crop_box`); a crop of
    at least 224 pixels in the decoded image is resized to 224 x 224 and then to R x R, a smaller one directly.

    Args:
        data: a file, encoded bytes, or pixels (H, W, 3) uint8.
        preprocess: the settings.
        name: the image's name in its source; with the seed and the view's number, it determines the random crops.

    Raises:
        BadImageError: the image cannot be read.
    """
    return np.stack(_prepare(data, preprocess, name, range(max(1, preprocess.views))))


def _prepare(data: Data, preprocess: Preprocess, name: str, views: Iterable[int]) -> list[np.ndarray]:
    """Each of the views as (R, R, 3) uint8; a MemoryError names the image."""
    try:
        return _prepared(data, preprocess, name, views)
    except MemoryError as e:
        raise MemoryError(f"the image {name} does not fit") from e


def _prepared(data: Data, preprocess: Preprocess, name: str, views: Iterable[int]) -> list[np.ndarray]:
    R = preprocess.resolution
    if isinstance(preprocess, Preparation):
        return [preprocess.apply(decode(data, None)[0]) for _ in views]
    if isinstance(data, np.ndarray) and data.shape == (R, R, 3) and data.dtype == np.uint8:
        return [data for _ in views]
    # Enough for the smallest crop possible, so that the scale does not depend on the requested views.
    length = LONGEST if preprocess.views else CROP
    least = -(-OVERSAMPLING * R * length // CROP)
    image, picture = decode(data, None if preprocess.exact_decode else least)
    if image.size == (R, R) and picture == (0, 0, R, R):
        return [np.asarray(image) for _ in views]
    out = []
    for view in views:
        step, box = image, crop_box(picture, random_draws(preprocess.seed, name, view) if preprocess.views else None)
        if box[2] - box[0] >= CROP:
            step, box = image.resize((CROP, CROP), FILTER, box), (0, 0, CROP, CROP)
        out.append(np.asarray(step.resize((R, R), FILTER, box)))
    return out


def random_draws(seed: int, name: str, view: int) -> tuple[int, float, float]:
    """The random short side of a view in 256..384, and its crop's place across and down in [0, 1): a hash of the
    arguments, so the same in every process and with every release of any library."""
    digest = hashlib.blake2b(f"{seed}\0{view}\0{name}".encode("utf-8", "surrogateescape"), digest_size=24).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "little") >> 11 for i in (0, 8, 16))  # 53 bits: exact as a float
    return SHORTEST + a * (LONGEST - SHORTEST + 1) // 2**53, b / 2**53, c / 2**53


def crop_box(picture: Box, draws: tuple[int, float, float] | None) -> Box:
    """The square to crop, in pixels of the decoded image, of which `picture` is the part that the picture fills.

    `draws` are from `random_draws`; None is the centre crop, the largest square in the middle.
    """
    left, top, right, bottom = picture
    width, height = right - left, bottom - top
    short = min(width, height)
    length, across, down = draws or (CROP, 0.5, 0.5)
    side = short * CROP / length
    left += across * (width - side)
    top += down * (height - side)
    return left, top, min(left + side, right), min(top + side, bottom)
