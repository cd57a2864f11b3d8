"""For the tests of sampling: models of which the images are known, exact probabilities, a chi-squared test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from models.test_igpt import plain_numpy
from scipy.stats import chisquare

from igpt_cli.model_dir import ModelDir, new_config
from igpt_cli.models.igpt import IGPT, IGPTConfig
from igpt_cli.models.registry import model_config
from igpt_cli.palette.palette import Palette

#: How often the chi-squared test says that right samples are wrong. Seeds are fixed, so a test that passes does so always.
FALSE_ALARM = 1e-6
#: Larger than anything random in a model, so that nothing else decides.
LOUD = 100.0


def as_run(model: IGPT, path: str = "toy") -> ModelDir:
    """A loaded run of this model, with a palette of as many greys."""
    c = model.config
    greys = np.linspace(0, 255, c.n_vocab, dtype=np.float32)[:, None].repeat(3, 1)
    return ModelDir(Path(path), model.eval(), Palette(greys), new_config(model_config("igpt-tiny", **c.to_dict())))


def random_model(objective: str = "ar", n_embd: int = 16, **sizes) -> IGPT:
    """Every parameter is random, and the colours' probabilities are far from equal."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "resolution": 4, "n_vocab": 11, **sizes}
    model = IGPT(IGPTConfig(objective=objective, n_embd=n_embd, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def _loud_head(model: IGPT) -> None:
    """Colour c is predicted where direction c of the residual stream is loud."""
    V, D = model.config.n_vocab, model.config.n_embd
    model.ln_f.g.fill_(1.0)
    model.wtet.weight.copy_(LOUD * torch.eye(V, D))


@torch.no_grad()
def painter(image: np.ndarray, n_vocab: int, objective: str = "ar") -> IGPT:
    """A model that predicts the pixels of one image, (T,) tokens, whatever it sees."""
    model = random_model(objective, n_embd=16, resolution=int(len(image) ** 0.5), n_vocab=n_vocab)
    _loud_head(model)
    model.wpe.copy_(LOUD * torch.eye(n_vocab, 16)[torch.as_tensor(image)])
    return model


@torch.no_grad()
def counter(n_vocab: int = 7, resolution: int = 4) -> IGPT:
    """An AR model that predicts colour 0 first, and then the colour after the one before, n_vocab - 1 before 0."""
    model = random_model(n_embd=16, resolution=resolution, n_vocab=n_vocab)
    _loud_head(model)
    model.wte.weight.copy_(LOUD * torch.eye(n_vocab, 16).roll(-1, 0))
    model.sos.copy_(LOUD * torch.eye(16)[0])
    return model


@torch.no_grad()
def copier(n_vocab: int = 7, resolution: int = 4) -> IGPT:
    """An AR model whose one head looks at the pixel above, and which predicts just that.

    Position t is in directions V.. of the residual stream; it looks for position t - R + 1, which pixel t - R enters.
    """
    V, R, T = n_vocab, resolution, resolution**2
    D = V + T
    model = IGPT(IGPTConfig(n_layer=1, n_head=1, n_embd=D, resolution=R, n_vocab=V)).eval()
    for p in model.parameters():
        p.zero_()
    for g in (model.h[0].ln_1.g, model.h[0].ln_2.g):
        g.fill_(1.0)
    _loud_head(model)
    model.wte.weight.copy_(torch.eye(V, D))
    model.wpe[:, V:] = torch.eye(T)
    query, key, value = model.h[0].attn.c_attn.weight.split(D)
    for t in range(R, T):
        query[V + t - R + 1, V + t] = LOUD
    key[V:, V:] = LOUD * torch.eye(T)
    value[:V, :V] = torch.eye(V)
    model.h[0].attn.c_proj.weight[:V, :V] = LOUD * torch.eye(V)
    return model


def image_probabilities(model: IGPT) -> np.ndarray:
    """(V, ..., V) float64, T axes: the probability of every image there is, by plain NumPy. For very small ones."""
    V, T = model.config.n_vocab, model.config.n_ctx
    images = np.indices((V,) * T).reshape(T, -1).T
    p = softmax(plain_numpy(model, images, None))
    return np.take_along_axis(p, images[..., None], -1)[..., 0].prod(-1).reshape((V,) * T)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def assert_distributed(cells: np.ndarray, p: np.ndarray) -> None:
    """What was drawn, as numbers of cells, agrees with the cells' probabilities by Pearson's chi-squared test.

    Cells in which fewer than 5 are expected are counted as one; none may be where nothing can be.
    """
    p = p.astype(np.float64).reshape(-1)
    counts = np.bincount(cells.reshape(-1), minlength=len(p))
    assert len(counts) == len(p)
    assert not counts[p == 0].any()
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    assert len(counts) > 1
    assert chisquare(counts, expected).pvalue > FALSE_ALARM
