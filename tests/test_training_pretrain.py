"""Pretraining: the loss, the optimizers, the schedule, and what a run leaves on disk however it ends."""

from __future__ import annotations

import math

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
from igpt_cli.training.objectives import ar_loss
from igpt_cli.training.optim import make_optimizers, schedule
from igpt_cli.training.pretrain import CPU_TIME_LIMIT, Recipe, held_out, mean_loss, pretrain, resolve_recipe

QUICK = Recipe(steps=12, batch_size=4, learning_rate=0.01, optimizer="adamw", val_images=6)


def test_ar_loss_is_the_mean_negative_log_likelihood():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    x = logits.double().numpy()
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = -np.mean([log_p[b, t, tokens[b, t]] for b in range(3) for t in range(5)])
    loss = ar_loss(lambda _: logits, tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)


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
    p = model.wpe
    x, m, v = p.detach().double().numpy().copy(), 0.0, 0.0
    for t in range(1, 4):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        g = p.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        x -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), x, atol=1e-6)


def test_a_run_learns_and_leaves_a_whole_model_directory(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    seen = []
    done = pretrain(
        tokens, tmp_path / "run", Recipe(steps=60, batch_size=8, learning_rate=0.003, optimizer="adamw"),
        device="cpu", on_step=seen.append,
    )  # fmt: skip
    records = read_metrics(done.run)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[0] == pytest.approx(math.log(8), abs=1e-5)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 61)) == [r["step"] for r in seen]
    # Two stripes of eight equal pixels: 14 of 16 pixels are certain once copying is learnt.
    assert done.train_loss < 0.7 * math.log(8)
    assert seen[-1]["fraction"] == 1
    assert read_metrics(done.run, lambda r: "val_loss" in r) == [{"step": 60, "val_loss": round(done.val_loss, 6)}]
    loaded = load_model(done.run)
    assert loaded.palette.sha256 == tokens.palette.sha256
    _, val_rows = held_out(64, 0.1, 0)
    again = mean_loss(loaded.model, tokens.split("train").tokens[val_rows], 8, torch.device("cpu"))
    assert again == pytest.approx(done.val_loss, abs=1e-6)
    config = read_config(done.run)
    assert config["result"]["status"] == "done"
    assert config["training"]["warmup_steps"] == 6
    assert config["data"]["n_train"] == 58


def test_the_same_seed_gives_the_same_weights(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))  # whatever the caller's own random state is
        run = pretrain(tokens, tmp_path / name, Recipe(**{**QUICK.__dict__, "seed": seed}), device="cpu").run
        runs[name] = load_model(run).model.state_dict()
    assert all(torch.equal(runs["a"][k], runs["b"][k]) for k in runs["a"])
    assert not torch.equal(runs["a"]["wpe"], runs["c"]["wpe"])


def test_one_step_is_the_plain_computation(toy_tokens, tmp_path):
    """The first update against autograd and torch.optim used directly."""
    tokens = open_tokens(toy_tokens())
    recipe = Recipe(**{**QUICK.__dict__, "steps": 1, "warmup_steps": 0})
    got = load_model(pretrain(tokens, tmp_path / "run", recipe, device="cpu").run).model
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
    done = pretrain(tokens, tmp_path / "run", QUICK, device="cpu")
    expected = mean_loss(load_model(done.run).model, tokens.split("val").tokens[:6], 4, torch.device("cpu"))
    assert done.val_loss == pytest.approx(expected, abs=1e-6)
    assert read_config(done.run)["data"]["n_train"] == 64


def test_a_non_finite_loss_stops_and_keeps_good_weights(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())
    recipe = Recipe(steps=40, batch_size=4, learning_rate=1e30, warmup_steps=0, optimizer="adamw")
    with pytest.raises(NonFiniteError, match=r"the loss became (nan|inf) at step \d+ .*the weights of step 0 are kept"):
        pretrain(tokens, tmp_path / "run", recipe, device="cpu")
    assert read_config(tmp_path / "run")["result"]["status"] == "non-finite loss"
    kept = load_model(tmp_path / "run").model  # load_model refuses weights that are not finite
    torch.manual_seed(0)
    first = build_model(model_config("igpt-tiny", resolution=4, n_vocab=8))
    assert torch.equal(kept.wpe, first.wpe)


def test_an_interrupt_keeps_the_weights_so_far(toy_tokens, tmp_path):
    tokens = open_tokens(toy_tokens())

    def interrupt(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted after step 3; the weights so far are in"):
        pretrain(tokens, tmp_path / "run", QUICK, device="cpu", on_step=interrupt)
    result = read_config(tmp_path / "run")["result"]
    assert (result["status"], result["steps"]) == ("interrupted", 3)
    assert not torch.equal(load_model(tmp_path / "run").model.wtet.weight, torch.zeros(8, 64))


def test_a_time_limit_ends_the_run_and_the_learning_rate_falls_by_the_clock(toy_tokens, tmp_path, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr("igpt_cli.training.pretrain.time.monotonic", lambda: float(next(ticks)))
    recipe = Recipe(time_limit=30, batch_size=4, warmup_steps=2, learning_rate=0.01, optimizer="adamw")
    done = pretrain(open_tokens(toy_tokens()), tmp_path / "run", recipe, device="cpu")
    rates = [r["learning_rate"] for r in read_metrics(done.run) if "loss" in r]
    assert done.steps == len(rates) == 10  # three looks at the clock a step
    assert rates[:3] == [0.005, 0.01, 0.01]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.0005


def test_recipes_are_resolved_from_preset_data_and_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = resolve_recipe(Recipe(), 1000, cpu)
    assert (found.steps, found.time_limit, found.batch_size) == (None, CPU_TIME_LIMIT, 4)
    assert resolve_recipe(Recipe(epochs=2, batch_size=10), 1000, cpu).steps == 200
    assert resolve_recipe(Recipe(epochs=2, batch_size=10, steps=50), 1000, cpu).steps == 50
    if torch.cuda.is_available():
        assert resolve_recipe(Recipe(model="igpt-s"), 1_281_167, gpu).steps == 1_000_000
    paper = resolve_recipe(Recipe(model="igpt-s", steps=1_000_000), 1_281_167, cpu)
    assert (paper.batch_size, paper.learning_rate, paper.warmup_steps) == (128, 0.003, 10_009)  # one epoch
    assert (paper.optimizer, paper.betas) == ("adamw", (0.9, 0.95))


def test_all_problems_of_a_recipe_are_told_together():
    bad = Recipe(batch_size=0, learning_rate=-1, optimizer="sgd", augment="blur", objective="mlm")
    with pytest.raises(InputError) as told:
        resolve_recipe(bad, 100, torch.device("cpu"))
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
        pretrain(tokens, tmp_path / "run", Recipe(steps=1, batch_size=59), device="cpu")
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
    pretrain(tokens, tmp_path / "run", Recipe(**{**QUICK.__dict__, "steps": 2}), device="cpu", force=True)
    assert len(read_metrics(tmp_path / "run", lambda r: "loss" in r)) == 2
