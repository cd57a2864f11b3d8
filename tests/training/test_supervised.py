"""Supervised training: what is learned on what, recipes, averages, teachers, and that it is a run like any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_rgb
from safetensors.torch import load_file
from training_runs import assert_same_run, hidden_files, records, start, stop_at

from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError
from igpt_cli.evaluation.pixel_map import pixel_loss_map
from igpt_cli.evaluation.pixels import evaluate
from igpt_cli.model_dir import load_model, new_config, read_config, write_model
from igpt_cli.models.presets import PRESETS
from igpt_cli.models.registry import BACKENDS, build_model, model_config
from igpt_cli.palette.palette import Palette
from igpt_cli.sampling.generate import complete, sample
from igpt_cli.statistics import wilson
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.writer import TokenWriter
from igpt_cli.training.augment import normalised
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.labelled import labelled
from igpt_cli.training.memory import kept_bytes
from igpt_cli.training.objectives import Classification, Teacher, quantized
from igpt_cli.training.optim import EMA, make_optimizers
from igpt_cli.training.recipes import RECIPES, resolve_settings
from igpt_cli.training.run import finetune, pretrain, resume, train
from igpt_cli.training.settings import Execution, FinetuneSettings, PretrainSettings, TrainSettings
from igpt_cli.training.supervised import Supervised, few_patches

CLASSES = ("dark", "middle", "light")
FLOAT32 = Execution(precision="float32")
QUICK = TrainSettings(steps=12, batch_size=6, warmup_steps=2)
#: Everything that draws random numbers, and an average.
FULL = replace(
    QUICK, recipe="deit", learning_rate=0.003, augment="crop-flip", colour_jitter=0.2, drop_path=0.2, ema=0.9, clip=1.0
)


@pytest.fixture(scope="module", autouse=True)
def toy():
    toy_rgb.register()
    yield
    toy_rgb.unregister()


def write(path, n=66, rgb=False, side=8, classes=CLASSES):
    """Images of 8x8 whose classes are told by how light they are."""
    palette = Palette(np.linspace(10, 240, 9)[:, None].repeat(3, 1).astype(np.float32))
    rng = np.random.default_rng(5)
    with TokenWriter(path, palette, side, classes=classes, source="toy", keep_rgb=rgb) as writer:
        for split in ("train", "test"):
            shown = np.arange(n) % 3
            tokens = rng.integers(3, size=(n, side**2)) + 3 * shown[:, None]
            kept = {"rgb": 255 - palette.dequantize(tokens).reshape(n, side, side, 3)} if rgb else {}
            writer.append(split, tokens, shown, [f"{split}/{i}" for i in range(n)], **kept)
    return open_tokens(path)


@pytest.fixture
def tokens(tmp_path):
    return write(tmp_path / "toy.h5")


def run(tokens, out, supervision=QUICK, execution=FLOAT32, **more):
    return train("toy", tokens, out, supervision, execution, device="cpu", **more)


def setup_of(tokens, supervision):
    """A machine's view of a run that is not begun."""
    description = model_config("toy", resolution=tokens.resolution, n_classes=3)
    data = labelled(tokens, supervision)
    found = resolve_settings(supervision, len(data.rows), tokens.resolution, 0.0, "cpu")
    return Supervised(tokens, data, found, FLOAT32, description, torch.device("cpu"), Ranks())


# What is learned


