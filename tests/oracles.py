"""Other people's models that ours are compared with: whether those that are installed compute what they should."""

from __future__ import annotations

import pytest


def require_imagegpt() -> None:
    """Skip the test where transformers' ImageGPT is missing, or computes something else.

    Before 5.21 `torch_float(8 ** 0.5)`, by which scores are divided, gave the whole number 2: another model wherever the
    root of a head's width is not whole, as in the toy models of the tests (width 8) and in igpt-m and igpt-l.
    """
    version = pytest.importorskip("transformers").__version__
    if tuple(map(int, version.split(".")[:2])) < (5, 21):
        pytest.skip(f"transformers {version} rounds the root that divides ImageGPT's scores; 5.21 mends it")
