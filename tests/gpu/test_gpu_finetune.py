"""Fine-tuning on a GPU: the same steps as on a CPU, compiled and in bfloat16 too, and a run that learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from igpt_cli.model_dir import load_model, read_config, read_metrics
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.run import finetune, pretrain, resume
from igpt_cli.training.settings import Execution, FinetuneSettings, PretrainSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TUNING = FinetuneSettings(steps=24, batch_size=8, learning_rate=0.003, warmup_steps=2, optimizer="adamw")


@pytest.mark.parametrize(("objective", "head_layer"), [("ar", None), ("bert", 1)])
def test_steps_are_those_of_a_cpu_eager_and_compiled(toy_tokens, tmp_path, objective, head_layer):
    tokens = open_tokens(toy_tokens())
    recipe = PretrainSettings(n_layer=3, n_embd=32, steps=20, batch_size=8, learning_rate=0.003, optimizer="adamw")
    execution = Execution(precision="float32")
    base = pretrain(tokens, tmp_path / "base", replace(recipe, objective=objective), execution, device="cpu").run
    tuning = replace(TUNING, head_layer=head_layer)
    ways = {"cpu": ("cpu", False), "eager": ("cuda", False), "compiled": ("cuda", True)}
    figures, accuracies = {}, {}
    for name, (device, compiled) in ways.items():
        how = replace(execution, compile=compiled)
        done = finetune(load_model(base), tokens, tmp_path / name, tuning, how, device=device)
        steps = [r for r in read_metrics(done.run) if "loss" in r]
        figures[name] = np.array([[r["loss"], r["gen_loss"], r["clf_loss"]] for r in steps])
        accuracies[name] = done.val_accuracy
    for name in ("eager", "compiled"):
        np.testing.assert_allclose(figures[name], figures["cpu"], rtol=5e-3, atol=5e-4, err_msg=name)
        assert accuracies[name] == pytest.approx(accuracies["cpu"], abs=20)


def test_a_run_in_bfloat16_learns_and_is_resumed_on_a_cpu(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens(n=256))
    recipe = PretrainSettings(steps=40, batch_size=32, learning_rate=0.003, optimizer="adamw")
    base = load_model(pretrain(tokens, tmp_path / "base", recipe, device="cuda").run)
    done = finetune(base, tokens, tmp_path / "tuned", replace(TUNING, steps=80, batch_size=32), device="cuda")
    assert (done.status, done.accuracy) == ("done", 100.0)
    assert read_config(done.run)["machine"]["device"].startswith("cuda")
    again = resume(tokens, done.run, device="cpu")  # nothing is left to do but the test
    assert (again.steps, again.accuracy) == (80, 100.0)
