"""Batches of tokens as a function of (seed, step).

All random numbers come from Philox, a counter-based generator: they depend on the seed and the image's place in the
stream, not on earlier draws. So a run that stops at step s resumes at step s, bit for bit.

Augmentation moves pixels and never mixes them, so augmenting tokens equals augmenting the quantized image.
"""

from __future__ import annotations

import numpy as np

from igpt_cli.errors import InputError

AUGMENTATIONS = ("none", "flip", "crop-flip")
#: Pixels of reflection around the image, from which "crop-flip" crops.
PAD = 4
#: Probability that BERT's objective masks a pixel (section 2.1).
MASK_PROB = 0.15
# The second half of the Philox key; epochs count from 0, so these are other streams.
_AUGMENT_STREAM, _MASK_STREAM, _FIXED_MASK_STREAM = 2**64 - 1, 2**64 - 2, 2**64 - 3
_PARTS_STREAM = 2**63  # far from the draws of fixed masks, which count down from theirs
_VIEW_STREAM, _MIX_STREAM = 2**63 + 1, 2**63 + 2


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch: a permutation of range(n), (n,) int64, a function of its arguments.

    It ranks raw Philox words, whose values NumPy guarantees for all versions.
    """
    return np.argsort(_philox(seed, epoch).random_raw(n), kind="stable")


def _philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)


def fixed_mask(places: np.ndarray, n_ctx: int, prob: float = MASK_PROB, seed: int = 0, draw: int = 0) -> np.ndarray:
    """The masks with which images are evaluated: (B, n_ctx) bool, each true with probability `prob`.

    Args:
        places: (B,) the images' rows in their split. A mask depends on its row, `seed` and `draw` alone.
        draw: 0, 1, ... for several masks of one image.
    """
    rows = [_mask(_FIXED_MASK_STREAM - draw, seed, int(p), 1, n_ctx, prob) for p in places]
    return np.concatenate(rows) if rows else np.empty((0, n_ctx), bool)


def fixed_parts(places: np.ndarray, n_ctx: int, parts: int, seed: int = 0) -> np.ndarray:
    """A random partition of each image's pixels into `parts` masks: (B, n_ctx) int64, the mask that hides the pixel.

    The sizes of an image's masks differ by one at most.

    Args:
        places: (B,) the images' rows in their split; a partition depends on its row and `seed` alone.
        parts: 1, all pixels in one mask, to n_ctx, a mask for each pixel.
    """
    ranks = [np.argsort(_words(_PARTS_STREAM, seed, int(p), 1, n_ctx)[0], kind="stable") for p in places]
    return np.array(ranks, np.int64).reshape(-1, n_ctx) % parts


def _mask(stream: int, seed: int, place: int, n: int, n_ctx: int, prob: float) -> np.ndarray:
    """(n, n_ctx) bool for the places `place`, `place` + 1, ... of a stream."""
    return _words(stream, seed, place, n, n_ctx) < np.uint64(min(round(prob * 2**64), 2**64 - 1))


def view_draws(places: slice, n: int, seed: int) -> np.ndarray:
    """(B, n) float64 in [0, 1), the random numbers that augment the images at these places of the training stream; they
    depend on the place and `seed` alone."""
    words = _words(_VIEW_STREAM, seed, places.start, places.stop - places.start, n)
    return (words >> np.uint64(11)) * 2.0**-53


def step_generator(step: int, seed: int) -> np.random.Generator:
    """The generator of what is drawn once a step, such as the weights of a mixup."""
    return np.random.Generator(_philox(seed, _MIX_STREAM, counter=step << 64))


def _words(stream: int, seed: int, place: int, n: int, n_ctx: int) -> np.ndarray:
    """(n, n_ctx) random uint64 for the places `place`, `place` + 1, ... of a stream."""
    words = -(-n_ctx // 4) * 4  # Philox makes four words for each value of its counter
    return _philox(seed, stream, counter=place * words // 4).random_raw(n * words).reshape(n, words)[:, :n_ctx]


def flip(tokens: np.ndarray, resolution: int) -> np.ndarray:
    """Rows (..., R * R) mirrored left to right.

    >>> flip(np.array([0, 1, 2, 3]), 2)
    array([1, 0, 3, 2])
    """
    images = _as_images(tokens, resolution)
    return np.ascontiguousarray(images[..., ::-1]).reshape(tokens.shape)


def crop(tokens: np.ndarray, resolution: int, dy, dx, pad: int = PAD) -> np.ndarray:
    """Rows (B, R * R) padded by `pad` pixels of reflection, then cropped to R x R at row dy and column dx.

    Args:
        dy, dx: the corner of the crop in 0..2*pad: one for all rows, or one each (B,). dy = dx = pad changes nothing.
        pad: as in np.pad(mode="reflect"), less than R.
    """
    images = _as_images(tokens, resolution)
    _check_pad(pad, resolution)
    b = np.arange(len(images))[:, None, None]
    y = _reflected(dy, len(images), resolution, pad)[:, :, None]
    x = _reflected(dx, len(images), resolution, pad)[:, None, :]
    return images[b, y, x].reshape(tokens.shape)


def _as_images(tokens: np.ndarray, resolution: int) -> np.ndarray:
    if tokens.shape[-1] != resolution**2:
        side = f"{resolution} x {resolution}"
        raise InputError(f"rows of {tokens.shape[-1]} tokens are no images of {side}: those have {resolution**2}")
    return tokens.reshape(*tokens.shape[:-1], resolution, resolution)


def _check_pad(pad: int, resolution: int) -> None:
    if not 0 <= pad < resolution:
        raise InputError(f"a reflection of {pad} pixels needs an image larger than that; this one has {resolution}")


def _reflected(start, n: int, size: int, pad: int) -> np.ndarray:
    """(n, size): the image's line in each line of the crop."""
    start = np.broadcast_to(np.asarray(start, np.int64), (n,))
    if n and (start.min() < 0 or start.max() > 2 * pad):
        starts = f"{start.min()}..{start.max()}"
        raise InputError(f"a crop starts at 0..{2 * pad} with {pad} pixels of padding, not at {starts}")
    line = np.abs(start[:, None] - pad + np.arange(size))  # before the first line: mirrored
    return np.where(line >= size, 2 * (size - 1) - line, line)  # after the last one, too


