"""Fixtures for every test. No test uses the network; real images are used only where IGPT_CIFAR10 names the archive."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

# Everything here is of toy size, where a second thread costs more than it brings. Before any test imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture
def igpt():
    """Run the command line in this process: igpt("palette", "show", path) -> code, stdout, stderr."""
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app

    def run(*args, stdin: str | bytes | None = None):
        done = CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="igpt")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return SimpleNamespace(code=done.exit_code, stdout=done.stdout, stderr=done.stderr)

    return run


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The CIFAR-10 JPEG archive (tar of split/class/name.jpg)."""
    path = os.environ.get("IGPT_CIFAR10", "")
    if not path or not Path(path).is_file():
        pytest.skip("IGPT_CIFAR10 does not name the CIFAR-10 archive")
    return Path(path)


@pytest.fixture
def toy_tokens(tmp_path):
    """Write a token file of 4x4 images whose 2 classes are told by colour; toy_tokens(splits, ...) -> path.

    Class 0 uses the darker half of the 8 palette colours, class 1 the lighter; every image is two stripes.
    """
    import numpy as np

    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.writer import TokenWriter

    def write(
        path=tmp_path / "toy.h5", splits=("train", "test"), n=64, classes=("dark", "light"), labelled=True, shade=0
    ):
        centers = np.linspace(10, 240, 8)[:, None].repeat(3, 1) + shade
        palette = Palette(centers.astype(np.float32))
        rng = np.random.default_rng(5)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TokenWriter(path, palette, 4, classes=classes, source="toy", force=True) as writer:
            for split in splits:
                labels = np.arange(n) % len(classes)
                pairs = rng.integers(4, size=(n, 2)) + 4 * labels[:, None]
                tokens = np.repeat(pairs, 8, axis=1)
                names = [f"{split}/{i}.png" for i in range(n)]
                writer.append(split, tokens, labels if labelled else np.full(n, -1), names)
        return path

    return write
