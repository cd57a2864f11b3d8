"""Baselines of a probe: untrained features, classified by the same protocol.

A number for a trained layer means something beside these. Shapes: N images, R resolution, V colours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

#: Of `random_patches`: side of a patch, how many, images and patches that whitening is fitted on, images at a time.
PATCH, PATCHES = 6, 800
WHITEN_IMAGES, WHITEN_PATCHES = 2_000, 100_000
#: Images at a time: a GPU is to be kept busy, and what a CPU computes of them is to stay in its caches.
AT_ONCE = {"cuda": 32, "cpu": 2}
#: Constants of Coates, Lee and Ng 2011 for pixels in 0..255: added to a patch's variance, and to the eigenvalues.
CONTRAST, RIDGE = 10.0, 0.1
#: A response below this is 0 (Coates and Ng 2011, soft threshold).
THRESHOLD = 0.25
#: Images of more pixels a side than this are reduced to so many.
LARGE, SMALL = 64, 32


def colour_histogram(tokens: np.ndarray, n_vocab: int) -> np.ndarray:
    """The square root of the share of each colour in an image, so that Euclidean distances are Hellinger's.

    Tokens (N, T) in [0, V) give (N, V) float32, each row of length 1.
    """
    N, T = tokens.shape
    at = np.arange(N)[:, None] * n_vocab + tokens.astype(np.int64)
    counts = np.bincount(at.ravel(), minlength=N * n_vocab).reshape(N, n_vocab)
    return np.sqrt(counts / T, dtype=np.float32)


def reduced(rgb: np.ndarray) -> np.ndarray:
    """(N, R, R, 3) uint8; images of more than 64 pixels a side are averaged to (N, 32, 32, 3), to be as small as
    others.
    """
    if rgb.shape[1] <= LARGE:
        return np.asarray(rgb)
    x = torch.from_numpy(np.require(rgb, requirements=["C", "W"])).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(x, SMALL).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def raw_pixels(rgb: np.ndarray) -> np.ndarray:
    """(N, R, R, 3) uint8 -> (N, 3 R R) float32 in [0, 1]."""
    return rgb.reshape(len(rgb), -1) / np.float32(255)


class RandomPatches:
    """Responses of each part of an image to patches drawn at random from training images (Coates and Ng 2011).

    Patches of 6 x 6 pixels are normalised to mean 0 and standard deviation 1 and whitened; 800 of them, of length 1,
    are the filters. Their responses at every place, positive and negative apart and soft-thresholded, are averaged over
    the four quadrants. Nothing is trained. `rgb` are (N, R, R, 3) uint8 training images, R >= 8.
    """

    def __init__(self, rgb: np.ndarray, seed: int = 0, device: torch.device | str = "cpu", n_patches: int = PATCHES):
        rng = np.random.default_rng([seed, len(rgb)])
        some = rgb[np.sort(rng.permutation(len(rgb))[:WHITEN_IMAGES])]
        patches = _normed(_patches(some)).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()  # (M, 108)
        patches = patches[torch.from_numpy(rng.permutation(len(patches))[:WHITEN_PATCHES])]
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        zca = vectors @ torch.diag((values + RIDGE).rsqrt()) @ vectors.T
        white = (patches - mean) @ zca
        chosen = F.normalize(white[torch.from_numpy(rng.permutation(len(white))[:n_patches])], dim=1)
        # filter . zca (x - mean), as one map of the normed patch x
        self.weight = (chosen @ zca).float().to(device)  # (n_patches, 108)
        self.shift = (chosen @ zca @ mean).float().to(device)  # (n_patches,)

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(N, R, R, 3) uint8 -> (N, 8 n_patches) float32."""
        side, device = rgb.shape[1] - PATCH + 1, self.weight.device
        places = torch.eye(side**2, device=device).view(-1, side, side)
        quadrants = F.adaptive_avg_pool2d(places, 2).flatten(1)  # (P, 4): what averages over each of them
        out, at_once = [], AT_ONCE.get(device.type, AT_ONCE["cuda"])
        for start in range(0, len(rgb), at_once):
            patches = _normed(_patches(rgb[start : start + at_once]).to(device))  # (B, 108, P)
            responses = self.weight @ patches - self.shift[:, None]  # (B, n, P)
            both = [(sign * responses).sub_(THRESHOLD).relu_() @ quadrants for sign in (1, -1)]  # each (B, n, 4)
            out.append(torch.cat(both, 1).flatten(1).cpu().numpy())
        return np.concatenate(out)


def _patches(rgb: np.ndarray) -> torch.Tensor:
    """Every patch of each image: (B, R, R, 3) uint8 -> (B, 108, P) float32, P = (R - 5) ** 2."""
    return F.unfold(torch.from_numpy(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2).float(), PATCH)


def _normed(patches: torch.Tensor) -> torch.Tensor:
    """Each patch with mean 0 and deviation 1 over its 108 numbers, flat ones left flat."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + CONTRAST).sqrt()
