"""Operations on the pixels of a batch of images, each with a strength of its own: what RandAugment chooses from.

Images are (B, 3, H, W) uint8, and every operation gives new ones; strengths are (B,), on the same device. The
definitions are Pillow's (ImageOps, ImageEnhance, Image.transform), so that published recipes mean here what they mean
elsewhere; results agree with Pillow's to a unit of 255, which is the rounding of its fixed-point arithmetic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
