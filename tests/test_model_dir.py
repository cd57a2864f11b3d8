"""The model directory, where other tests do not reach."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from igpt_cli.model_dir import WEIGHTS, write_weights


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_weights_can_be_read_by_whom_the_umask_allows(mask, tmp_path):
    import torch

    before = os.umask(mask)
    try:
        write_weights(tmp_path, torch.nn.Linear(2, 2).state_dict())
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o666 & ~mask
