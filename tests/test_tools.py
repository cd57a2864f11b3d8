"""The tools that docs/contributing.md names find nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("ruff check --no-cache", id="ruff check"),
        pytest.param("ruff format --check --no-cache", id="ruff format"),
        pytest.param("mypy", id="mypy", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_found(words, tmp_path):
    pytest.importorskip(words.split()[0])
    cache = ["--cache-dir", str(tmp_path)] if words == "mypy" else []
    done = subprocess.run(
        [sys.executable, "-m", *words.split(), *cache], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
