"""The pixel transformer on a GPU: the same numbers as on a CPU, and a run that learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from igpt_cli.device import choose_precision
from igpt_cli.model_dir import load_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.probing.features import extract
from igpt_cli.probing.probe import probe
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.objectives import Objective
from igpt_cli.training.run import pretrain
from igpt_cli.training.settings import PretrainSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = build_model(model_config("igpt-tiny"))
    with torch.no_grad():
        made.wtet.weight.normal_(std=0.1)
    return made


def test_loss_gradients_and_features_equal_the_cpus(model):
    tokens = torch.randint(512, (2, 1024), generator=torch.Generator().manual_seed(1))
    on_cpu = Objective(model)(tokens).mean()
    on_cpu.backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    features = extract(model, tokens.numpy(), [0, 12, 24])
    model.zero_grad()
    model.cuda()
    on_gpu = Objective(model)(tokens.cuda()).mean()
    on_gpu.backward()
    assert on_gpu.item() == pytest.approx(on_cpu.item(), abs=1e-4)
    for name, p in model.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(p.grad.cpu(), expected[name], atol=2e-3 * scale + 1e-7, rtol=1e-2, msg=name)
    for layer, found in extract(model, tokens.numpy(), [0, 12, 24]).items():
        np.testing.assert_allclose(found, features[layer], atol=1e-3)


def test_a_run_in_bfloat16_learns_and_is_probed(toy_tokens, tmp_path):
    assert choose_precision("auto", torch.device("cuda")) in ("bfloat16", "float32")
    tokens = open_tokens(toy_tokens(n=256))
    done = pretrain(
        tokens,
        tmp_path / "run",
        PretrainSettings(steps=150, batch_size=32, learning_rate=0.003, optimizer="adamw"),
        device="cuda",
    )
    assert done.train_loss < 0.5 * math.log(8)
    found = probe(load_model(done.run, "cuda"), tokens, [0, 12], baselines=False)
    assert found["layers"][0]["accuracy"] > 90