class TokenLoader:
    """Shuffled, augmented batches of a split.

    The stream is endless, each epoch in its own order. A batch may begin in one epoch and end in the next, so every
    batch is full and every image is seen exactly once an epoch.

    Args:
        tokens: (N, T) integers, such as `TokenSplit.tokens`; only the rows of a batch are read.
        resolution: R, with T = R * R.
        batch_size: B.
        seed: of order and augmentation, at least 0.
        augment: "none"; "flip": half of the images mirrored; "crop-flip": also a random crop after 4 pixels of
            reflection.
        indices: (n,) the rows to use; default all.

    Raises:
        InputError: no rows, a batch size below 1, an unknown augmentation, rows of another length.
    """

    def __init__(self, tokens, resolution: int, batch_size: int, seed: int = 0, augment: str = "none", indices=None):
        if augment not in AUGMENTATIONS:
            raise InputError(f"there is no augmentation {augment!r}; there are {', '.join(AUGMENTATIONS)}")
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; it must be at least 1")
        self.tokens, self.resolution, self.batch_size = tokens, resolution, batch_size
        self.seed, self.augment = seed, augment
        self.indices = np.arange(len(tokens)) if indices is None else np.asarray(indices, np.int64)
        if not len(self.indices):
            raise InputError("there are no images to train on: the split is empty")
        _as_images(tokens, resolution)
        if augment == "crop-flip":
            _check_pad(PAD, resolution)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch: n / B, rounded up."""
        return -(-len(self.indices) // self.batch_size)

    def batch_indices(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """(B,) int64: the rows of `tokens` in batch `step` (0, 1, ...), or in a part of it, for looking up labels."""
        place = step * self.batch_size + np.arange(self.batch_size)[part]
        epoch, place = np.divmod(place, len(self.indices))
        out = np.empty(len(place), np.int64)
        for e in np.unique(epoch):
            out[epoch == e] = self._order(int(e))[place[epoch == e]]
        return self.indices[out]

    def batch(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """(B, T) int64: batch `step` (0, 1, ...), augmented; or a part of it, such as one rank's slice(64, 128)."""
        rows = self.batch_indices(step, part)
        by_place = np.argsort(rows)  # read the disk forwards
        tokens = np.empty((len(rows), self.tokens.shape[1]), np.int64)
        tokens[by_place] = self.tokens[rows[by_place]]
        if self.augment == "none":
            return tokens
        draws = self._draws(step, part)
        mirrored = draws[:, 0] % 2 == 1
        tokens[mirrored] = flip(tokens[mirrored], self.resolution)
        if self.augment == "flip":
            return tokens
        dy, dx = (draws[:, 1:3] % (2 * PAD + 1)).astype(np.int64).T
        return crop(tokens, self.resolution, dy, dx)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a batch rarely spans more than two epochs
                self._orders.clear()
            self._orders[epoch] = epoch_order(len(self.indices), self.seed, epoch)
        return self._orders[epoch]

    def mask(self, step: int, prob: float = MASK_PROB, part: slice = slice(None)) -> np.ndarray:
        """(B, T) bool: the pixels that BERT's objective masks in batch `step`, each with probability `prob`."""
        start, stop, _ = part.indices(self.batch_size)
        place = step * self.batch_size + start
        return _mask(_MASK_STREAM, self.seed, place, stop - start, self.tokens.shape[1], prob)

    def _draws(self, step: int, part: slice) -> np.ndarray:
        """(B, 4) random uint64, a function of the seed and the place of each image in the stream."""
        # Philox makes four words for each value of its counter, so an image takes one.
        start, stop, _ = part.indices(self.batch_size)
        stream = _philox(self.seed, _AUGMENT_STREAM, counter=step * self.batch_size + start)
        return stream.random_raw(4 * (stop - start)).reshape(-1, 4)