def test_a_separable_set_is_learnt_and_tested_once(tokens, tmp_path):
    done = run(tokens, tmp_path / "run", replace(QUICK, steps=40, batch_size=16))
    assert (done.status, done.steps, done.images_seen, done.n_test) == ("done", 40, 640, 66)
    assert done.accuracy > 95
    assert done.interval == wilson(round(done.accuracy * 66 / 100), 66)
    config = read_config(tmp_path / "run")
    assert config["training"]["recipe"] == "plain"
    assert config["training"]["n_parameters"] == sum(p.numel() for p in build_model(config["model"]).parameters())
    assert config["data"]["classes"] == list(CLASSES)
    assert (config["data"]["n_train"], config["data"]["n_val"], config["data"]["images"]) == (57, 9, "tokens")
    loaded = load_model(tmp_path / "run")
    part = labelled(tokens, TrainSettings()).test
    x = torch.from_numpy(tokens.split("test").decode(part.rows)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(config["preparation"][k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        found = loaded.model((x - mean) / std).argmax(1).numpy()
    assert 100 * (found == part.labels).mean() == pytest.approx(done.accuracy)


def test_running_statistics_are_the_runs_own(tokens, tmp_path):
    """BatchNorm's, in the weights and in every checkpoint, whole numbers as such."""
    run(tokens, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights["blocks.0.norm.num_batches_tracked"].dtype == torch.int64
    assert weights["blocks.0.norm.num_batches_tracked"].item() in (10, 12)
    assert weights["blocks.0.norm.running_mean"].abs().sum() > 0
    assert "blocks.0.gain" not in weights


def test_kept_images_come_before_the_colours_of_tokens(tmp_path):
    kept = write(tmp_path / "rgb.h5", rgb=True)
    setup, plain = setup_of(kept, QUICK), setup_of(write(tmp_path / "tokens.h5"), QUICK)
    x, targets = setup.batch(3)
    y, _ = plain.batch(3)
    torch.testing.assert_close(255 * x, 255 - 255 * y)
    rows = setup.stream.batch_indices(3)
    assert (targets.argmax(1).numpy() == kept.split("train").labels[rows]).all()


def test_repeated_augmentation_shows_each_image_several_times(tokens):
    asked = replace(QUICK, batch_size=7, repeats=3)
    setup = setup_of(tokens, asked)
    x, _ = setup.batch(2)
    assert torch.equal(x[:3], x[3:6])
    assert torch.equal(x[6], x[0])
    assert setup.stream.batch_size == 3
    mixed = setup_of(tokens, replace(FULL, batch_size=6, repeats=3))
    x, _ = mixed.batch(0)
    assert not torch.equal(x[:2], x[2:4])


def test_the_parts_of_two_ranks_are_the_batch_of_one(tokens):
    asked = replace(FULL, batch_size=12)
    whole = setup_of(tokens, asked).batch(5)
    setup, parts = setup_of(tokens, asked), []
    for rank in (0, 1):
        setup.ranks = Ranks(rank, rank, 2)
        parts.append(setup.batch(5))
    for all_of_it, of_ranks in zip(whole, zip(*parts)):
        assert torch.equal(all_of_it, torch.cat(of_ranks))


def test_what_autograd_keeps_is_counted(tokens):
    """By hand, for a model whose backward pass needs its input alone."""
    linear = torch.nn.Linear(4, 2, bias=False)
    assert kept_bytes(linear, (torch.zeros(5, 4),)) == 5 * 4 * 4
    setup = setup_of(tokens, QUICK)
    assert setup.memory.micro_batch == 6
    forward = 2 * (16 * 8 * 12 + 2 * 16 * 8 * 72 + 8 * 3)  # patches, two convolutions (borders as if inside), head
    assert setup.flops_per_image() == 3 * forward


# Teachers


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_of_a_student_is_the_plain_computation(kind, tokens):
    """DeiT's equations 2 and 3 in NumPy, with smoothed and mixed targets."""
    torch.manual_seed(0)
    models = [build_model(model_config("toy", resolution=8, n_classes=3)).train() for _ in range(2)]
    asked = replace(FULL, distill=kind, distill_weight=0.3, tau=2.0)
    x, targets = setup_of(tokens, FULL).batch(1)
    seen = []

    def teacher(images):
        seen.append(images)
        with torch.no_grad():
            return models[1](images)

    loss, label, taught, right = Classification(models[0], asked, teacher)(x, targets).T
    assert seen[0] is x
    with torch.no_grad():
        z_s, z_t = models[0](normalised(x)).double().numpy(), models[1](x).double().numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    y = targets.double().numpy()
    ce = -(y * np.log(softmax(z_s))).sum(1)
    p, q = softmax(z_t / 2), softmax(z_s / 2)
    other = 4 * (p * (np.log(p) - np.log(q))).sum(1)
    if kind == "hard":
        other = -np.log(softmax(z_s))[np.arange(len(x)), z_t.argmax(1)]
    np.testing.assert_allclose(label.detach(), ce, rtol=1e-5)
    np.testing.assert_allclose(taught.detach(), other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.detach(), 0.7 * ce + 0.3 * other, rtol=1e-5)
    np.testing.assert_allclose(right.detach(), 100.0 * (z_s.argmax(1) == y.argmax(1)))


def test_a_student_learns_from_a_frozen_teacher(tokens, tmp_path):
    run(tokens, tmp_path / "teacher", replace(QUICK, steps=30, batch_size=16))
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    teacher = load_model(tmp_path / "teacher")
    asked = replace(QUICK, distill="hard", steps=8)
    run(tokens, tmp_path / "whole", asked, teacher=teacher)
    config = read_config(tmp_path / "whole")
    assert config["teacher"]["sha256"] == hashlib.sha256(before).hexdigest()
    assert (config["training"]["distill"], config["training"]["distill_weight"]) == ("hard", 0.5)
    assert not teacher.model.training
    assert all(
        torch.equal(v, load_file(tmp_path / "teacher" / "model.safetensors")[k])
        for k, v in teacher.model.state_dict().items()
    )
    assert {"label_loss", "teacher_loss", "accuracy"} <= records(tmp_path / "whole")[0].keys()
    with pytest.raises(Interrupted):
        run(tokens, tmp_path / "stopped", asked, teacher=teacher, on_record=stop_at(3))
    resume(tokens, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_two_heads_learn_one_term_each_and_are_tested_together_and_alone(tokens, tmp_path):
    with pytest.raises(InputError, match="toy-distilled has a distillation head, which learns from a teacher"):
        train("toy-distilled", tokens, tmp_path / "run", QUICK, FLOAT32, device="cpu")
    assert not (tmp_path / "run").exists()
    run(tokens, tmp_path / "teacher")
    teacher, asked = load_model(tmp_path / "teacher"), replace(QUICK, distill="hard", steps=20)
    done = train("toy-distilled", tokens, tmp_path / "run", asked, FLOAT32, teacher=teacher, device="cpu")
    model, part = load_model(tmp_path / "run").model, labelled(tokens, TrainSettings()).test
    x = torch.from_numpy(tokens.split("test").decode(part.rows)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        heads = [model(normalised(x)), *model.heads(normalised(x))]
    right = [100 * (head.argmax(1).numpy() == part.labels).mean() for head in heads]
    assert [done.accuracy, done.accuracy_class, done.accuracy_distillation] == pytest.approx(right)
    assert {"val_accuracy_class", "val_accuracy_distillation"} <= done.best.keys()
    objective = Classification(model.train(), replace(asked, distill_weight=0.25), Teacher(teacher))
    targets = torch.eye(3).repeat(2, 1)
    loss, _, taught, _ = objective(x[:6], targets).T
    (given,) = torch.autograd.grad(loss.sum(), model.head.weight, retain_graph=True)
    with torch.no_grad():
        decided = Teacher(teacher)(x[:6]).argmax(1)
    ours, theirs = model.heads(normalised(x[:6]))
    label = 0.75 * F.cross_entropy(ours, targets, reduction="sum")
    (expected,) = torch.autograd.grad(label, model.head.weight)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(taught, F.cross_entropy(theirs, decided, reduction="none").detach())


def test_an_igpt_sees_what_a_student_sees_in_its_colours(tokens, tmp_path):
    palette = tokens.palette
    x = torch.rand(3, 3, 8, 8)
    rgb = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
    expected = palette.quantize(rgb.reshape(-1, 3)).reshape(3, 64)
    assert (quantized(x, torch.tensor(palette.centers)).numpy() == expected).all()
    recipe = PretrainSettings(n_layer=1, n_embd=16, steps=2, batch_size=6, optimizer="adamw")
    pretrain(tokens, tmp_path / "igpt", recipe, FLOAT32, device="cpu")
    pretrained = load_model(tmp_path / "igpt")
    with pytest.raises(InputError, match="has no class head, so it cannot teach"):
        run(tokens, tmp_path / "run", replace(QUICK, distill="soft"), teacher=pretrained)
    tuned = finetune(
        pretrained, tokens, tmp_path / "tuned", FinetuneSettings(steps=2, batch_size=6), FLOAT32, device="cpu"
    ).run
    teacher = load_model(tuned)
    with torch.no_grad():
        _, logits = teacher.model.hidden_and_classes(torch.from_numpy(expected.astype(np.int64)))
    torch.testing.assert_close(Teacher(teacher)(x), logits)
    run(tokens, tmp_path / "run", replace(QUICK, distill="soft", steps=2), teacher=teacher)
    assert read_config(tmp_path / "run")["training"]["distill_weight"] == 0.1


def test_teachers_that_cannot_teach(tokens, tmp_path):
    run(tokens, tmp_path / "teacher")
    teacher, asked = load_model(tmp_path / "teacher"), replace(QUICK, distill="hard")
    with pytest.raises(InputError, match="there is a teacher; say soft or hard"):
        run(tokens, tmp_path / "run", teacher=teacher)
    turned = write(tmp_path / "turned.h5", classes=("light", "middle", "dark"))
    with pytest.raises(MismatchError, match="in another order: dark, middle, light, ..., not light, middle, dark"):
        run(turned, tmp_path / "run", asked, teacher=teacher)
    large = write(tmp_path / "large.h5", side=10)
    with pytest.raises(MismatchError, match="takes images of 8x8, these are 10x10"):
        run(large, tmp_path / "run", asked, teacher=teacher)


# A run like any other


@pytest.mark.parametrize("asked", [QUICK, FULL], ids=["plain", "everything"])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_never_stopped(asked, tokens, tmp_path):
    execution = replace(FLOAT32, eval_every=5, save_every=4, accumulate=2)
    run(tokens, tmp_path / "whole", asked, execution)
    with pytest.raises(Interrupted, match="igpt train --resume"):
        run(tokens, tmp_path / "stopped", asked, execution, on_record=stop_at(3))
    with pytest.raises(Interrupted):
        resume(tokens, tmp_path / "stopped", device="cpu", on_record=stop_at(8))
    done = resume(tokens, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert done.accuracy == read_config(tmp_path / "whole")["result"]["accuracy"]
    assert hidden_files(tmp_path / "stopped") == []


def test_a_run_is_resumed_with_what_it_had(tokens, tmp_path):
    with pytest.raises(Interrupted):
        run(tokens, tmp_path / "run", on_record=stop_at(3))
    with pytest.raises(MismatchError, match="batch_size was 6 and is now 8"):
        resume(tokens, tmp_path / "run", {"batch_size": 8}, device="cpu")
    other = write(tmp_path / "other.h5", rgb=True)
    with pytest.raises(MismatchError, match="the images were tokens and are now others"):
        resume(other, tmp_path / "run", device="cpu")
    for task in ("pretrain", "finetune"):
        with pytest.raises(InputError, match=f"is not a run of igpt {task}; resume it with: igpt train --resume"):
            resume(tokens, tmp_path / "run", task=task, device="cpu")


def test_the_average_is_the_plain_computation():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = EMA(model, 0.5)
    expected = {k: v.double().numpy().copy() for k, v in model.state_dict().items()}
    for step in range(1, 9):
        with torch.no_grad():
            model(torch.randn(4, 3))
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for k, v in model.state_dict().items():
            now = v.double().numpy()
            expected[k] = now.copy() if k.endswith("tracked") else decay * expected[k] + (1 - decay) * now
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with average.in_place():
        for k, v in model.state_dict().items():
            np.testing.assert_allclose(v, expected[k], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_average_is_what_is_validated_and_published(tokens, tmp_path):
    """From what each checkpoint has: the average in model.safetensors, the weights themselves beside it."""
    asked, execution = replace(QUICK, ema=0.5), replace(FLOAT32, save_every=1, keep=100, eval_every=6)
    run(tokens, tmp_path / "run", asked, execution)
    run(tokens, tmp_path / "plain", QUICK, execution)
    folders = [tmp_path / "run" / "checkpoints" / f"step-{n}" for n in range(1, 13)]
    raw = [load_file(f / "raw.safetensors") for f in folders]
    averaged = [load_file(f / "model.safetensors") for f in folders]
    without = load_file(tmp_path / "plain" / "checkpoints" / "step-12" / "model.safetensors")
    assert all(torch.equal(v, without[k]) for k, v in raw[-1].items())
    for n in range(1, 12):
        decay = min(0.5, (2 + n) / (11 + n))
        k = "head.weight"
        torch.testing.assert_close(averaged[n][k], decay * averaged[n - 1][k] + (1 - decay) * raw[n][k])
    best = read_config(tmp_path / "run")["result"]["best"]["step"]
    published = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(v, averaged[best - 1][k]) for k, v in published.items())


# Recipes


def test_recipes_are_resolved_and_saved(tokens, tmp_path):
    run(tokens, tmp_path / "run", TrainSettings(recipe="deit", steps=2, batch_size=6, seed=3))
    training = read_config(tmp_path / "run")["training"]
    expected = {**RECIPES["deit"].settings, "augment": "crop-flip", "clip": None, "ema": None, "betas": [0.9, 0.999]}
    expected |= {"batch_size": 6, "learning_rate": 5e-4 * 6 / 512, "drop_path": 0.1, "warmup_steps": 1}
    assert {k: training[k] for k in expected} == expected
    assert read_config(tmp_path / "run")["model"]["drop_path_rate"] == 0.1


def test_a_model_of_few_patches_is_said(tokens, tmp_path):
    """4 patches of an image of 8 pixels; 16 are not few, and a network without patches has none."""
    tiny, said = {"depth": 1, "embed_dim": 8, "num_heads": 1}, []
    for i, sizes in enumerate((tiny, tiny | {"patch_size": 2})):
        more = {"sizes": sizes, "on_event": said.append, "device": "cpu"}
        train("vit-ti-32", tokens, tmp_path / f"run{i}", TrainSettings(steps=1, batch_size=4), FLOAT32, **more)
    notes = [text for text in said if text.startswith("note: ")]
    assert notes == [
        "note: vit-ti-32 cuts 8x8 pixels into 4 patches, few for attention; smaller ones see more, as in vit-ti-32"
    ]
    assert few_patches(model_config("resnet-18-32", resolution=8, n_classes=3)) is None


def test_published_figures():
    """Learning rates, warm-up and ends as in the papers, for ImageNet on eight GPUs."""
    gpu = "cuda"
    deit = resolve_settings(TrainSettings(recipe="deit"), 1_281_167, 224, 0.0, gpu, 8)
    assert (deit.batch_size, deit.learning_rate, deit.steps) == (1024, 0.001, 300 * 1251)
    assert (deit.warmup_steps, deit.augment, deit.repeats, deit.drop_path) == (5 * 1251, "resized-crop-flip", 3, 0.1)
    swin = resolve_settings(TrainSettings(recipe="swin"), 1_281_167, 224, 0.3, gpu, 8)
    assert (swin.learning_rate, swin.warmup_steps, swin.clip) == (0.001, 20 * 1251, 1.0)
    assert (swin.drop_path, swin.repeats) == (0.3, 1)
    short = resolve_settings(TrainSettings(recipe="swin", epochs=30), 1_281_167, 224, 0.3, gpu, 8)
    assert short.warmup_steps == 2 * 1251
    timed = resolve_settings(TrainSettings(budget=60), 1000, 32, None, "cpu")
    assert (timed.batch_size, timed.warmup_steps, timed.steps, timed.drop_path) == (64, 20, None, None)


def test_only_what_multiplies_decays():
    """By name, for the toy model and every registered one that is not of tokens, without values."""
    never = ("bias", "norm", "pos", "token", "table", "relative", "embedding", "bn", "gain", "center", "spread")
    names = [name for name, preset in PRESETS.items() if preset.backend != "igpt"]
    for backend in {PRESETS[n].backend for n in names}:
        name = next(n for n in names if PRESETS[n].backend == backend)
        with torch.device("meta"):
            model = BACKENDS[backend][0](BACKENDS[backend][1](**PRESETS[name].sizes, n_classes=10))
        (optimizer,) = make_optimizers(model, "adamw", 0.1, (0.9, 0.999), 0.05)
        of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(of) == len(list(model.parameters()))
        decays = {k for k, p in model.named_parameters() if of[id(p)]}
        assert not [k for k in decays if any(word in k.rpartition(".")[2] for word in never) or "norm" in k]
        left = {k for k, p in model.named_parameters() if not of[id(p)] and p.ndim > 1}
        assert not [k for k in left if k.endswith(("qkv.weight", "proj.weight", "fc1.weight", "head.weight"))]
    model = build_model(model_config("toy", resolution=8, n_classes=3))
    (optimizer,) = make_optimizers(model, "adamw", 0.1, (0.9, 0.999), 0.05)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    named = {k for k, p in model.named_parameters() if id(p) in decayed}
    assert named == {"patch.weight", "blocks.0.conv.weight", "blocks.1.conv.weight", "head.weight"}


def test_learning_rate_and_decay_go_with_the_optimizer():
    """SGD's are He's wherever it is asked for; in its place others take those of plain."""
    gpu = "cuda"

    def found(recipe, optimizer=None, **more):
        asked = TrainSettings(recipe=recipe, optimizer=optimizer, **more)
        made = resolve_settings(asked, 1_281_167, 224, 0.0, gpu, 8)
        return made.optimizer, made.batch_size, made.learning_rate, made.weight_decay

    assert found("resnet") == ("sgd", 256, 0.1, 1e-4)
    assert found("resnet", batch_size=1024) == ("sgd", 1024, 0.4, 1e-4)
    assert found("deit", "sgd") == ("sgd", 1024, 0.4, 1e-4)
    assert found("deit", "muon") == ("muon", 1024, 0.001, 0.05)
    assert found("resnet", "adamw") == ("adamw", 256, 0.001, 0.05)
    assert found("plain", "sgd", learning_rate=0.3, weight_decay=0.0) == ("sgd", 128, 0.3, 0.0)
    resnet = resolve_settings(TrainSettings(recipe="resnet"), 1_281_167, 224, None, gpu, 8)
    assert (resnet.steps, resnet.warmup_steps, resnet.augment) == (90 * 5004, 5 * 5004, "resized-crop-flip")
    trained = resolve_settings(TrainSettings(), 1_281_167, 224, None, gpu, 8, trained=True)
    assert trained.learning_rate == 1e-4


def test_sgd_and_its_recipe_are_a_run_like_any_other(tokens, tmp_path):
    asked = replace(QUICK, recipe="resnet", steps=9, learning_rate=0.05)
    whole = run(tokens, tmp_path / "whole", asked)
    assert whole.val_accuracy > 40
    config = read_config(tmp_path / "whole")["training"]
    assert (config["optimizer"], config["weight_decay"], config["augment"]) == ("sgd", 1e-4, "crop-flip")
    with pytest.raises(Interrupted):
        run(tokens, tmp_path / "stopped", asked, on_record=stop_at(4))
    resume(tokens, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(NonFiniteError, match="at step 2 .* not clipped.*; the weights of step 1 are kept"):
        run(tokens, tmp_path / "bad", replace(asked, learning_rate=1e38, warmup_steps=0, clip=0.0))
    kept = load_file(tmp_path / "bad" / "checkpoints" / "step-1" / "model.safetensors")
    assert all(torch.isfinite(v).all() for k, v in kept.items() if "running" not in k)


# From trained weights


def imported(path, name="toy", classes=("a", "b"), framing=None, **sizes):
    """A model that others made, with a preparation of its own."""
    torch.manual_seed(1)
    description = model_config(name, **sizes, resolution=8, n_classes=len(classes))
    stated = {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, **(framing or {})}
    config = new_config(description, preparation=stated, imported={"classes": list(classes)})
    return load_model(write_model(path, build_model(description).state_dict(), None, config))


def test_a_trained_model_gets_a_fresh_head_and_keeps_the_rest(tokens, tmp_path):
    base = imported(tmp_path / "import", framing={"crop": 0.875, "filter": "bilinear"})
    asked = replace(QUICK, steps=1, warmup_steps=0, learning_rate=1e-12, weight_decay=0.0, layer_decay=0.5)
    train(base, tokens, tmp_path / "run", asked, FLOAT32, device="cpu")
    config, found, before = read_config(tmp_path / "run"), load_model(tmp_path / "run").model, base.model
    sha256 = hashlib.sha256((tmp_path / "import" / "model.safetensors").read_bytes()).hexdigest()
    assert config["finetuned_from"] == {"path": str(tmp_path / "import"), "sha256": sha256, "head": "fresh"}
    assert config["model"] == {**base.config["model"], "n_classes": 3}
    assert config["preparation"] == {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}  # the file is cut out otherwise
    assert found.head.weight.shape == (3, 8)
    for name, p in before.named_parameters():
        if not name.startswith("head"):
            torch.testing.assert_close(found.get_parameter(name), p, msg=name)
    # The same classes in the same order: their head goes on.
    known = imported(tmp_path / "known", classes=CLASSES)
    train(known, tokens, tmp_path / "kept", asked, FLOAT32, device="cpu")
    assert read_config(tmp_path / "kept")["finetuned_from"]["head"] == "kept"
    torch.testing.assert_close(load_model(tmp_path / "kept").model.head.weight, known.model.head.weight)
    other = imported(tmp_path / "turned", classes=CLASSES[::-1])
    train(other, tokens, tmp_path / "fresh", asked, FLOAT32, device="cpu")
    assert not torch.allclose(load_model(tmp_path / "fresh").model.head.weight, other.model.head.weight)


def test_the_first_step_from_trained_weights_is_the_plain_computation(tokens, tmp_path):
    """Colours by the model's own mean and deviation, a learning rate for each layer, the head kept; plain SGD."""
    base = imported(tmp_path / "import", classes=CLASSES)
    asked = replace(QUICK, steps=1, warmup_steps=0, learning_rate=0.2, weight_decay=0.0, optimizer="sgd", clip=0.0)
    train(base, tokens, tmp_path / "run", replace(asked, layer_decay=0.5), FLOAT32, device="cpu")
    setup = setup_of(tokens, asked)
    x, targets = setup.batch(0)
    model = build_model(base.config["model"]).train()
    model.load_state_dict(base.model.state_dict())
    F.cross_entropy(model((x - 0.5) / 0.25), targets).backward()
    scales = {"head": 1, "norm": 1, "blocks.1": 0.5, "blocks.0": 0.25, "patch": 0.125, "pos_embed": 0.125}
    found = load_model(tmp_path / "run").model
    for name, p in model.named_parameters():
        scale = next(s for start, s in scales.items() if name.startswith(start))
        torch.testing.assert_close(found.get_parameter(name), p - 0.2 * scale * p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_run_from_trained_weights_is_resumed_without_them(tokens, tmp_path):
    base = imported(tmp_path / "import")
    asked = replace(QUICK, steps=10, layer_decay=0.6)
    whole = train(base, tokens, tmp_path / "whole", asked, FLOAT32, device="cpu")
    assert read_config(tmp_path / "whole")["training"]["learning_rate"] == 1e-4  # a tenth of plain's
    with pytest.raises(Interrupted, match="igpt train --resume"):
        train(base, tokens, tmp_path / "stopped", asked, FLOAT32, device="cpu", on_record=stop_at(4))
    shutil.rmtree(tmp_path / "import")
    done = resume(tokens, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert done.accuracy == whole.accuracy
    for task in ("pretrain", "finetune"):
        with pytest.raises(InputError, match=f"is not a run of igpt {task}; resume it with: igpt train --resume"):
            resume(tokens, tmp_path / "stopped", task=task, device="cpu")
    # It is tested as it was trained: with its own mean and deviation.
    model, part = load_model(tmp_path / "stopped").model, labelled(tokens, TrainSettings()).test
    x = torch.from_numpy(tokens.split("test").decode(part.rows)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        right = model((x - 0.5) / 0.25).argmax(1).numpy() == part.labels
    assert done.accuracy == pytest.approx(100 * right.mean())


def test_two_heads_begin_with_trained_weights(tokens, tmp_path):
    base, teacher = imported(tmp_path / "import", "toy-distilled"), imported(tmp_path / "teacher", classes=CLASSES)
    asked = replace(QUICK, steps=1, warmup_steps=0, learning_rate=1e-12, weight_decay=0.0, distill="hard")
    train(base, tokens, tmp_path / "run", asked, FLOAT32, device="cpu", teacher=teacher)
    found = load_model(tmp_path / "run").model
    torch.testing.assert_close(found.patch.weight, base.model.patch.weight)
    assert found.head.weight.shape == found.head_dist.weight.shape == (3, 8)


@pytest.mark.parametrize("classes", [("a", "b"), CLASSES])
def test_a_distilled_model_goes_on_without_its_distillation_head_where_nobody_teaches(classes, tokens, tmp_path):
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4}
    base = imported(tmp_path / "import", "deit-ti-distilled-32", classes, **sizes)
    asked = replace(QUICK, steps=1, warmup_steps=0, learning_rate=1e-12, weight_decay=0.0)
    train(base, tokens, tmp_path / "run", asked, FLOAT32, device="cpu")
    found = load_model(tmp_path / "run")
    assert found.config["model"]["backend"] == "deit_two_tokens"
    assert {n for n, _ in base.model.named_parameters()} - {n for n, _ in found.model.named_parameters()} == {
        "head_dist.weight", "head_dist.bias"
    }  # fmt: skip
    torch.testing.assert_close(found.model.dist_token, base.model.dist_token)
    assert torch.equal(found.model.head.weight, base.model.head.weight) is (classes == CLASSES)


def test_trained_models_that_cannot_go_on_so(tokens, tmp_path):
    base = imported(tmp_path / "import")
    with pytest.raises(InputError, match="import has its sizes already; leave out width, or name a preset"):
        train(base, tokens, tmp_path / "run", QUICK, FLOAT32, device="cpu", sizes={"width": 4})
    with pytest.raises(MismatchError, match="has images of 10x10, .*import takes 8x8"):
        train(base, write(tmp_path / "large.h5", side=10), tmp_path / "run", QUICK, FLOAT32, device="cpu")
    with pytest.raises(InputError, match="is igpt-tiny, a model of tokens; fine-tune it with: igpt finetune builtin"):
        train(load_model("builtin:igpt-tiny"), tokens, tmp_path / "run", QUICK, FLOAT32, device="cpu")
    assert not (tmp_path / "run").exists()


# Bad input


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"recipe": "diet"}, InputError, "there is no recipe 'diet'; did you mean deit"),
        (
            {"mixup": -1.0, "erasing": 2.0},
            InputError,
            "erasing is 2.0, expected from 0 to 1; mixup is -1.0, expected 0 or more",
        ),
        ({"randaugment": 11}, InputError, "randaugment is 11, expected 0 to 10"),
        ({"augment": "crop"}, InputError, "augment is 'crop', expected one of none, flip, crop-flip, resized"),
        ({"optimizer": "lion"}, InputError, "optimizer is 'lion', expected one of adamw, muon, sgd"),
        ({"optimizer": "muon"}, InputError, "muon is for linear maps, and the blocks of this model have none"),
        (
            {"layer_decay": 0.7},
            InputError,
            "layer_decay is 0.7, which spares trained layers, and toy starts from fresh",
        ),
        ({"layer_decay": 1.5}, InputError, "layer_decay is 1.5, expected more than 0 and at most 1"),
        ({"distill": "soft"}, InputError, "there is no teacher; name one"),
        ({"distill": "some"}, InputError, "distill is 'some', expected one of none, soft, hard"),
        ({"batch_size": 100}, MismatchError, "batch_size 100 is more than the 57 labelled training images"),
        ({"batch_size": 7, "mixup": 0.8}, MismatchError, "batch_size 7 is no multiple of 2"),
    ],
)
def test_what_cannot_be_learned(asked, error, message, tokens, tmp_path):
    with pytest.raises(error, match=message):
        run(tokens, tmp_path / "run", replace(QUICK, **asked))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained(tokens, tmp_path):
    with pytest.raises(InputError, match="there is no model 'toi'"):
        train("toi", tokens, tmp_path / "run", QUICK, device="cpu")
    with pytest.raises(InputError, match="igpt-tiny is a model of tokens: it learns classes by igpt finetune"):
        train("igpt-tiny", tokens, tmp_path / "run", QUICK, device="cpu")
    resolved = resolve_settings(QUICK, 57, 8, None, "cpu")
    assert resolved.drop_path is None
    with pytest.raises(InputError, match="drop_path is 0.1, but this model has no stochastic depth"):
        resolve_settings(replace(QUICK, drop_path=0.1), 57, 8, None, "cpu")


def test_what_such_a_model_cannot_do(tokens, tmp_path):
    run(tokens, tmp_path / "run")
    loaded, rows = load_model(tmp_path / "run"), tokens.split("test").tokens[:2]
    for call in (
        lambda: evaluate(loaded, tokens),
        lambda: pixel_loss_map(loaded, rows),
        lambda: sample(loaded, 1),
        lambda: complete(loaded, rows, np.arange(64).reshape(8, 8) > 32),
    ):
        with pytest.raises(InputError, match="run is toy, a model of RGB images: it predicts no pixels"):
            call()
    with pytest.raises(InputError, match=r"run is toy, a model of RGB images, which has no .*: igpt train .*run"):
        finetune(loaded, tokens, tmp_path / "tuned", FinetuneSettings(steps=1), FLOAT32, device="cpu")
    with pytest.raises(InputError, match="toy is a model of RGB images; it learns classes: igpt train toy"):
        pretrain(tokens, tmp_path / "pretrained", PretrainSettings(model="toy"), FLOAT32, device="cpu")


# Several ranks

DRIVER = """
import json, os, sys
from dataclasses import replace
import toy_rgb
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.distributed import init_distributed
from igpt_cli.training.settings import Execution
from igpt_cli.training.run import train
from igpt_cli.training.settings import TrainSettings

toy_rgb.register()
with init_distributed("cpu") as (ranks, device):
    for job in json.loads(open("jobs.json").read()):
        job["asked"]["betas"] = None
        asked, execution = TrainSettings(**job["asked"]), Execution(**job["execution"])
        train("toy", open_tokens("toy.h5"), job["run"], asked, execution, device=device, ranks=ranks)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "optimizer"), [("none", "adamw"), ("full", "adamw"), ("full", "sgd")])
def test_two_ranks_train_together(shard, optimizer, tmp_path):
    """With an average and running statistics, replicated and sharded. Each rank's BatchNorm sees its own images, so the
    reference computes them apart, too: one rank in two micro-batches, which are the two ranks' parts."""
    tokens = write(tmp_path / "toy.h5")
    asked = replace(QUICK, batch_size=12, ema=0.9, mixup=0.8, augment="crop-flip", optimizer=optimizer)
    execution = replace(FLOAT32, eval_every=4)
    alone = run(tokens, tmp_path / "one", asked, replace(execution, accumulate=2))
    job = {"run": "two", "asked": asdict(asked), "execution": {**asdict(execution), "shard": shard}}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    (tmp_path / "driver.py").write_text(DRIVER)
    process = start(ranks=2, cwd=tmp_path, script=tmp_path / "driver.py")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    one, two = (
        np.array([(r["loss"], r["grad_norm"]) for r in records(tmp_path / name) if "loss" in r])
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, rtol=2e-4)
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints" / "step-12" / "raw.safetensors") for name in ("one", "two")
    )
    assert ours.keys() == theirs.keys()
    for k, v in ours.items():
        if "running" not in k and "tracked" not in k:  # rank 0's here, of all images there
            torch.testing.assert_close(theirs[k], v, rtol=2e-3, atol=2e-5)
    assert theirs["blocks.0.norm.num_batches_tracked"].item() == 12
    assert read_config(tmp_path / "two")["result"]["n_test"] == alone.n_test == 66
    assert read_config(tmp_path / "two")["machine"]["shard"] == shard
