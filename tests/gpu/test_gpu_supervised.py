"""Supervised training on a GPU: images augmented there are those augmented on a CPU, and a run learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from igpt_cli.model_dir import read_config
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.loader import view_draws
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.writer import TokenWriter
from igpt_cli.training.augment import DRAWS, OPERATIONS, Mixture, Views
from igpt_cli.training.run import resume, train
from igpt_cli.training.settings import Execution, TrainSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("frame", ["none", "flip", "crop-flip", "resized-crop-flip"])
def test_views_are_those_of_a_cpu(frame):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32)).astype(np.uint8))
    u, field = view_draws(slice(0, 64), DRAWS, 0), torch.randn(3, 32, 32)
    views, targets = Views(frame, 0.0, 0.3, 0.25), torch.eye(64)
    ours, theirs = (views(images.to(device), u, lambda: field) for device in ("cuda", "cpu"))
    assert ours.is_cuda
    assert ((ours.cpu() - theirs).abs() > 1.5 / 255).float().mean() < 1e-4
    for mixture in (Mixture(0.3), Mixture(0.9, (1, 9, 3, 10))):
        mixed, t = mixture(ours, targets.cuda())
        other, s = mixture(ours.cpu(), targets)
        torch.testing.assert_close(mixed.cpu(), other)
        torch.testing.assert_close(t.cpu(), s)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_a_cpu(name):
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (32, 3, 32, 32)).astype(np.uint8))
    strength, sign = torch.linspace(0, 1, 32), torch.ones(32)
    ours = OPERATIONS[name](images.cuda(), strength.cuda(), sign.cuda()).cpu().int()
    theirs = OPERATIONS[name](images, strength, sign).int()
    assert ((ours - theirs).abs() > 1).float().mean() < 0.002  # points on an edge are inside or outside by rounding


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_learns_and_goes_on(compile, tmp_path):
    palette = Palette(np.linspace(10, 240, 9)[:, None].repeat(3, 1).astype(np.float32))
    rng = np.random.default_rng(5)
    with TokenWriter(tmp_path / "toy.h5", palette, 32, classes=("a", "b", "c"), source="toy") as writer:
        for split in ("train", "test"):
            shown = np.arange(300) % 3
            tokens = rng.integers(3, size=(300, 1024)) + 3 * shown[:, None]
            writer.append(split, tokens, shown, [f"{split}/{i}" for i in range(300)])
    tokens = open_tokens(tmp_path / "toy.h5")
    asked = TrainSettings(steps=40, batch_size=64, augment="crop-flip", mixup=0.8, cutmix=1.0, erasing=0.25, ema=0.9)
    done = train("resnet-18-32", tokens, tmp_path / "run", asked, Execution(compile=compile), device="cuda")
    assert done.accuracy > 90
    assert read_config(tmp_path / "run")["machine"]["precision"] in ("bfloat16", "float32")
    assert resume(tokens, tmp_path / "run", device="cuda").steps == 40
