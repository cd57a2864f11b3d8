"""Fixtures for every test. No test uses the network; real images are used only where IGPT_CIFAR10 names the archive."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

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
