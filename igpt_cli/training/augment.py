"""Augmentation of images in supervised training: crops, flips, RandAugment, erasing, mixup and CutMix on batches.

Each is a function of the images and of numbers drawn for them: an image's by its place in the training stream, a
step's mixture by the step (`tokens.loader.view_draws`, `step_generator`). So a batch is a function of (seed, step), and
an image gets the same view on whichever rank it lies.

The operations on pixels that RandAugment chooses from are Pillow's (ImageOps, ImageEnhance, Image.transform), so that
published recipes mean here what they mean elsewhere; they agree to a unit of 255, the rounding of its fixed-point
arithmetic. They take (B, 3, H, W) uint8 and strengths (B,).

Shapes: B images of R x R, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_cli.tokens.loader import PAD

#: Weights of red, green and blue in 65,536ths: ITU-R 601 luma, as Pillow's mode "L".
LUMA = (19595, 38470, 7471)


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return values.view(-1, 1, 1, 1)


def grey(images: Tensor) -> Tensor:
    """(B, 1, H, W) uint8: the luma."""
    red, green, blue = images.int().unbind(1)
    return ((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 2**15) >> 16).to(torch.uint8).unsqueeze(1)


def blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`other` at factor 0, the images at 1, in between or beyond at others; cut off at 0 and 255."""
    other, f = other.float(), per_image(factor).float()
    return (other + f * (images.float() - other)).clamp(0, 255).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Black at factor 0."""
    return blend(torch.zeros_like(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """The image's mean grey at factor 0."""
    mean = (grey(images).double().mean((1, 2, 3)) + 0.5).floor()
    return blend(per_image(mean).expand(images.shape), images, factor)


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Grey at factor 0."""
    return blend(grey(images).expand(images.shape), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Smoothed at factor 0: a 3x3 mean in which the middle counts 5 times; the border stays as it is."""
    smooth, x = images.clone(), images.float()
    if min(images.shape[-2:]) > 2:
        kernel = torch.ones(3, 1, 3, 3, device=images.device)
        kernel[:, :, 1, 1] = 5
        smooth[..., 1:-1, 1:-1] = (F.conv2d(x, kernel / 13, groups=3) + 0.5).clamp(0, 255).to(torch.uint8)
    return blend(smooth, images, factor)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to 0..255."""
    x = images.double()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    stretched = (x * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Each channel mapped so that all its values occur about as often."""
    B, C, H, W = images.shape
    values = images.reshape(B * C, H * W).long()
    counts = torch.zeros(B * C, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (H * W - last) // 255  # (B * C, 1)
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    mapped = table.gather(1, values)
    return torch.where(step > 0, mapped, values).to(torch.uint8).view(B, C, H, W)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest `bits` of each value stay."""
    kept = 256 - 2 ** (8 - per_image(bits).int())
    return (images.int() & kept).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on inverted."""
    return torch.where(images.int() < per_image(threshold), images, 255 - images)


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Values below 128 raised."""
    raised = (images.int() + per_image(added).int()).clamp(0, 255).to(torch.uint8)
    return torch.where(images < 128, raised, images)


def invert(images: Tensor) -> Tensor:
    """255 - x"""
    return 255 - images


def affine(images: Tensor, matrix: Tensor, fill: tuple[int, int, int]) -> Tensor:
    """What lies at (a x + b y + c, d x + e y + f) comes to (x, y), bilinear; outside the image is `fill`.

    Args:
        matrix: (B, 6), the numbers a to f, in pixels from the upper left corner; pixel centres are at halves.
    """
    B, _, H, W = images.shape
    y, x = torch.meshgrid(
        torch.arange(H, device=images.device) + 0.5, torch.arange(W, device=images.device) + 0.5, indexing="ij"
    )
    a, b, c, d, e, f = (matrix.to(images.device, torch.float32)[:, i].view(B, 1, 1) for i in range(6))
    at_x, at_y = a * x + b * y + c, d * x + e * y + f  # (B, H, W)
    grid = torch.stack([2 * at_x / W - 1, 2 * at_y / H - 1], dim=-1)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((at_x >= 0) & (at_x < W) & (at_y >= 0) & (at_y < H)).unsqueeze(1)
    colours = [torch.full_like(moved[:, i], v) for i, v in enumerate(fill)]
    return torch.where(inside, moved, torch.stack(colours, 1)).round().clamp(0, 255).to(torch.uint8)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """(B, 6) for `affine`: counter-clockwise around the centre."""
    angle = degrees * (math.pi / 180)
    cos, sin, y, x = torch.cos(angle), torch.sin(angle), height / 2, width / 2
    return torch.stack([cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos], dim=1)


def shear(x: Tensor, y: Tensor) -> Tensor:
    """(B, 6) for `affine`: lines moved by x times their distance from the top, columns by y times theirs."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([one, x, zero, y, one, zero], dim=1)


def translation(x: Tensor, y: Tensor) -> Tensor:
    """(B, 6) for `affine`: moved to the left by x and up by y pixels."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([one, zero, x, zero, one, y], dim=1)


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Each image's own box, (B,) whole pixels, resized to the whole image: bicubic, as Pillow's crop and resize."""
    H, W = images.shape[-2:]
    by_row, by_column = _cubic(top, height, H), _cubic(left, width, W)  # (B, H, H), (B, W, W)
    wide = torch.einsum("bcyx,bix->bcyi", images.float(), by_column).round().clamp(0, 255)
    return torch.einsum("bcyi,bjy->bcji", wide, by_row).round().clamp(0, 255).to(torch.uint8)


def _cubic(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size, size): the weight of each old line in each new one, for the `length` lines from `start` on."""
    place = torch.arange(size, device=start.device)
    start, length = start.view(-1, 1, 1).double(), length.view(-1, 1, 1).double()
    scale = length / size  # at most 1, as a box lies in its image: nothing is shrunk
    centre = start + (place.view(1, -1, 1) + 0.5) * scale
    t = (place.view(1, 1, -1) + 0.5 - centre).abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2  # Keys' cubic, a = -1/2
    weight = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    weight = weight * ((place >= start) & (place < start + length))
    return (weight / weight.sum(-1, keepdim=True)).float()


#: Mean and deviation of ImageNet's colours, in 0..1, by which inputs are normalised.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: What geometry leaves open, in 0..255: the mean colour.
FILL = (124, 116, 104)
#: RandAugment applies so many operations, one after the other, each with this probability.
LAYERS, APPLIED = 2, 0.5
#: RandAugment's strength varies by a normal deviate of this deviation; 10 is the most.
DEVIATION, MOST = 0.5, 10.0
#: Boxes that are tried before a crop or an erasure is given up.
TRIES = 10
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
#: Probability of CutMix where there is mixup, too.
SWITCH = 0.5

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, strength in 0..1, sign -1 or 1
#: Where in an image's draws each part has its numbers, and how many those are.
_FRAME, _FLIP, _RAND, _JITTER, _ERASE = 0, 2 * TRIES + 2, 2 * TRIES + 3, 2 * TRIES + 11, 2 * TRIES + 14
DRAWS = _ERASE + 1 + 2 * TRIES + 2


def _moved(matrix: Callable[[Tensor, int], Tensor]) -> Operation:
    def operation(x: Tensor, s: Tensor, sign: Tensor) -> Tensor:
        return affine(x, matrix(s * sign, x.shape[-1]), FILL)

    return operation


def _enhanced(enhance: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda x, s, sign: enhance(x, (1 + 0.9 * s * sign).clamp(min=0.1))


#: RandAugment's operations at a strength of 0..1, so that a larger one always changes more (timm's "inc1" set).
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda x, s, sign: autocontrast(x),
    "equalize": lambda x, s, sign: equalize(x),
    "invert": lambda x, s, sign: invert(x),
    "rotate": _moved(lambda s, side: rotation(30 * s, side, side)),
    "posterize": lambda x, s, sign: posterize(x, 4 - (4 * s).int()),
    "solarize": lambda x, s, sign: solarize(x, 256 - (256 * s).int()),
    "solarize-add": lambda x, s, sign: solarize_add(x, (110 * s).int()),
    "colour": _enhanced(colour),
    "contrast": _enhanced(contrast),
    "brightness": _enhanced(brightness),
    "sharpness": _enhanced(sharpness),
    "shear-x": _moved(lambda s, side: shear(0.3 * s, torch.zeros_like(s))),
    "shear-y": _moved(lambda s, side: shear(torch.zeros_like(s), 0.3 * s)),
    "translate-x": _moved(lambda s, side: translation(0.45 * side * s, torch.zeros_like(s))),
    "translate-y": _moved(lambda s, side: translation(torch.zeros_like(s), 0.45 * side * s)),
}


@dataclass(frozen=True)
class Views:
    """How each image is changed on its own.

    frame: "none", "flip" or "crop-flip", as `tokens.loader` does with tokens; or "resized-crop-flip", which takes a
    random part of the image, of 8 to 100% of its area and an aspect of 3/4 to 4/3, and resizes it (Inception's crop).
    randaugment: magnitude in 0..10; 0 is off. colour_jitter: by which fraction brightness, contrast and colour vary, in
    this order. erasing: probability that a box becomes noise.
    """

    frame: str = "none"
    randaugment: float = 0.0
    colour_jitter: float = 0.0
    erasing: float = 0.0

    def __call__(self, images: Tensor, u: np.ndarray, noise: Callable[[], Tensor]) -> Tensor:
        """
        Args:
            images: (B, 3, R, R) uint8.
            u: (B, DRAWS) in [0, 1), from `view_draws`.
            noise: gives (3, R, R) standard normal numbers, which erased boxes show.

        Returns:
            (B, 3, R, R) float32 in 0..1; erased boxes go beyond.
        """
        images = framed(images, self.frame, u[:, _FRAME:_RAND])
        if self.randaugment:
            images = rand_augment(images, self.randaugment, u[:, _RAND:_JITTER])
        if self.colour_jitter:
            factors = self.colour_jitter * (2 * u[:, _JITTER:_ERASE] - 1) + 1
            for change, factor in zip((brightness, contrast, colour), factors.T):
                images = change(images, _to(images, factor))
        x = images.float() / 255
        if self.erasing:
            x = erased(x, self.erasing, u[:, _ERASE:], noise)
        return x


def framed(images: Tensor, frame: str, u: np.ndarray) -> Tensor:
    """Cropped and mirrored; `u` (B, 2 TRIES + 3), the last for the flip."""
    if frame == "none":
        return images
    R = images.shape[-1]
    if frame == "crop-flip":  # 4 pixels of reflection, as for tokens
        corner = (u[:, :2] * (2 * PAD + 1)).astype(np.int64) - PAD
        line = np.abs(corner[:, :, None] + np.arange(R))
        y, x = np.where(line >= R, 2 * (R - 1) - line, line).transpose(1, 0, 2)  # (B, R) each
        b = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        # The indexed dimensions come first.
        images = images[b, :, _to(images, y)[:, :, None], _to(images, x)[:, None, :]].permute(0, 3, 1, 2).contiguous()
    elif frame == "resized-crop-flip":
        box = boxes(R, CROP_AREA, CROP_ASPECT, u[:, :-1])
        box[box[:, 2] == 0] = (0, 0, R, R)
        images = resized_crop(images, *(_to(images, side) for side in box.T))
    mirrored = _to(images, u[:, -1] < 0.5)
    return torch.where(per_image(mirrored), images.flip(-1), images)


def boxes(side: int, area: tuple[float, float], aspect: tuple[float, float], u: np.ndarray) -> np.ndarray:
    """A box in each image: (B, 4) int64 top, left, height, width; height and width are 0 where no try fitted.

    Args:
        side: R of the images.
        area: of the box, from and to, as a part of the image's.
        aspect: width / height, from and to; its logarithm is uniform.
        u: (B, 2 TRIES + 2) in [0, 1): two numbers a try, then two for the place.
    """
    areas = side**2 * (area[0] + (area[1] - area[0]) * u[:, 0 : 2 * TRIES : 2])  # (B, TRIES)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    aspects = np.exp(low + (high - low) * u[:, 1 : 2 * TRIES : 2])
    sizes = np.stack([np.sqrt(areas / aspects), np.sqrt(areas * aspects)]).round().astype(np.int64)  # height, width
    fits = np.all((sizes > 0) & (sizes <= side), axis=0)
    first = fits.argmax(1)
    height, width = np.where(fits.any(1), sizes[:, np.arange(len(u)), first], 0)
    top, left = (u[:, 2 * TRIES :].T * (side - np.stack([height, width]) + 1)).astype(np.int64)
    return np.stack([top, left, height, width], axis=1)


def rand_augment(images: Tensor, strength: float, u: np.ndarray) -> Tensor:
    """Operations drawn for each image; `u` (B, 4 LAYERS): which, whether, how strong, which way, for each layer."""
    images = images.clone()
    for which, whether, how, way in u.reshape(len(u), LAYERS, 4).transpose(1, 2, 0):
        chosen = (which * len(OPERATIONS)).astype(np.int64)
        s = (strength + DEVIATION * _normal(how)).clip(0, MOST) / MOST
        for i, operation in enumerate(OPERATIONS.values()):
            mine = np.flatnonzero((chosen == i) & (whether < APPLIED))
            if len(mine):
                at, sign = _to(images, mine), np.where(way[mine] < 0.5, -1.0, 1.0)
                images[at] = operation(images[at], _to(images, s[mine]), _to(images, sign))
    return images


def erased(x: Tensor, probability: float, u: np.ndarray, noise: Callable[[], Tensor]) -> Tensor:
    """A box of noise in some images (B, 3, R, R); `u` (B, 2 TRIES + 3), the first says whether. The noise has the
    colours' own mean and deviation, so that it is standard normal once they are normalised."""
    R = x.shape[-1]
    top, left, height, width = boxes(R, ERASED_AREA, ERASED_ASPECT, u[:, 1:]).T[:, :, None]
    height = np.where(u[:, :1] < probability, height, 0)
    line = np.arange(R)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)  # (B, R) each
    box = _to(x, rows)[:, None, :, None] & _to(x, columns)[:, None, None, :]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return torch.where(box, (noise() * std + mean).to(x.device, non_blocking=True), x)


@dataclass(frozen=True)
class Mixture:
    """How the images of a step are mixed with their neighbours: one draw for all of them.

    share: of the image itself; 1 mixes nothing. box: (top, bottom, left, right) of what comes from the neighbour
    (CutMix); None mixes every pixel (mixup).
    """

    share: float = 1.0
    box: tuple[int, int, int, int] | None = None

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, R, R) images and (B, C) targets, mixed; images 0 and 1, 2 and 3, ... are neighbours, so B is even."""
        if self.share == 1 and self.box is None:
            return x, targets
        if len(x) % 2:
            raise ValueError(f"{len(x)} images have not each a neighbour to be mixed with; an even number is needed")
        other, share = x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x), self.share
        if self.box is None:
            x = share * x + (1 - share) * other
        else:
            top, bottom, left, right = self.box
            x = x.clone()
            x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return x, share * targets + (1 - share) * targets.view(-1, 2, targets.shape[1]).flip(1).view_as(targets)


def drawn_mixture(side: int, mixup: float, cutmix: float, generator: np.random.Generator) -> Mixture:
    """A step's mixture. The share is Beta(a, a), where a is `mixup` or `cutmix`; 0 is off, of both one is drawn.

    CutMix's box has (1 - share) of the area, rounded down to whole pixels a side, and its middle anywhere; the share is
    then what the part of the box inside the image leaves.
    """
    of_cutmix = cutmix > 0 and (mixup <= 0 or generator.random() < SWITCH)
    alpha = cutmix if of_cutmix else mixup
    if alpha <= 0:
        return Mixture()
    share = float(generator.beta(alpha, alpha))
    if not of_cutmix:
        return Mixture(share)
    cut = int(side * math.sqrt(1 - share))
    y, x = (int(v) - cut // 2 for v in generator.integers(side, size=2))
    top, bottom, left, right = (min(max(v, 0), side) for v in (y, y + cut, x, x + cut))
    return Mixture(1 - (bottom - top) * (right - left) / side**2, (top, bottom, left, right))


def smoothed(labels: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """(B,) int64 labels -> (B, C) float32: 1 - smoothing for the class, and smoothing shared by all C alike."""
    targets = torch.full((len(labels), n_classes), smoothing / n_classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full_like(targets[:, :1], 1 - smoothing))


def normalised(x: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """(B, 3, R, R) in 0..1 -> as a model takes them."""
    return torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


def _normal(u: np.ndarray) -> np.ndarray:
    """Standard normal numbers from uniform ones in [0, 1)."""
    return torch.special.ndtri(torch.from_numpy(u + 2.0**-54)).numpy()


def _to(like: Tensor, values: np.ndarray) -> Tensor:
    """Numbers drawn on the CPU, where the images are."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return (tensor.float() if tensor.is_floating_point() else tensor).to(like.device, non_blocking=True)
