"""Operations on pixels, each against Pillow's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from igpt_cli.training import augment as pixels

FILL = (124, 116, 104)


def images(n=6, height=17, width=23, seed=0):
    """Smooth and noisy images, one of a single colour and one of two values."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = [np.stack([120 + 100 * np.sin(x / (3 + c) + i) * np.cos(y / (4 + c)) for c in range(3)]) for i in range(2)]
    noisy = rng.integers(0, 256, (n - 4, 3, height, width))
    narrow = rng.integers(90, 140, (1, 3, height, width))
    flat = np.broadcast_to(np.array([10, 200, 255])[:, None, None], (3, height, width))
    return torch.from_numpy(np.concatenate([smooth, noisy, narrow, flat[None]]).astype(np.uint8))


def as_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_pillow(batch, operation):
    """operation(image, i) -> image, for each image of a batch."""
    made = [np.asarray(operation(as_pillow(image), i)).transpose(2, 0, 1) for i, image in enumerate(batch)]
    return np.stack(made).astype(int)


def differ(found, expected):
    assert found.dtype == torch.uint8
    return np.abs(found.numpy().astype(int) - expected)


STRENGTHS = torch.tensor([0.1, 0.55, 1.0, 1.3, 1.9, 0.0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pixels.brightness, ImageEnhance.Brightness),
        (pixels.contrast, ImageEnhance.Contrast),
        (pixels.colour, ImageEnhance.Color),
        (pixels.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_those_of_pillow(ours, theirs):
    batch = images()
    expected = by_pillow(batch, lambda image, i: theirs(image).enhance(STRENGTHS[i].item()))
    assert differ(ours(batch, STRENGTHS), expected).max() <= 1
    assert (ours(batch, torch.ones(6)) == batch).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pixels.autocontrast, ImageOps.autocontrast),
        (pixels.equalize, ImageOps.equalize),
        (pixels.invert, ImageOps.invert),
    ],
)
@pytest.mark.parametrize("side", [(17, 23), (4, 4), (48, 48)])
def test_whole_image_operations_are_those_of_pillow(ours, theirs, side):
    batch = images(height=side[0], width=side[1])
    assert differ(ours(batch), by_pillow(batch, lambda image, i: theirs(image))).max() == 0


def test_posterize_and_solarize_are_those_of_pillow():
    batch = images()
    bits, limits = torch.tensor([1, 2, 3, 4, 7, 8]), torch.tensor([0, 26, 128, 200, 255, 256])
    found = pixels.posterize(batch, bits)
    assert differ(found, by_pillow(batch, lambda image, i: ImageOps.posterize(image, bits[i].item()))).max() == 0
    found = pixels.solarize(batch, limits)
    assert differ(found, by_pillow(batch, lambda image, i: ImageOps.solarize(image, limits[i].item()))).max() == 0
    x, added = batch.numpy().astype(int), limits.numpy()[:, None, None, None]
    expected = np.where(x < 128, np.minimum(x + added, 255), x)
    assert differ(pixels.solarize_add(batch, limits), expected).max() == 0


GEOMETRY = {
    "rotate": (
        lambda s: pixels.rotation(s, 17, 23),
        lambda image, s: image.rotate(s, Image.BILINEAR, fillcolor=FILL),
        [0.0, 30.0, -27.0, 90.0, 5.5, 180.0],
    ),
    "shear-x": (
        lambda s: pixels.shear(s, torch.zeros(6)),
        lambda image, s: image.transform(image.size, Image.AFFINE, (1, s, 0, 0, 1, 0), Image.BILINEAR, fillcolor=FILL),
        [0.0, 0.3, -0.3, 0.1, -0.27, 0.05],
    ),
    "shear-y": (
        lambda s: pixels.shear(torch.zeros(6), s),
        lambda image, s: image.transform(image.size, Image.AFFINE, (1, 0, 0, s, 1, 0), Image.BILINEAR, fillcolor=FILL),
        [0.0, 0.3, -0.3, 0.1, -0.27, 0.05],
    ),
    "translate-x": (
        lambda s: pixels.translation(s, torch.zeros(6)),
        lambda image, s: image.transform(image.size, Image.AFFINE, (1, 0, s, 0, 1, 0), Image.BILINEAR, fillcolor=FILL),
        [0.0, 3.0, -4.0, 2.5, -9.3, 30.0],
    ),
    "translate-y": (
        lambda s: pixels.translation(torch.zeros(6), s),
        lambda image, s: image.transform(image.size, Image.AFFINE, (1, 0, 0, 0, 1, s), Image.BILINEAR, fillcolor=FILL),
        [0.0, 3.0, -4.0, 2.5, -6.3, 30.0],
    ),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_that_of_pillow(name):
    matrix, theirs, strengths = GEOMETRY[name]
    batch = images()
    found = pixels.affine(batch, matrix(torch.tensor(strengths)), FILL)
    expected = by_pillow(batch, lambda image, i: theirs(image, strengths[i]))
    # A point that falls on the very edge is inside or outside by rounding.
    assert (differ(found, expected) > 1).mean() < 0.004
    assert (found[0] == batch[0]).all()


def test_resized_crops_are_those_of_pillow():
    batch = images(height=24, width=24)
    top, left = torch.tensor([0, 3, 10, 0, 5, 23]), torch.tensor([0, 7, 2, 11, 0, 4])
    height, width = torch.tensor([24, 9, 14, 1, 19, 1]), torch.tensor([24, 17, 5, 13, 2, 20])

    def crop(image, i):
        t, s, h, w = (v[i].item() for v in (top, left, height, width))
        return image.crop((s, t, s + w, t + h)).resize((24, 24), Image.BICUBIC)

    found = pixels.resized_crop(batch, top, left, height, width)
    assert differ(found, by_pillow(batch, crop)).max() <= 1
    assert (found[0] == batch[0]).all()
