"""Pretraining: the loss, the optimizers, the schedule, and what a run leaves on disk however it ends."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli import device as devices
from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError, OutputError
from igpt_cli.model_dir import load_model, read_config, read_metrics
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.tokens.loader import TokenLoader
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.optim import clip_gradient, make_optimizers, schedule
from igpt_cli.training.pretrain import held_out, resolve_settings
from igpt_cli.training.run import pretrain
from igpt_cli.training.settings import (
    CPU_BUDGET,
    Execution,
    PretrainSettings,
    ResolvedPretrain,
    check,
    read_settings,
    save_interval,
    seconds,
)

QUICK = PretrainSettings(steps=12, batch_size=4, learning_rate=0.01, optimizer="adamw", val_images=6)


FLOAT32 = Execution(precision="float32")


def mean_loss(model, tokens) -> float:
    """The mean AR loss over images (N, T), computed plainly."""
    images = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(images).transpose(1, 2), images).item()


@given(st.integers(0, 50), st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_schedule_rises_then_falls_to_exactly_zero(warmup, rest):
    rates = [schedule(s, warmup, max(0, s - warmup) / rest) for s in range(warmup + rest + 1)]
    assert rates[-1] == 0
    assert rates[warmup] == 1
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 <= r <= 1 for r in rates)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_by_one_optimizer(optimizer):
    model = build_model(model_config("igpt-tiny", resolution=4, n_vocab=7))
    made = make_optimizers(model, optimizer, 0.1, (0.9, 0.95))
    ids = [id(p) for o in made for g in o.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [type(o).__name__ for o in made] == {"adamw": ["AdamW"], "muon": ["AdamW", "Muon"]}[optimizer]


def test_adam_without_decay_is_the_papers():
    """Three steps against the formulas of Adam in float64."""
    model = build_model(model_config("igpt-tiny", resolution=2, n_vocab=5))
    (optimizer,) = make_optimizers(model, "adamw", 0.01, (0.9, 0.95))
    p = model.wpe  # neither clipped nor decayed
    x, m, v = p.detach().double().numpy().copy(), 0.0, 0.0
    for t in range(1, 4):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        g = p.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        x -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), x, atol=1e-6)


def test_decay_is_for_matrices_that_multiply():
    model = build_model(model_config("igpt-tiny", resolution=4, n_vocab=7))
    for optimizer in ("adamw", "muon"):
        made = make_optimizers(model, optimizer, 0.1, (0.9, 0.95), weight_decay=0.3)
        decayed = {id(p) for o in made for g in o.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
        expected = {n for n, p in model.named_parameters() if p.ndim == 2 and n not in ("wte.weight", "wpe")}
        assert {n for n, p in model.named_parameters() if id(p) in decayed} == expected


def test_the_gradient_is_clipped_to_a_norm():
    model = build_model(model_config("igpt-tiny", resolution=2, n_vocab=5))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    flat = np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])
    assert clip_gradient(model, None).item() == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    clip_gradient(model, 0.5)
    after = np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])
    np.testing.assert_allclose(after, flat * 0.5 / np.linalg.norm(flat), rtol=1e-4, atol=1e-9)


def test_a_run_learns_and_leaves_a_whole_model_directory(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    seen = []
    recipe = PretrainSettings(steps=60, batch_size=8, learning_rate=0.003, optimizer="adamw")
    done = pretrain(tokens, tmp_path / "run", recipe, FLOAT32, device="cpu", on_record=seen.append)
    records = read_metrics(done.run)
    steps = [r for r in records if "loss" in r]
    assert steps[0]["loss"] == pytest.approx(math.log(8), abs=1e-5)
    assert [r["step"] for r in steps] == list(range(1, 61)) == [r["step"] for r in seen if "loss" in r]
    assert set(steps[0]) == {
        "step", "epoch", "tokens", "loss", "lr", "grad_norm", "seconds", "tokens_per_second", "mfu", "memory"
    }  # fmt: skip
    assert (steps[-1]["tokens"], steps[-1]["epoch"]) == (60 * 8 * 16, round(60 * 8 / 58, 4))
    # Two stripes of eight equal pixels: 14 of 16 pixels are certain once copying is learnt.
    assert done.train_loss < 0.7 * math.log(8)
    assert seen[-1]["fraction"] == 1
    validated = read_metrics(done.run, lambda r: "val_loss" in r)
    assert [r["step"] for r in validated] == [8, 16, 24, 32, 40, 48, 56, 60]  # each epoch, and the end
    assert validated[-1]["val_loss"] == pytest.approx(done.val_loss, rel=1e-6)
    loaded = load_model(done.run)
    assert loaded.palette.sha256 == tokens.palette.sha256
    _, val_rows = held_out(64, 0.1, 0)
    assert mean_loss(loaded.model, tokens.split("train").tokens[val_rows]) == pytest.approx(done.val_loss, abs=1e-6)
    config = read_config(done.run)
    assert config["result"]["status"] == "done"
    assert config["training"]["warmup_steps"] == 6
    assert config["data"]["n_train"] == 58
    assert config["machine"]["micro_batch"] == 8


def test_accumulated_and_recomputed_steps_are_the_same_steps(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    recipe = replace(QUICK, n_layer=3, batch_size=8, clip=0.1)
    ways = {
        "whole": FLOAT32,
        "parts": replace(FLOAT32, accumulate=4),
        "single": replace(FLOAT32, micro_batch=1),
        "again": replace(FLOAT32, recompute=True),
    }
    runs = {}
    for name, execution in ways.items():
        run = pretrain(tokens, tmp_path / name, recipe, execution, device="cpu").run
        runs[name] = [(r["loss"], r["grad_norm"]) for r in read_metrics(run, lambda r: "loss" in r)]
        assert read_config(run)["machine"]["accumulate"] == {"parts": 4, "single": 8}.get(name, 1)
    for name in ("parts", "single", "again"):
        np.testing.assert_allclose(runs[name], runs["whole"], rtol=2e-5, err_msg=name)


def test_bert_runs_are_trained_and_validated_on_masked_pixels(toy_tokens, tmp_path):
    from igpt_cli.tokens.loader import fixed_mask

    tokens = open_tokens(toy_tokens())
    recipe = replace(QUICK, objective="bert", n_layer=3, mask_prob=0.4, steps=30)
    done = pretrain(tokens, tmp_path / "run", recipe, FLOAT32, device="cpu")
    assert read_config(done.run)["model"]["objective"] == "bert"
    _, rows = held_out(64, 0.1, 0)
    images = torch.from_numpy(tokens.split("train").tokens[rows].astype(np.int64))
    mask = fixed_mask(rows, 16, 0.4, 0)
    with torch.no_grad():
        logits = load_model(done.run).model(images, torch.from_numpy(mask))
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), images, reduction="none").double().numpy()
    expected = np.mean([nats[i][mask[i]].mean() for i in range(len(rows))])
    assert done.val_loss == pytest.approx(expected, abs=1e-6)
    assert done.val_loss < math.log(8)


def test_a_resolved_recipe_can_be_fed_back(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    first = pretrain(tokens, tmp_path / "a", replace(QUICK, n_layer=2, clip=0.7, augment="flip"), FLOAT32, device="cpu")
    recipe, execution = read_settings(tmp_path / "a" / "config.json")
    assert recipe.sizes == {"n_layer": 2}
    again = pretrain(tokens, tmp_path / "b", recipe, execution, device="cpu")
    assert again.train_loss == first.train_loss
    was, now = read_config(first.run), read_config(again.run)
    for part in ("model", "training", "execution", "machine", "data"):
        assert now[part] == was[part]
    assert resolve_settings(recipe, 58, 4, "cpu") == ResolvedPretrain(**asdict(recipe))


def test_the_same_seed_gives_the_same_weights(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2**32 - 1)):
        torch.manual_seed(len(runs))  # whatever the caller's own random state is
        run = pretrain(tokens, tmp_path / name, replace(QUICK, seed=seed), device="cpu").run
        runs[name] = load_model(run).model.state_dict()
    assert all(torch.equal(runs["a"][k], runs["b"][k]) for k in runs["a"])
    assert not any(torch.equal(runs["a"]["wpe"], runs[name]["wpe"]) for name in "cd")


def test_one_step_is_the_plain_computation(toy_tokens, tmp_path):
    """The first update against autograd and torch.optim used directly."""
    tokens = open_tokens(toy_tokens())
    recipe = replace(QUICK, steps=1, warmup_steps=0)
    got = load_model(pretrain(tokens, tmp_path / "run", recipe, FLOAT32, device="cpu").run).model
    torch.manual_seed(0)
    model = build_model(model_config("igpt-tiny", resolution=4, n_vocab=8))
    rows, _ = held_out(64, 0.1, 0)
    batch = torch.from_numpy(TokenLoader(tokens.split("train").tokens, 4, 4, seed=0, indices=rows).batch(0))
    logits = model(batch)
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch).backward()
    torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.95)).step()
    for (name, p), q in zip(model.named_parameters(), got.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


def test_a_split_val_is_used_for_validation(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens(splits=("train", "val", "test")))
    done = pretrain(tokens, tmp_path / "run", QUICK, FLOAT32, device="cpu")
    rows = np.linspace(0, 63, 6).astype(int)  # spread over the file, not its beginning
    expected = mean_loss(load_model(done.run).model, tokens.split("val").tokens[rows])
    assert done.val_loss == pytest.approx(expected, abs=1e-6)
    assert read_config(done.run)["data"]["n_train"] == 64


def test_validation_tells_when_it_rises_and_keeps_the_best(toy_tokens, tmp_path, monkeypatch):
    from igpt_cli.training.pretrain import Pretraining

    losses = iter([2.0, 1.5, 1.7, 1.6, 1.9, 1.9])
    monkeypatch.setattr(Pretraining, "validate", lambda self, objective, give_up: {"val_loss": next(losses)})
    told = []
    execution = Execution(eval_every=2, keep=1)
    done = pretrain(open_tokens(toy_tokens()), tmp_path / "run", QUICK, execution, device="cpu", on_event=told.append)
    assert [t.split(":")[0] for t in told] == [
        "the held-out loss rose from 1.5000 to 1.7000",
        "the held-out loss rose from 1.6000 to 1.9000",
    ]
    assert "the best, 1.5000 at step 4, stays in checkpoints/best" in told[0]
    assert done.best == {"step": 4, "val_loss": 1.5}
    folders = sorted(p.name for p in (done.run / "checkpoints").iterdir())
    assert folders == ["best", "step-12", "step-4"]
    assert load_model(done.run / "checkpoints" / "best").path.name == "step-4"


def test_a_gradient_that_is_not_finite_stops_and_keeps_good_weights(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    recipe = PretrainSettings(steps=40, batch_size=4, learning_rate=1e30, warmup_steps=0, optimizer="adamw")
    with pytest.raises(
        NonFiniteError, match=r"the gradient became (nan|inf) at step 2 .*the weights of step 1 are kept"
    ):
        pretrain(tokens, tmp_path / "run", recipe, FLOAT32, device="cpu")
    assert read_config(tmp_path / "run")["result"]["status"].startswith("failed: the gradient became")
    kept = load_model(tmp_path / "run").model  # load_model refuses weights that are not finite
    once = pretrain(tokens, tmp_path / "once", replace(recipe, steps=1), FLOAT32, device="cpu").run
    # The rate of a run of one step is the same in its first step.
    assert torch.equal(kept.wpe, load_model(once).model.wpe)


def test_an_interrupt_in_python_keeps_what_is_saved(toy_tokens, tmp_path):
    def interrupt(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted at step .* without saving it; earlier checkpoints are in"):
        pretrain(open_tokens(toy_tokens()), tmp_path / "run", QUICK, device="cpu", on_record=interrupt)
    assert read_config(tmp_path / "run")["result"]["status"] == "interrupted"


def test_a_budget_ends_the_run_and_the_learning_rate_falls_by_the_clock(toy_tokens, tmp_path, monkeypatch):
    import threading
    from types import SimpleNamespace

    now = [0.0]

    def clock():
        if threading.current_thread() is threading.main_thread():
            now[0] += 1.0
        return now[0]

    monkeypatch.setattr("igpt_cli.training.loop.time", SimpleNamespace(monotonic=clock))
    recipe = PretrainSettings(budget=100, batch_size=4, warmup_steps=2, learning_rate=0.01, optimizer="adamw")
    done = pretrain(open_tokens(toy_tokens()), tmp_path / "run", recipe, device="cpu")
    rates = [r["lr"] for r in read_metrics(done.run) if "loss" in r]
    assert done.status == "done"
    assert 10 < done.steps == len(rates)
    assert rates[:2] == [0.005, 0.01]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.001


def test_recipes_are_resolved_from_preset_data_and_device():
    cpu, gpu = "cpu", "cuda"
    found = resolve_settings(PretrainSettings(budget=CPU_BUDGET), 1000, 32, cpu)
    assert (found.steps, found.budget, found.batch_size, found.warmup_steps) == (None, 110.0, 4, 20)
    assert (found.val_images, resolve_settings(PretrainSettings(), 1000, 32, gpu).val_images) == (128, None)
    assert resolve_settings(PretrainSettings(epochs=2, batch_size=10), 1000, 32, cpu).steps == 200
    assert resolve_settings(PretrainSettings(epochs=2, batch_size=10, steps=50), 1000, 32, cpu).steps == 50
    paper = resolve_settings(PretrainSettings(model="igpt-s"), 1_281_167, 32, gpu)
    assert (paper.batch_size, paper.steps, paper.warmup_steps) == (128, 1_000_000, 10_009)  # one epoch
    assert (paper.optimizer, paper.betas, paper.weight_decay, paper.clip) == ("adamw", (0.9, 0.95), 0.0, None)


@pytest.mark.parametrize(
    ("model", "objective", "resolution", "rate", "batch", "steps"),
    [
        ("igpt-s", "ar", 32, 0.003, 128, 1_000_000),
        ("igpt-m", "ar", 32, 0.003, 128, 1_000_000),
        ("igpt-l", "ar", 32, 0.001, 128, 1_000_000),
        ("igpt-l", "ar", 48, 0.01, 128, 1_000_000),
        ("igpt-xl", "ar", 64, 0.0003, 64, 2_000_000),
        ("igpt-s", "bert", 32, 0.01, 128, 1_000_000),
        ("igpt-m", "bert", 32, 0.003, 128, 1_000_000),
        ("igpt-l", "bert", 32, 0.001, 128, 1_000_000),
    ],
)
def test_presets_carry_the_papers_recipe(model, objective, resolution, rate, batch, steps):
    recipe = resolve_settings(PretrainSettings(model=model, objective=objective), 1_230_000, resolution, "cuda")
    assert (recipe.learning_rate, recipe.batch_size, recipe.steps) == (rate, batch, steps)


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m", 5400), ("1d", 86400), (9, 9)]
)
def test_durations(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "5x", "m", "1h 30m", "nan", "inf", "1e3"])
def test_no_durations(text):
    with pytest.raises(InputError, match="is not a duration; write seconds"):
        seconds(text)


def test_checkpoints_by_steps_or_time():
    assert (save_interval(500), save_interval("500"), save_interval("15m")) == ((500, None), (500, None), (None, 900.0))
    with pytest.raises(InputError, match="save_every is '0'; write a number of steps"):
        save_interval("0")
    with pytest.raises(InputError, match="keep is 0, expected at least 1; give micro_batch or accumulate, not both"):
        check(Execution(micro_batch=1, accumulate=2, keep=0))


def test_all_problems_of_a_recipe_are_told_together():
    bad = PretrainSettings(batch_size=0, learning_rate=-1, optimizer="sgd", augment="blur", objective="mlm")
    with pytest.raises(InputError) as told:
        resolve_settings(bad, 100, 32, "cpu")
    for part in (
        "batch_size is 0",
        "learning_rate is -1",
        "optimizer is 'sgd'",
        "augment is 'blur'",
        "objective is 'mlm'",
    ):
        assert part in str(told.value)


@given(st.integers(2, 400), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_held_out_rows_are_a_partition(n, part, seed):
    train, val = held_out(n, part, seed)
    assert sorted([*train, *val]) == list(range(n))
    assert 1 <= len(val) <= max(1, round(part * n))


def test_devices_and_precisions():
    assert devices.choose_device("cpu").type == "cpu"
    assert devices.choose_device("auto").type in ("cpu", "cuda", "mps")
    assert devices.choose_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    with pytest.raises(InputError, match="there is no device 'tpu'"):
        devices.choose_device("tpu")
    with pytest.raises(InputError, match="precision is 'float16'"):
        devices.choose_precision("float16", torch.device("cpu"))
    with pytest.raises(InputError, match=r"device cuda:99 is not here: PyTorch .* sees \d+ GPUs"):
        devices.choose_device("cuda:99")


def test_what_cannot_be_trained_or_written(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    with pytest.raises(MismatchError, match="batch_size 59 is more than the 58 training images"):
        pretrain(tokens, tmp_path / "run", PretrainSettings(steps=1, batch_size=59), device="cpu")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        pretrain(tokens, tmp_path / "notes", QUICK, device="cpu")
    with pytest.raises(OutputError, match=r"is not a run \(it has no config.json\)"):
        pretrain(tokens, tmp_path / "notes", QUICK, device="cpu", force=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    with pytest.raises(InputError, match="has no split 'train'"):
        pretrain(open_tokens(toy_tokens(tmp_path / "t.h5", splits=("test",))), tmp_path / "run", QUICK, device="cpu")
    with pytest.raises(InputError, match="has 1 image; one to train and one to validate"):
        pretrain(open_tokens(toy_tokens(tmp_path / "one.h5", n=1)), tmp_path / "run", QUICK, device="cpu")
    assert not (tmp_path / "run").exists()


def test_force_replaces_a_run(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    pretrain(tokens, tmp_path / "run", QUICK, device="cpu")
    pretrain(tokens, tmp_path / "run", replace(QUICK, steps=2), device="cpu", force=True)
    assert len(read_metrics(tmp_path / "run", lambda r: "loss" in r)) == 2
