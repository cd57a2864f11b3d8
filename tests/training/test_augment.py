"""Augmentation of batches: what is drawn, what becomes of it, and that a batch is a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_cli.tokens.loader import crop, flip, step_generator, view_draws
from igpt_cli.training import augment
from igpt_cli.training.augment import DRAWS, MEAN, OPERATIONS, STD, TRIES, Mixture, Views, boxes, drawn_mixture


def images(n, side=12, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side)).astype(np.uint8))


def no_noise():
    raise AssertionError("nothing is erased")


STRONG = Views("crop-flip", 9.0, 0.4, 0.25)


def test_an_image_gets_the_same_view_in_any_part_of_the_batch():
    x, u = images(16), view_draws(slice(160, 176), DRAWS, seed=3)
    field = torch.randn(3, 12, 12)
    whole = STRONG(x, u, lambda: field)
    for part in (slice(0, 5), slice(5, 16)):
        mine = view_draws(slice(160 + part.start, 160 + part.stop), DRAWS, seed=3)
        assert (mine == u[part]).all()
        assert torch.equal(STRONG(x[part], mine, lambda: field), whole[part])
    assert (u != view_draws(slice(160, 176), DRAWS, seed=4)).all()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(view_draws(slice(0, 400), DRAWS, 0).mean() - 0.5) < 0.01


def test_nothing_is_changed_where_nothing_is_asked_for():
    x = images(4)
    assert torch.equal(Views()(x, view_draws(slice(0, 4), DRAWS, 0), no_noise), x.float() / 255)


def test_framing_is_that_of_tokens():
    """The same crop and flip as `tokens.loader` gives the rows of an image."""
    x, u = images(40), np.random.default_rng(1).random((40, 2 * TRIES + 3))
    rows = x[:, 0].reshape(40, -1).numpy()
    dy, dx = (u[:, :2] * 9).astype(int).T
    expected = crop(rows, 12, dy, dx)
    expected[u[:, -1] < 0.5] = flip(expected[u[:, -1] < 0.5], 12)
    assert (augment.framed(x, "crop-flip", u)[:, 0].reshape(40, -1).numpy() == expected).all()
    assert torch.equal(augment.framed(x, "none", u), x)
    flipped = augment.framed(x, "flip", u)
    assert all(torch.equal(f, i.flip(-1) if d[-1] < 0.5 else i) for f, i, d in zip(flipped, x, u))


def test_random_parts_are_cropped_and_resized_as_by_pillow():
    x, u = images(30, 20), np.random.default_rng(2).random((30, 2 * TRIES + 3))
    found = augment.framed(x, "resized-crop-flip", u)
    for image, result, draws in zip(x, found, u):
        for area, aspect in draws[: 2 * TRIES].reshape(TRIES, 2):  # torchvision's loop, written out
            pixels = 400 * (0.08 + 0.92 * area)
            ratio = np.exp(np.log(3 / 4) + aspect * (np.log(4 / 3) - np.log(3 / 4)))
            width, height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
            if 0 < width <= 20 and 0 < height <= 20:
                top, left = int(draws[-3] * (21 - height)), int(draws[-2] * (21 - width))
                break
        else:
            top, left, height, width = 0, 0, 20, 20
        part = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((20, 20), Image.BICUBIC)).astype(int)
        expected = expected[:, ::-1] if draws[-1] < 0.5 else expected
        assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_boxes_lie_in_their_image():
    u = np.random.default_rng(3).random((500, 2 * TRIES + 2))
    top, left, height, width = boxes(32, augment.ERASED_AREA, augment.ERASED_ASPECT, u).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 32).all()
    assert (left + width <= 32).all()
    area = height * width / 32**2
    assert area.min() > 0.01
    assert area.max() < 0.36
    assert abs(area.mean() - 0.177) < 0.02
    impossible = np.zeros((1, 2 * TRIES + 2))  # 8% of one pixel
    assert boxes(1, (0.08, 1.0), (3 / 4, 4 / 3), impossible).tolist() == [[0, 0, 0, 0]]


def test_every_operation_changes_more_where_it_is_stronger():
    ramp = torch.arange(16) * 7 + 9 * (torch.arange(16) % 2)
    x = torch.stack([ramp.expand(16, 16) + 60, 40 + ramp[:, None].expand(16, 16), (ramp + ramp[:, None]) // 2 + 90])
    x, one = x.to(torch.uint8).expand(8, 3, 16, 16), torch.ones(8)
    unscaled = {"autocontrast", "equalize", "invert"}
    for name, operation in OPERATIONS.items():
        low, high = ((operation(x, s * one, one).float() - x.float()).abs().mean() for s in (0.2, 0.9))
        assert torch.equal(operation(x, 0.2 * one, one), operation(x, 0.9 * one, one)) == (name in unscaled)
        assert name in unscaled or high > low
    turned = [OPERATIONS["rotate"](x, one, sign * one) for sign in (-1, 1)]
    assert not torch.equal(*turned)


def test_rand_augment_applies_each_of_two_operations_to_half_of_the_images():
    x, u = images(1, 16).repeat(2000, 1, 1, 1), np.random.default_rng(4).random((2000, 4 * augment.LAYERS))
    changed = (augment.rand_augment(x, 9.0, u) != x).flatten(1).any(1).float().mean().item()
    assert abs(changed - 0.75) < 0.05
    one = u[:1].copy()
    one[0, :4] = 3.5 / len(OPERATIONS), 0.0, 0.5, 0.9  # rotate, applied, no deviation, to the left
    one[0, 4:] = 0, 0.9, 0, 0  # nothing
    expected = OPERATIONS["rotate"](x[:1], torch.tensor([0.9]), torch.tensor([1.0]))
    assert torch.equal(augment.rand_augment(x[:1], 9.0, one), expected)


def test_erased_boxes_are_noise_of_the_colours_deviation():
    x, u = torch.zeros(400, 3, 24, 24), np.random.default_rng(5).random((400, 2 * TRIES + 3))
    noise = torch.randn(3, 24, 24)
    found = augment.erased(x, 0.25, u, lambda: noise)
    shown = noise * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    gone = (found != 0).any(1)
    assert abs(gone.flatten(1).any(1).float().mean().item() - 0.25) < 0.06
    assert all(torch.equal(f[:, g], shown[:, g]) for f, g in zip(found, gone))
    expected = boxes(24, augment.ERASED_AREA, augment.ERASED_ASPECT, u[:, 1:])
    assert (gone.sum((1, 2)).numpy() == np.where(u[:, 0] < 0.25, expected[:, 2] * expected[:, 3], 0)).all()


# Mixtures


def test_mixtures_are_the_plain_computation():
    rng = np.random.default_rng(6)
    x, t = rng.random((6, 3, 8, 8)).astype(np.float32), np.eye(6, 4, dtype=np.float32)
    other = [1, 0, 3, 2, 5, 4]
    mixed, targets = Mixture(0.3)(torch.from_numpy(x), torch.from_numpy(t))
    np.testing.assert_allclose(mixed, 0.3 * x + 0.7 * x[other], rtol=1e-6)
    np.testing.assert_allclose(targets, 0.3 * t + 0.7 * t[other], rtol=1e-6)
    cut, targets = Mixture(1 - 6 / 64, (1, 3, 4, 7))(torch.from_numpy(x), torch.from_numpy(t))
    expected = x.copy()
    expected[:, :, 1:3, 4:7] = x[other][:, :, 1:3, 4:7]
    assert (cut.numpy() == expected).all()
    np.testing.assert_allclose(targets, 58 / 64 * t + 6 / 64 * t[other], rtol=1e-6)
    with pytest.raises(ValueError, match="5 images have not each a neighbour"):
        Mixture(0.5)(torch.from_numpy(x[:5]), torch.from_numpy(t[:5]))


def test_a_step_draws_one_mixture():
    def drawn(mixup, cutmix, n=400):
        return [drawn_mixture(16, mixup, cutmix, step_generator(step, 0)) for step in range(n)]

    assert all(m == Mixture() for m in drawn(0, 0, 5))
    assert drawn(0.8, 1.0, 20) == drawn(0.8, 1.0, 20)
    mixed = drawn(0.8, 0)
    assert all(m.box is None for m in mixed)
    shares = np.array([m.share for m in mixed])
    assert abs(shares.mean() - 0.5) < 0.05
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.015
    for m in drawn(0, 1.0):
        top, bottom, left, right = m.box
        assert 0 <= top <= bottom <= 16
        assert 0 <= left <= right <= 16
        assert m.share == 1 - (bottom - top) * (right - left) / 256
    assert abs(np.mean([m.box is not None for m in drawn(0.8, 1.0)]) - 0.5) < 0.08


def exact_mean_share(side: int) -> float:
    """Of CutMix with Beta(1, 1), over every middle of the box and every side, by counting pixels on masks in NumPy."""
    mean = 0.0
    for cut in range(side):
        # The side is int(R * sqrt(1 - share)), and 1 - share is uniform.
        chance = ((cut + 1) ** 2 - cut**2) / side**2
        inside = []
        for middle in range(side):
            line = np.zeros(3 * side, bool)
            line[side + middle - cut // 2 :][:cut] = True
            inside.append(line[side : 2 * side].sum())
        mean += chance * (1 - np.mean(inside) ** 2 / side**2)
    return mean


@pytest.mark.parametrize("side", [5, 16, 32])
def test_the_box_of_cutmix_has_all_its_pixels(side):
    """Also where its side is odd; at 32 pixels the box was a pixel short, and the mean share 0.700 for 0.690."""
    drawn = [drawn_mixture(side, 0, 1.0, step_generator(step, 0)) for step in range(6000)]
    shares = np.array([m.share for m in drawn])
    assert abs(shares.mean() - exact_mean_share(side)) < 4 * shares.std() / len(shares) ** 0.5
    heights = {m.box[1] - m.box[0] for m in drawn if m.box[0] > 0 and m.box[1] < side}
    assert {1, 3} <= heights
    x, targets = torch.zeros(2, 3, side, side), torch.eye(2)
    x[1] = 1
    for m in drawn[:200]:
        mixed, mixed_targets = m(x, targets)
        assert mixed_targets[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_the_box_of_cutmix_is_that_of_the_paper(share):
    """Section 3.1: r_w = W sqrt(1 - share) with the middle (r_x, r_y) uniform, cut off at the border; by pixel."""

    class Draws:
        """What `drawn_mixture` draws, as numbers that are named."""

        def __init__(self, y, x):
            self.middle = np.array([y, x])

        def beta(self, a, b):
            return share

        def integers(self, side, size):
            return self.middle

    side = 9
    cut = int(side * (1 - share) ** 0.5)
    for y, x in np.ndindex(side, side):
        mask = np.zeros((side, side), bool)
        for i, j in np.ndindex(cut, cut):
            row, column = y - cut // 2 + i, x - cut // 2 + j
            if 0 <= row < side and 0 <= column < side:
                mask[row, column] = True
        m = drawn_mixture(side, 0, 1.0, Draws(y, x))
        top, bottom, left, right = m.box
        found = np.zeros_like(mask)
        found[top:bottom, left:right] = True
        assert (found == mask).all()
        assert m.share == pytest.approx(1 - mask.mean())


def test_smoothed_targets_and_their_loss_are_the_plain_computation():
    labels, logits = torch.tensor([2, 0, 1]), torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    targets = augment.smoothed(labels, 4, 0.1)
    expected = np.full((3, 4), 0.025)
    expected[[0, 1, 2], labels] += 0.9
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    ours = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(ours, theirs)
    x = torch.rand(2, 3, 4, 4)
    expected = (x.numpy() - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(augment.normalised(x), expected, rtol=1e-5, atol=1e-6)
