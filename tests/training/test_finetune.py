"""Fine-tuning: the joint loss, what is trained and tested on what, and that it is a run like any other."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from training_runs import assert_same_run, hidden_files, records, start, stop_at

from igpt_cli.errors import FormatError, InputError, Interrupted, MismatchError, NonFiniteError, OutputError
from igpt_cli.model_dir import load_model, read_config, read_metrics, write_config
from igpt_cli.models.igpt import IGPT, IGPTConfig
from igpt_cli.palette.palette import Palette
from igpt_cli.statistics import wilson
from igpt_cli.tokens.loader import TokenLoader, fixed_mask
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.writer import TokenWriter
from igpt_cli.training.checkpoint import best_checkpoint, checkpoints
from igpt_cli.training.finetune import Finetuning, pretraining_of, resolve_settings
from igpt_cli.training.labelled import labelled
from igpt_cli.training.objectives import Joint, Objective
from igpt_cli.training.run import finetune, pretrain, resume
from igpt_cli.training.settings import Execution, FinetuneSettings, PretrainSettings

FLOAT32 = Execution(precision="float32")
QUICK = FinetuneSettings(steps=12, batch_size=6, learning_rate=0.01, warmup_steps=2)


def write(path, n=66, classes=("dark", "middle", "light"), labels=None, splits=("train", "test"), seed=5, shade=0):
    """Images of 5x5 whose classes are told by colour, if `labels` do not say otherwise."""
    palette = Palette((np.linspace(10, 240, 9)[:, None].repeat(3, 1) + shade).astype(np.float32))
    rng = np.random.default_rng(seed)
    with TokenWriter(path, palette, 5, classes=classes, source="toy") as writer:
        for split in splits:
            shown = np.arange(n) % len(classes)
            tokens = rng.integers(3, size=(n, 25)) + 3 * shown[:, None]
            writer.append(split, tokens, shown if labels is None else labels(n), [f"{split}/{i}" for i in range(n)])
    return open_tokens(path)


@pytest.fixture
def tokens(tmp_path):
    return write(tmp_path / "toy.h5")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """{objective: a model of two blocks}, pretrained for a moment."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokens = write(folder / "toy.h5")
    recipe = PretrainSettings(n_layer=2, n_embd=16, steps=15, batch_size=6, learning_rate=0.01, optimizer="adamw")
    return {
        objective: load_model(
            pretrain(tokens, folder / objective, replace(recipe, objective=objective), FLOAT32, device="cpu").run
        )
        for objective in ("ar", "bert")
    }


def tune(model, tokens, out, tuning=QUICK, execution=FLOAT32, **more):
    return finetune(model, tokens, out, tuning, execution, device="cpu", **more)


def with_head(objective="ar", head_layer=None, n_classes=3, seed=0):
    """A small model all of whose tensors are random, the heads, too."""
    torch.manual_seed(seed)
    model = IGPT(IGPTConfig(2, 2, 16, 4, 7, objective, n_classes, head_layer))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch_of(model, n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.n_vocab, (n, model.config.n_ctx), generator=generator)
    labels = torch.randint(model.config.n_classes, (n,), generator=generator)
    mask = torch.rand(tokens.shape, generator=generator) < 0.3
    mask[0] = False  # an image that the mask leaves whole
    return (tokens, labels, mask) if model.config.objective == "bert" else (tokens, labels)


