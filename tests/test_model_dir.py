"""The model directory, where other tests do not reach."""

from __future__ import annotations

import os
import stat
import sys

import pytest
import torch
from safetensors.torch import save_file

from igpt_cli.errors import FormatError
from igpt_cli.model_dir import WEIGHTS, load_model, new_config, read_config, read_weights, write_config, write_weights
from igpt_cli.models.registry import model_config


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_weights_can_be_read_by_whom_the_umask_allows(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_weights(tmp_path, torch.nn.Linear(2, 2).state_dict())
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(("dtype", "message"), [
    (torch.int32, "weight is int32, expected float32"),
    (torch.bool, "weight is bool, expected float32"),
    (torch.complex64, "weight is complex64, expected float32"),
    (torch.float8_e4m3fn, "weight is float8_e4m3fn, expected float32"),
    (torch.float64, "weight holds NaN or infinity"),
    (torch.float16, None),
], ids=str)  # fmt: skip
def test_weights_of_another_type(dtype, message, tmp_path):
    """Floating-point numbers become float32, if they can; nothing else is taken for weights."""
    model = torch.nn.Linear(2, 2)
    weight = torch.full((2, 2), 1e300 if dtype is torch.float64 else 1.5, dtype=torch.float64).to(dtype)
    save_file({"weight": weight, "bias": model.bias.detach()}, tmp_path / WEIGHTS)
    if message is None:
        assert torch.equal(read_weights(tmp_path, model)["weight"], torch.full((2, 2), 1.5))
        return
    with pytest.raises(FormatError, match=message):
        read_weights(tmp_path, model)


@pytest.mark.parametrize(("name", "change"), [
    ("igpt-tiny", {"n_layer": 10**6}), ("vit-s16", {"depth": 10**5}), ("swin-t", {"depths": [2, 2, 10**6, 2]}),
    ("resnet-18", {"depths": [1] * 1000}),
])  # fmt: skip
def test_more_blocks_than_can_be_built_in_time(name, change, tmp_path):
    config = model_config(name)
    write_config(tmp_path, new_config({**config, **change}))
    with pytest.raises(FormatError, match=f"model.{next(iter(change))} is .* a whole number from 0 to 1,000"):
        load_model(tmp_path)
    write_config(tmp_path, new_config(config))
    assert read_config(tmp_path)["model"] == config
