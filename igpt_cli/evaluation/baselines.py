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
    """Unigram and bigram, fitted on a split.

    unigram: how often each colour occurs, with one added to each count: p(b) = (c(b) + 1) / (c + V).
    bigram: how often colour b stands to the right of colour a, Witten and Bell's interpolation with the unigram:
        p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a)), where d(a) is the number of different colours seen after a;
        p(b) itself for an a that was never seen. The first pixel of a row has no left neighbour and follows the one
        above it, for which the same table is used and fitted; the very first pixel gets the unigram. (Following the
        last pixel of the row above instead costs 0.1 nats on CIFAR-10.)

    Nothing has probability 0, so no loss is infinite. For BERT the bigram is told the true left neighbour, also
    where the model's own view of it is masked.

    Args:
        tokens: (N, T) integers in [0, V), such as `TokenSplit.tokens`.
        resolution: R, with T = R * R.
        n_vocab: V.

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