# The loss


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("head_layer", [None, 0, 1])
def test_the_joint_loss_is_the_plain_computation(objective, head_layer):
    """Against NumPy in float64, from logits and from the features that a probe gets."""
    model = with_head(objective, head_layer)
    tokens, labels, *masks = batch_of(model)
    mask = masks[0] if masks else None
    joint = Joint(model, 0.7, 1.3).eval()
    with torch.no_grad():
        found = joint(tokens, labels, mask).double().numpy()
        logits = model(tokens, mask).double().numpy()
        layer = model.n_layers if head_layer is None else head_layer
        features = model.features(tokens, [layer], mask=mask)[layer].double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, tokens.numpy()[..., None], -1)[..., 0]
    counted = np.ones_like(nats) if mask is None else mask.numpy()
    gen = np.array([n[c > 0].mean() if c.any() else 0.0 for n, c in zip(nats, counted)])
    scores = features @ model.wclf.weight.detach().double().numpy().T
    log_q = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    clf = -log_q[np.arange(5), labels.numpy()]
    right = scores.argmax(1) == labels.numpy()
    expected = np.stack([0.7 * gen + 1.3 * clf, gen, clf, 100.0 * right, scores.argmax(1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(joint.train()(tokens, labels, mask).detach(), expected[:, :4], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_the_generative_part_is_that_of_pretraining(objective):
    model = with_head(objective)
    tokens, labels, *mask = batch_of(model)
    torch.testing.assert_close(Joint(model)(tokens, labels, *mask)[:, 1], Objective(model)(tokens, *mask))
    torch.testing.assert_close(
        Joint(model, 0.5, 0.0)(tokens, labels, *mask)[:, 0], 0.5 * Objective(model)(tokens, *mask)
    )


def test_gradients_are_those_of_the_weighted_sum():
    model = with_head()
    tokens, labels = batch_of(model)
    Joint(model, 2.0, 3.0)(tokens, labels)[:, 0].sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.hidden(tokens)
    gen = torch.nn.functional.cross_entropy(model.wtet(hidden).flatten(0, 1), tokens.flatten(), reduction="sum")
    clf = torch.nn.functional.cross_entropy(model.wclf(hidden.mean(1)), labels, reduction="sum")
    (2 * gen / tokens.shape[1] + 3 * clf).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_blocks_above_the_head_serve_the_generative_loss_alone():
    for gen_weight, served in ((0.0, False), (1.0, True)):
        model = with_head(head_layer=1)
        Joint(model, gen_weight, 1.0)(*batch_of(model))[:, 0].sum().backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        above = {
            n for n, _ in model.named_parameters() if n.startswith(("h.1.attn", "h.1.mlp", "h.1.ln_2", "ln_f", "wtet"))
        }
        assert {"wclf.weight", "h.0.attn.c_attn.weight", "h.1.ln_1.g", "wte.weight", "sos"} <= moved
        assert (moved & above == above) is served
        assert (moved & above == set()) is not served


def test_classes_are_computed_in_float32_under_autocast():
    model = with_head()
    tokens, _ = batch_of(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, classes = model.hidden_and_classes(tokens)
    assert classes.dtype == torch.float32
    torch.testing.assert_close(classes, hidden.float().mean(1) @ model.wclf.weight.T)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_classes": 1}, "n_classes is 1, expected a whole number of at least 2"),
        ({"n_classes": 3, "head_layer": 3}, "head_layer is 3, expected one of 0 to 2"),
        ({"head_layer": 1}, "head_layer is 1, and there is no head"),
    ],
)
def test_heads_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        IGPTConfig(2, 2, 16, 4, 7, **sizes)


# A run


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_classes_told_by_colour_are_learnt_and_the_run_says_all(pretrained, tokens, tmp_path, objective):
    told = []
    done = tune(pretrained[objective], tokens, tmp_path / "run", replace(QUICK, steps=60), on_start=told.append)
    assert (done.status, done.accuracy, done.n_test) == ("done", 100.0, 66)
    assert done.interval == wilson(66, 66)
    steps = [r for r in read_metrics(done.run) if "loss" in r]
    first = steps[0]
    assert first["clf_loss"] == pytest.approx(math.log(3), abs=1e-6)  # the head begins at 0
    assert first["loss"] == pytest.approx(first["gen_loss"] + first["clf_loss"], rel=1e-6)
    assert [r["lr"] for r in steps] == [0.005] + [0.01] * 59
    assert steps[-1]["accuracy"] == 100
    validated = [r for r in read_metrics(done.run) if "val_loss" in r]
    assert [r["step"] for r in validated] == [10, 20, 30, 40, 50, 60]
    assert set(validated[0]) == {
        "step", "epoch", "val_loss", "val_gen_loss", "val_clf_loss", "val_accuracy", "val_seconds"
    }  # fmt: skip
    config, base = read_config(done.run), pretrained[objective]
    assert config["model"] == {**base.config["model"], "n_classes": 3, "head_layer": 2}
    assert config["data"]["classes"] == ["dark", "middle", "light"]
    assert {k: config["data"][k] for k in ("n_train", "n_val", "n_test", "left_out")} == {
        "n_train": 57, "n_val": 9, "n_test": 66, "left_out": {}
    }  # fmt: skip
    assert config["finetuned_from"]["path"] == str(base.path)
    assert len(config["finetuned_from"]["sha256"]) == 64
    expected = {"status": "done", "accuracy": 100.0, "val_accuracy": 100.0, "n_test": 66, "best": done.best}
    assert {k: config["result"][k] for k in expected} == expected
    assert told[0]["training"]["learning_rate"] == 0.01
    assert set(load_model(done.run).model.state_dict()) == {*base.model.state_dict(), "wclf.weight"}


@pytest.mark.parametrize(("decay", "head"), [(1.0, None), (0.5, None), (0.5, 0.07)])
def test_the_first_update_is_the_plain_computation(pretrained, tokens, tmp_path, decay, head):
    """With a decay by layers: the heads have the whole rate, block 1 a half, block 0 a quarter, the rest an eighth.

    The class head may have another one.
    """
    tuning = replace(QUICK, steps=1, warmup_steps=0, clf_weight=0.5, layer_decay=decay, head_learning_rate=head)
    got = load_model(tune(pretrained["ar"], tokens, tmp_path / "run", tuning).run).model
    data = labelled(tokens, tuning)
    loader = TokenLoader(tokens.split("train").tokens, 5, 6, indices=data.rows)
    batch, labels = torch.from_numpy(loader.batch(0)), tokens.split("train").labels[loader.batch_indices(0)]
    model = IGPT(got.config)
    model.load_state_dict({**pretrained["ar"].model.state_dict(), "wclf.weight": torch.zeros(3, 16)})
    gen = torch.nn.functional.cross_entropy(model(batch).transpose(1, 2), batch)
    classes = model.wclf(model.hidden(batch).mean(1))
    (gen + 0.5 * torch.nn.functional.cross_entropy(classes, torch.from_numpy(labels).long())).backward()
    above = {"h.0": 2, "h.1": 1, "ln_f": 0, "wtet": 0, "wclf": 0}
    steps = {name: above.get(name[:3], above.get(name.split(".")[0], 3)) for name, _ in model.named_parameters()}
    groups = [{"params": [p], "lr": 0.01 * decay ** steps[name]} for name, p in model.named_parameters()]
    if head:
        groups[[name for name, _ in model.named_parameters()].index("wclf.weight")]["lr"] = head
    torch.optim.Adam(groups, betas=(0.9, 0.95)).step()
    for (name, p), q in zip(model.named_parameters(), got.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)
    found = read_config(tmp_path / "run")["training"]
    assert (found["layer_decay"], found["head_learning_rate"]) == (decay, head)


def test_from_scratch_begins_with_fresh_weights(pretrained, tokens, tmp_path):
    first = {}
    for scratch in (False, True):
        run = tune(pretrained["ar"], tokens, tmp_path / str(scratch), replace(QUICK, from_scratch=scratch)).run
        first[scratch] = read_metrics(run)[0]["gen_loss"]
    assert first[True] == pytest.approx(math.log(9), abs=1e-6)
    assert first[False] < first[True] - 0.05
    assert not torch.equal(load_model(tmp_path / "True").model.wpe, load_model(tmp_path / "False").model.wpe)
    assert read_config(tmp_path / "True")["training"]["from_scratch"] is True


def test_a_fine_tuned_model_is_still_a_pixel_model(pretrained, tokens, tmp_path):
    """It is evaluated, its features are read, and it can be fine-tuned again, with other classes."""
    from igpt_cli.evaluation.pixels import evaluate

    run = tune(pretrained["ar"], tokens, tmp_path / "run").run
    loaded = load_model(run)
    found = evaluate(loaded, tokens)
    with torch.no_grad():
        images = torch.from_numpy(tokens.split("test").tokens.astype(np.int64))
        plain = torch.nn.functional.cross_entropy(loaded.model(images).transpose(1, 2), images).item()
    assert found.nats_per_token == pytest.approx(plain, rel=1e-5)
    assert set(loaded.model.features(images, range(3))) == {0, 1, 2}
    other = write(tmp_path / "two.h5", classes=("a", "b"))
    again = tune(loaded, other, tmp_path / "again")
    assert load_model(again.run).model.wclf.weight.shape == (2, 16)
    assert read_metrics(again.run)[0]["clf_loss"] == pytest.approx(math.log(2), abs=1e-6)


def predictions(run, tokens, rows, masks):
    """(M, N) classes by the loaded model, computed plainly; None as a mask shows it everything."""
    model = load_model(run).model
    images = torch.from_numpy(tokens[rows].astype(np.int64))
    with torch.no_grad():
        return np.stack(
            [
                (model.features(images, [2], mask=None if m is None else torch.from_numpy(m))[2] @ model.wclf.weight.T)
                .argmax(1)
                .numpy()
                for m in masks
            ]
        )


def noisy(n):
    """Labels of which a third is wrong, so that no accuracy is 100%."""
    labels = np.arange(n) % 3
    return np.where(np.arange(n) % 9 < 3, (labels + 1) % 3, labels)


@pytest.mark.parametrize("masks", [None, 0, 1, 4, 5])
def test_accuracies_are_those_of_the_weights_kept(pretrained, tmp_path, masks):
    """Against brute force: the mode over masks, ties at random by seed and row; on the held-out and the test images."""
    tokens = write(tmp_path / "noisy.h5", n=90, labels=noisy)
    tuning = replace(QUICK, bert_masks=masks, mask_prob=0.5, seed=3)
    base = pretrained["ar" if masks is None else "bert"]
    done = tune(base, tokens, tmp_path / "run", tuning, replace(FLOAT32, micro_batch=2))
    for split, accuracy in (("train", done.val_accuracy), ("test", done.accuracy)):
        part = tokens.split(split)
        rows = labelled(tokens, tuning).val.rows if split == "train" else np.arange(len(part))
        drawn = [fixed_mask(rows, 25, 0.5, 3, draw) for draw in range(masks)] if masks else [None]
        said = predictions(done.run, part.tokens, rows, drawn)
        right = 0
        for i, row in enumerate(rows):
            votes = np.bincount(said[:, i], minlength=3)
            first = np.flatnonzero(votes == votes.max())
            pick = first[0] if len(first) == 1 else np.random.default_rng([3, row]).choice(first)
            right += int(pick == part.labels[row])
        assert accuracy == pytest.approx(100 * right / len(rows))
        assert 0 < right < len(rows)
        if split == "test":
            assert done.interval == pytest.approx(wilson(right, len(rows)))


def test_validation_losses_are_means_over_the_held_out_images(pretrained, tokens, tmp_path):
    tuning = replace(QUICK, bert_masks=3, mask_prob=0.4, gen_weight=0.25)
    done = tune(pretrained["bert"], tokens, tmp_path / "run", tuning)
    val, joint = labelled(tokens, tuning).val, Joint(load_model(done.run).model).eval()
    images, truth = torch.from_numpy(val.split.tokens[val.rows].astype(np.int64)), torch.from_numpy(val.labels)
    with torch.no_grad():
        each = [joint(images, truth, torch.from_numpy(fixed_mask(val.rows, 25, 0.4, 0, m))) for m in range(3)]
    gen, clf = torch.stack(each).double().mean((0, 1))[1:3].tolist()
    assert done.best["val_gen_loss"] == pytest.approx(gen, rel=1e-5)
    assert done.best["val_clf_loss"] == pytest.approx(clf, rel=1e-5)
    assert done.val_loss == pytest.approx(0.25 * gen + clf, rel=1e-5)


# When it ends, and which weights it keeps


def scripted(monkeypatch, accuracies, losses=None):
    """Let validations find these, in turn."""
    found = iter(zip(accuracies, losses or [1.0] * len(accuracies)))

    def validate(self, objective, give_up):
        accuracy, loss = next(found)
        return {"val_loss": 2 * loss, "val_gen_loss": loss, "val_clf_loss": loss, "val_accuracy": accuracy}

    monkeypatch.setattr(Finetuning, "validate", validate)


def test_it_ends_early_and_keeps_and_tests_the_best(pretrained, tmp_path, monkeypatch):
    tokens = write(tmp_path / "noisy.h5", labels=noisy)
    scripted(monkeypatch, [50.0, 40.0, 70.0, 60.0, 70.0, 65.0, 99.0])
    done = tune(
        pretrained["ar"],
        tokens,
        tmp_path / "run",
        replace(QUICK, steps=100, patience=3),
        replace(FLOAT32, eval_every=4),
    )
    assert (done.status, done.steps, done.val_accuracy) == ("early stop", 24, 70.0)
    assert done.best["step"] == 12
    assert best_checkpoint(done.run) == "step-12"
    kept = (done.run / "model.safetensors").read_bytes()
    assert kept == (done.run / "checkpoints" / "step-12" / "model.safetensors").read_bytes()
    assert kept != (done.run / "checkpoints" / "step-24" / "model.safetensors").read_bytes()
    test = tokens.split("test")
    right = (predictions(done.run, test.tokens, np.arange(66), [None])[0] == test.labels).sum()
    assert done.accuracy == pytest.approx(100 * right / 66)
    again = resume(tokens, done.run, device="cpu")  # nothing is left to do
    assert replace(again, seconds=0) == replace(done, seconds=0)
    assert (done.run / "model.safetensors").read_bytes() == kept


def test_equal_accuracies_are_told_apart_by_the_loss(pretrained, tokens, tmp_path, monkeypatch):
    scripted(monkeypatch, [80.0, 80.0, 80.0, 70.0], [1.0, 0.9, 0.95, 0.1])
    execution = replace(FLOAT32, eval_every=3)
    done = tune(pretrained["ar"], tokens, tmp_path / "run", replace(QUICK, patience=0), execution)
    assert (done.status, done.best["step"], done.best["val_clf_loss"]) == ("done", 6, 0.9)


def test_a_run_without_test_labels_is_not_tested(pretrained, tmp_path):
    for name, splits, labels in (("none", ("train",), None), ("bare", ("train", "test"), None)):
        path = tmp_path / f"{name}.h5"
        tokens = write(path, splits=splits, labels=labels)
        if name == "bare":
            with TokenWriter(tmp_path / "b.h5", tokens.palette, 5, classes=tokens.classes) as writer:
                for split in splits:
                    part = tokens.split(split)
                    writer.append(
                        split, part.tokens, part.labels if split == "train" else -1 + 0 * part.labels, part.names
                    )
            tokens = open_tokens(tmp_path / "b.h5")
        done = tune(pretrained["ar"], tokens, tmp_path / name)
        assert (done.status, done.accuracy, done.interval, done.n_test) == ("done", None, None, None)
    assert read_config(done.run)["data"]["left_out"] == {"test": 66}


def test_learning_rates_are_searched_without_the_test_images(pretrained, tokens, tmp_path, monkeypatch):
    seen, real, told = [], Finetuning.classify, []

    def classify(self, objective, part, give_up=lambda: False):
        seen.append((self.settings.learning_rate, part.split.name))
        return real(self, objective, part, give_up)

    monkeypatch.setattr(Finetuning, "classify", classify)
    tuning = replace(QUICK, steps=50, learning_rate=None, lr_search=(1e-9, 0.02, 1e30))
    done = tune(pretrained["ar"], tokens, tmp_path / "run", tuning, on_event=told.append)
    assert [s for s in seen if s[1] == "test"] == [(0.02, "test")]
    assert seen[:2] == [(1e-9, "train"), (0.02, "train")]
    config = read_config(done.run)
    assert config["training"]["learning_rate"] == 0.02
    rows = config["search"]
    assert [(r["learning_rate"], r["steps"]) for r in rows] == [(1e-9, 5), (0.02, 5), (1e30, None)]
    assert rows[1]["val_clf_loss"] < rows[0]["val_clf_loss"]
    assert told[0] == "trying the learning rates 1e-09, 0.02, 1e+30, each for a tenth of the run"
    assert told[-2:] == [
        "learning rate 1e+30 is too large: the gradient became infinite",
        "learning rate 0.02 is taken",
    ]
    assert not (done.run / "search").exists()
    same = tune(pretrained["ar"], tokens, tmp_path / "same", replace(tuning, learning_rate=0.02, lr_search=None))
    assert_same_run(done.run, same.run)
    with pytest.raises(NonFiniteError, match=r"every learning rate tried is too large: 1e\+30, 1e\+31"):
        tune(pretrained["ar"], tokens, tmp_path / "bad", replace(tuning, lr_search=(1e30, 1e31)))


# Resumed, and on two ranks


@pytest.mark.parametrize(
    ("objective", "head_layer", "optimizer", "decay"),
    [("ar", None, "adamw", 1.0), ("bert", 1, "adamw", 0.7), ("ar", 1, "muon", 0.7)],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    pretrained, tokens, tmp_path, objective, head_layer, optimizer, decay
):
    base = pretrained[objective]
    tuning = replace(QUICK, steps=24, head_layer=head_layer, augment="crop-flip", clip=1.0, optimizer=optimizer)
    tuning = replace(tuning, layer_decay=decay, head_learning_rate=0.05 if decay < 1 else None)
    execution = replace(FLOAT32, accumulate=2, eval_every=5)
    tune(base, tokens, tmp_path / "whole", tuning, execution)
    run = tmp_path / "parts"
    for i, step in enumerate((3, 9, 17)):
        told = {"device": "cpu", "on_record": stop_at(step)}
        with pytest.raises(
            Interrupted, match=r"interrupted after step \d+, which is saved; resume with: igpt finetune -"
        ):
            resume(tokens, run, **told) if i else finetune(base, tokens, run, tuning, execution, **told)
        assert read_config(run)["result"]["accuracy"] is None
    torch.manual_seed(3)
    done = resume(tokens, run, device="cpu")
    assert (done.status, done.steps) == ("done", 24)
    assert_same_run(run, tmp_path / "whole")
    was, now = read_config(tmp_path / "whole")["result"], read_config(run)["result"]
    assert {k: v for k, v in now.items() if k not in ("run", "seconds")} == {
        k: v for k, v in was.items() if k not in ("run", "seconds")
    }


def test_a_run_from_before_rates_by_layers_goes_on(pretrained, tokens, tmp_path):
    tune(pretrained["ar"], tokens, tmp_path / "whole", replace(QUICK, steps=8))
    with pytest.raises(Interrupted):
        tune(pretrained["ar"], tokens, tmp_path / "old", replace(QUICK, steps=8), on_record=stop_at(3))
    for folder in (tmp_path / "old", *(tmp_path / "old" / "checkpoints").glob("step-*")):
        config = read_config(folder)
        del config["training"]["layer_decay"], config["training"]["head_learning_rate"]
        write_config(folder, config)
    resume(tokens, tmp_path / "old", device="cpu")
    assert_same_run(tmp_path / "old", tmp_path / "whole")
    with pytest.raises(MismatchError, match=r"layer_decay was 1\.0 and is now 0\.5"):
        resume(tokens, tmp_path / "old", {"layer_decay": 0.5}, device="cpu")


def test_patience_goes_on_where_it_was(pretrained, tokens, tmp_path, monkeypatch):
    scripted(monkeypatch, [50.0, 40.0, 30.0, 20.0, 90.0])
    tuning, execution = replace(QUICK, steps=90, patience=3), replace(FLOAT32, eval_every=4, save_every=1)
    with pytest.raises(Interrupted):
        tune(pretrained["ar"], tokens, tmp_path / "run", tuning, execution, on_record=stop_at(9))
    done = resume(tokens, tmp_path / "run", device="cpu")
    assert (done.status, done.steps, done.val_accuracy) == ("early stop", 16, 50.0)


def test_what_is_resumed_is_what_was_begun(pretrained, tokens, tmp_path):
    run = tune(pretrained["ar"], tokens, tmp_path / "run").run
    with pytest.raises(
        MismatchError, match=r"continues as it started, but head_layer was 2 and is now 1; patience was 5"
    ):
        resume(tokens, run, {"head_layer": 1, "patience": 2}, device="cpu")
    others = write(tmp_path / "others.h5", labels=noisy)
    with pytest.raises(MismatchError, match="but the labels are others now"):
        resume(others, run, device="cpu")
    with pytest.raises(
        InputError, match=f"is not a run of igpt pretrain; resume it with: igpt finetune --resume {run}"
    ):
        resume(tokens, run, task="pretrain", device="cpu")
    with pytest.raises(InputError, match="is not a run of igpt finetune; resume it with: igpt pretrain --resume"):
        resume(tokens, pretrained["ar"].path, task="finetune", device="cpu")
    for step in checkpoints(run):
        import shutil

        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    with pytest.raises(InputError, match="so it cannot be resumed; start a new run"):
        resume(tokens, run, device="cpu")


DRIVER = """
import json, os
from igpt_cli.model_dir import load_model
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.distributed import init_distributed
from igpt_cli.training.run import finetune
from igpt_cli.training.settings import Execution
from igpt_cli.training.settings import FinetuneSettings

with init_distributed("cpu") as (ranks, device):
    for name, base, tuning, execution in json.loads(open("jobs.json").read()):
        if tuning["lr_search"]:
            tuning["lr_search"] = tuple(tuning["lr_search"])
        model, tokens = load_model(base), open_tokens("toy.h5")
        told = {"device": device, "ranks": ranks}
        done = finetune(model, tokens, name, FinetuneSettings(**tuning), Execution(**execution), **told)
        line = f"{ranks.rank} {name} {done.status} {done.accuracy}\\n"
        os.write(1, line.encode())  # at once, so that no other rank's line comes between
os._exit(0)
"""


def test_two_ranks_do_what_one_does(pretrained, tmp_path):
    """Replicated and sharded, with a head on an inner layer, too: from one torchrun."""
    tokens = write(tmp_path / "toy.h5", labels=noisy)
    tuning = replace(QUICK, steps=10, clip=1.0, augment="flip", learning_rate=0.003, betas=(0.9, 0.95))
    tuning = replace(tuning, layer_decay=0.8, head_learning_rate=0.01)
    execution = replace(FLOAT32, eval_every=4, accumulate=3)
    jobs = {}
    for objective, head_layer, shard in (
        ("ar", None, "none"),
        ("bert", 1, "none"),
        ("ar", 1, "full"),
        ("bert", 2, "full"),
    ):
        its = replace(tuning, head_layer=head_layer, lr_search=(0.001, 0.003) if shard == "none" else None)
        jobs[f"{objective}-{head_layer}-{shard}"] = (objective, its, replace(execution, shard=shard))
    listed = [(n, str(pretrained[o].path), asdict(t), asdict(e)) for n, (o, t, e) in jobs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(listed))
    (tmp_path / "driver.py").write_text(DRIVER)
    process = start(cwd=tmp_path, ranks=2, script=tmp_path / "driver.py")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    said = [line.split() for line in stdout.splitlines()]
    for name, (objective, its, _) in jobs.items():
        alone = tune(pretrained[objective], tokens, tmp_path / f"alone-{name}", its, execution)
        ends = [line[2:] for line in said if line[1] == name]
        assert ends == [["done", str(alone.accuracy)]] * 2
        assert read_config(tmp_path / name)["machine"]["ranks"] == 2
        numbers = [
            [[v for k, v in r.items() if k != "epoch"] for r in records(run) if kind in r]
            for kind in ("loss", "val_loss")
            for run in (tmp_path / name, alone.run)
        ]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(numbers[2], numbers[3], rtol=1e-5, atol=1e-6, err_msg=name)
        theirs, ours = (load_model(run).model.state_dict() for run in (tmp_path / name, alone.run))
        assert theirs.keys() == ours.keys()
        assert hidden_files(tmp_path / name) == []


# Which images


def test_few_labels_are_balanced_nested_and_held_out_of_each_class(tmp_path):
    tokens = write(tmp_path / "toy.h5", n=90)
    labels, before = tokens.split("train").labels, None
    for n in (2, 4, 11, 25, 30):
        data = labelled(tokens, FinetuneSettings(labels_per_class=n, seed=4))
        used = np.concatenate([data.rows, data.val.rows])
        assert np.bincount(labels[used]).tolist() == [n, n, n]
        assert len(np.unique(used)) == 3 * n
        assert np.bincount(data.val.labels).tolist() == [math.ceil(n / 10)] * 3
        assert (data.val.labels == labels[data.val.rows]).all()
        if before:
            assert set(before.rows) <= set(data.rows)
            assert set(before.val.rows) <= set(data.val.rows)
        before = data
    again, other = (labelled(tokens, FinetuneSettings(labels_per_class=4, seed=seed)).rows for seed in (4, 5))
    assert (again == labelled(tokens, FinetuneSettings(labels_per_class=4, seed=4)).rows).all()
    assert set(again) != set(other)
    everything = labelled(tokens, FinetuneSettings())
    assert sorted([*everything.rows, *everything.val.rows]) == list(range(90))


def test_a_split_val_is_held_out_and_few_images_are_looked_at_evenly(tmp_path):
    tokens = write(tmp_path / "toy.h5", splits=("train", "val", "test"))
    data = labelled(tokens, FinetuneSettings(labels_per_class=5, val_images=7, test_images=12))
    assert (data.val.split.name, len(data.rows)) == ("val", 15)
    assert sorted(np.bincount(data.val.labels)) == [2, 2, 3]
    assert np.bincount(data.test.labels).tolist() == [4, 4, 4]
    assert (data.val.labels == tokens.split("val").labels[data.val.rows]).all()


def test_images_without_a_label_are_left_out(pretrained, tmp_path):
    tokens = write(tmp_path / "toy.h5", labels=lambda n: np.where(np.arange(n) < 6, -1, np.arange(n) % 3))
    data = labelled(tokens, FinetuneSettings())
    assert min(data.rows.min(), data.val.rows.min(), data.test.rows.min()) == 6
    done = tune(pretrained["ar"], tokens, tmp_path / "run")
    assert done.n_test == 60
    assert read_config(done.run)["data"]["left_out"] == {"train": 6, "test": 6}


# Settings


def test_what_is_not_said_is_as_pretraining_had_it():
    cpu, gpu = "cpu", "cuda"
    model = {"name": "igpt-s", "n_layer": 24, "objective": "ar", "resolution": 32}
    imported = resolve_settings(FinetuneSettings(), {"model": model}, 45_000, gpu)
    assert (imported.batch_size, imported.learning_rate, imported.optimizer) == (128, pytest.approx(0.0003), "adamw")
    assert (imported.betas, imported.epochs, imported.steps, imported.warmup_steps) == ((0.9, 0.95), 50, 17_550, 20)
    assert (imported.head_layer, imported.bert_masks, imported.val_images) == (24, None, None)
    training = {
        "batch_size": 32,
        "learning_rate": 0.02,
        "optimizer": "muon",
        "betas": [0.8, 0.9],
        "clip": 2.0,
        "steps": 7,
    }
    trained = resolve_settings(FinetuneSettings(steps=100), {"model": model, "training": training}, 20, cpu)
    assert (trained.batch_size, trained.learning_rate, trained.optimizer, trained.betas) == (
        20,
        0.002,
        "muon",
        (0.8, 0.9),
    )
    assert (trained.clip, trained.warmup_steps, trained.epochs, trained.val_images) == (2.0, 10, None, 128)
    assert (
        resolve_settings(FinetuneSettings(), {"model": model, "training": training}, 21, cpu, n_ranks=4).batch_size
        == 20
    )
    scratch = resolve_settings(FinetuneSettings(from_scratch=True), {"model": model, "training": training}, 99, cpu)
    assert scratch.learning_rate == 0.02
    bert = resolve_settings(FinetuneSettings(), {"model": {**model, "objective": "bert"}}, 1000, gpu)
    assert (bert.bert_masks, bert.mask_prob, bert.learning_rate) == (5, 0.15, 0.001)
    tuned = {"model": model, "training": {"learning_rate": 1e-5}, "finetuned_from": {}}
    assert pretraining_of(tuned)["learning_rate"] == 0.003


def test_all_problems_are_told_together(pretrained, tokens, tmp_path):
    bad = FinetuneSettings(
        gen_weight=-1, patience=-2, labels_per_class=0, head_layer=9, lr_search=(0.1, 0.0), augment="blur"
    )
    bad = replace(bad, layer_decay=1.5, head_learning_rate=0.0, from_scratch=True, optimizer="sgd")
    with pytest.raises(InputError) as told:
        tune(pretrained["ar"], tokens, tmp_path / "run", bad)
    for part in (
        "augment is 'blur', expected one of none, flip, crop-flip",
        "optimizer is 'sgd', expected one of adamw, muon",
        "layer_decay is 1.5, expected more than 0 and at most 1",
        "head_learning_rate is 0.0, expected more than 0",
        "layer_decay is 1.5, and from_scratch there are no trained layers to spare",
        "gen_weight is -1, expected 0 or more",
        "patience is -2",
        "labels_per_class is 0, expected at least 1",
        "head_layer is 9, expected one of 0 to 2 (2 = final norm)",
        "lr_search has 0.0, expected more than 0",
    ):
        assert part in str(told.value)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_fine_tuned(pretrained, tokens, tmp_path):
    ar = pretrained["ar"]

    def refused(error, message, model=ar, file=tokens, tuning=QUICK, out="run"):
        with pytest.raises(error, match=message):
            tune(model, file, tmp_path / out, tuning)
        assert not (tmp_path / "run").exists()

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    refused(OutputError, "there exists already; choose another --out, or overwrite it with --force", out="there")
    bare = write(tmp_path / "bare.h5", labels=lambda n: np.full(n, -1))
    refused(
        InputError,
        "bare.h5: no image of the split 'train' has a label; classes are learnt from images in class",
        file=bare,
    )
    one = write(tmp_path / "one.h5", labels=lambda n: np.ones(n, int))
    refused(InputError, "one.h5: the training images are all of one class, middle; at least two are needed", file=one)
    other = write(tmp_path / "other.h5", shade=1)
    refused(MismatchError, "other.h5 uses palette .* tokenize again with", file=other)
    with TokenWriter(tmp_path / "small.h5", tokens.palette, 4, classes=("a", "b")) as writer:
        writer.append("train", np.zeros((8, 16), int), np.arange(8) % 2, [str(i) for i in range(8)])
    small = open_tokens(tmp_path / "small.h5")
    refused(MismatchError, r"small.h5 has images of 4x4, .* was trained at 5x5", file=small)
    refused(
        InputError,
        "class dark has 22 labelled training images, fewer than labels_per_class 23",
        tuning=replace(QUICK, labels_per_class=23),
    )
    refused(
        InputError,
        "class dark has 1 labelled image to train on; at least two",
        tuning=replace(QUICK, labels_per_class=1),
    )
    refused(
        MismatchError,
        "batch_size 99 is more than the 57 labelled training images",
        tuning=replace(QUICK, batch_size=99),
    )
    refused(InputError, "bert_masks is 5, but the model is autoregressive", tuning=replace(QUICK, bert_masks=5))
    with TokenWriter(tmp_path / "new.h5", tokens.palette, 5, classes=tokens.classes) as writer:
        part = tokens.split("train")
        writer.append("train", part.tokens[part.labels < 2], part.labels[part.labels < 2], [str(i) for i in range(44)])
        writer.append("test", part.tokens, part.labels, part.names)
    refused(
        InputError,
        "the split 'test' has classes that the training images lack: light",
        file=open_tokens(tmp_path / "new.h5"),
    )
    with pytest.raises(InputError, match="has no split 'train'"):
        tune(ar, write(tmp_path / "t.h5", splits=("test",)), tmp_path / "run")


def test_a_run_that_is_broken_is_named(pretrained, tokens, tmp_path):
    run = tune(pretrained["ar"], tokens, tmp_path / "run").run
    config = read_config(run)
    config["training"]["sparkle"] = 1
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="config.json: unknown setting sparkle; known: "):
        resume(tokens, run, device="cpu")
