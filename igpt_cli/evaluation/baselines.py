"""Counting models, which any trained model must beat.

Shapes: N images, T = R * R tokens of an image, V palette size.
"""

from __future__ import annotations

import numpy as np

#: With more colours there is no bigram: its table, 8 V^2 bytes, would not fit.
BIGRAM_COLOURS = 4096
#: So many tokens are counted at a time.
TOKENS_AT_ONCE = 2**22


class Baselines:
    """Unigram and bigram, fitted on a split of tokens (N, T) in [0, V).

    unigram: p(b) = (c(b) + 1) / (c + V), from the count c(b) of each colour.
    bigram: colour b to the right of colour a, interpolated with the unigram (Witten and Bell): p(b | a) =
        (c(a, b) + d(a) p(b)) / (c(a) + d(a)), d(a) the number of different colours seen after a; p(b) for an unseen a.
        The first pixel of a row follows the one above it, with the same table; the very first gets the unigram.
        (Following the last pixel of the row above costs 0.1 nats on CIFAR-10.)

    No probability is 0, so no loss is infinite. For BERT the bigram uses the true left neighbour, also where it is
    masked.

    Attributes:
        unigram: (V,) float64, -log p(b).
        bigram: (V, V) float64, -log p(b | a) in row a; None if V > 4096.
    """

    def __init__(self, tokens: np.ndarray, resolution: int, n_vocab: int):
        V, place = n_vocab, np.arange(1, resolution**2)
        #: (T - 1,) for the positions 1, 2, ...: where the pixel stands that each follows.
        self.follows = np.where(place % resolution, place - 1, place - resolution)
        single = np.zeros(V, np.int64)
        pairs = np.zeros(V * V, np.int64) if V <= BIGRAM_COLOURS else None
        images = max(1, TOKENS_AT_ONCE // resolution**2)
        for start in range(0, len(tokens), images):
            some = np.asarray(tokens[start : start + images], np.int64)
            single += np.bincount(some.ravel(), minlength=V)
            if pairs is not None:
                pairs += np.bincount((some[:, self.follows] * V + some[:, 1:]).ravel(), minlength=V * V)
        p = (single + 1) / (single.sum() + V)  # (V,)
        self.unigram = -np.log(p)
        self.bigram = None
        if pairs is not None:
            count = pairs.reshape(V, V)
            after = (count > 0).sum(1)[:, None]  # (V, 1), d(a)
            seen = count.sum(1)[:, None] + after
            self.bigram = -np.log(np.where(seen > 0, (count + after * p) / np.maximum(seen, 1), p))

    def losses(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """(B, T) int64 -> {"unigram": (B, T), "bigram": (B, T)} float64, -log p of each token; no "bigram" if None."""
        out = {"unigram": self.unigram[tokens]}
        if self.bigram is not None:
            rest = self.bigram[tokens[:, self.follows], tokens[:, 1:]]
            out["bigram"] = np.concatenate((out["unigram"][:, :1], rest), axis=1)
        return out
