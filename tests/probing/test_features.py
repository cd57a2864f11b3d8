"""Features of frozen models: against hooks and transformers, whatever the batch, and the file they are kept in."""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from oracles import require_imagegpt

from igpt_cli.errors import FormatError, IgptError, InputError, MismatchError, NonFiniteError, OutputError
from igpt_cli.model_dir import ModelDir, load_model, new_config, write_model
from igpt_cli.model_input import decoder
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.probing import feature_writer, features
from igpt_cli.probing.features import Frozen, Masking, extract
from igpt_cli.probing.store import extract_features, open_features, unfinished
from igpt_cli.tokens.loader import fixed_mask
from igpt_cli.tokens.store import TokenFile, open_tokens

SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 16, "resolution": 4, "n_vocab": 8}


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, gains and head included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def make_run(tmp_path, toy_tokens):
    """make_run("ar") -> a ModelDir with the palette of `toy_tokens`, all weights random."""

    def make(objective: str = "ar", **changes) -> ModelDir:
        config = model_config("igpt-tiny", objective=objective, **{**SIZES, **changes})
        weights = noisy(build_model(config)).state_dict()
        path = tmp_path / f"model-{objective}"
        palette = open_tokens(toy_tokens()).palette
        write_model(path, weights, palette, new_config(config, training={"mask_prob": 0.4}), force=True)
        return load_model(path)

    return make


@pytest.fixture
def tokens(toy_tokens) -> TokenFile:
    return open_tokens(toy_tokens())


@pytest.fixture(autouse=True)
def same_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


def as_ids(split) -> torch.Tensor:
    return torch.from_numpy(np.asarray(split.tokens, np.int64))


# What features are.


@torch.no_grad()
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_features_equal_a_plain_loop_through_the_blocks(make_run, tokens, objective):
    """Layer l is the mean over positions of what block l's first norm gives, L of what the final norm gives."""
    run = make_run(objective)
    model, seen = run.model, {}
    for layer, norm in enumerate([*(b.ln_1 for b in model.h), model.ln_f]):
        norm.register_forward_hook(lambda m, x, y, layer=layer: seen.update({layer: y}))
    x, mask = as_ids(tokens.split("test")), None
    if objective == "bert":
        mask = torch.from_numpy(fixed_mask(np.arange(len(x)), 16, 0.4, 7, 0))
    model(x, mask)
    plain = dict(seen)
    masking = Masking(1, 0.4, 7) if objective == "bert" else None
    found = extract(model, tokens.split("test").tokens, range(4), masking=masking)
    for layer in range(4):
        expected = plain[layer].double().mean(1).numpy()
        np.testing.assert_allclose(found[layer].reshape(expected.shape), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_sites_within_blocks_equal_the_formula(make_run, tokens, objective):
    """Attention before it is added, the MLP after its nonlinearity, from the model's own maps; and beside layers."""
    model = make_run(objective).model
    h = model.embed(as_ids(tokens.split("test")))
    layers = ["0.mlp", 0, 3, "2.attention", "2.mlp", "1.attention"]
    found = {pool: extract(model, tokens.split("test").tokens, layers, pool=pool) for pool in ("mean", "max", "last", "none")}  # fmt: skip
    assert list(found["mean"]) == [0, "0.mlp", "1.attention", "2.attention", "2.mlp", 3]
    expected = {}
    for i, block in enumerate(model.h):
        expected[i] = block.ln_1(h)
        a = expected[f"{i}.attention"] = block.attn(block.ln_1(h))
        z = block.ln_2(h + a) @ block.mlp.c_fc.weight.T
        m = expected[f"{i}.mlp"] = z * torch.sigmoid(1.702 * z)
        h = h + a + m @ block.mlp.c_proj.weight.T
    expected[3] = model.ln_f(h)
    for layer in layers:
        e = expected[layer]
        for pool, values in (("mean", e.mean(1)), ("max", e.amax(1)), ("last", e[:, -1]), ("none", e)):
            np.testing.assert_allclose(found[pool][layer], values.numpy(), atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_sites_of_a_vit_leave_its_class_token_out(make_run):
    config = {"backend": "vit", "resolution": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = noisy(build_model(config))
    pixels = torch.rand(3, 3, 8, 8)
    found = extract(model, pixels.numpy(), ["1.attention", "0.mlp", 1], decode=torch.from_numpy)
    block = model.blocks[0]
    x = model.embed(pixels)
    x = x + block.attn(block.norm1(x))
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
    np.testing.assert_allclose(found["0.mlp"], hidden[:, 1:].mean(1), atol=1e-5)
    x = x + block.mlp.fc2(hidden)
    n = model.blocks[1].norm1(x)
    np.testing.assert_allclose(found[1], n[:, 1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(found["1.attention"], model.blocks[1].attn(n)[:, 1:].mean(1), atol=1e-5)


def test_sites_are_kept_in_files_and_refused_where_blocks_have_none(make_run, tokens, tmp_path):
    run = make_run()
    made = extract_features(run, tokens, tmp_path / "f.h5", [1, "1.mlp", "0.attention"])
    assert made.layers == ["0.attention", 1, "1.mlp"]
    assert made.split("test").widths == {"0.attention": 16, 1: 16, "1.mlp": 64}
    whole = extract(run.model, tokens.split("test").tokens, ["1.mlp"])
    np.testing.assert_allclose(made.read("test", "1.mlp"), whole["1.mlp"], atol=1e-6)
    assert extract_features(run, tokens, tmp_path / "f.h5", ["1.mlp"]).reused
    with pytest.raises(OutputError, match=r"layers 0\.mlp are missing, there are 1, 0\.attention, 1\.mlp"):
        extract_features(run, tokens, tmp_path / "f.h5", ["0.mlp"])
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file.move("test/layer-1.mlp", "test/layer-3.mlp")
    with pytest.raises(FormatError, match=r"holds the layers layer-0\.attention, layer-1, layer-3\.mlp"):
        open_features(tmp_path / "f.h5")
    with pytest.raises(InputError, match=r"layer 0\.mlp asked for, and igpt-tiny has none: its blocks are not such"):
        extract_features(toy_run(make_run, Toy()), tokens, tmp_path / "g.h5", ["0.mlp"])


@torch.no_grad()
def test_features_equal_transformers(make_run, tokens, tmp_path):
    require_imagegpt()
    from transformers import ImageGPTForCausalImageModeling

    from igpt_cli.interop.huggingface import export_huggingface

    run = make_run()
    export_huggingface(run.path, tmp_path / "theirs")
    other = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "theirs").eval()
    x = as_ids(tokens.split("test"))
    shifted = torch.cat((torch.full((len(x), 1), 8), x[:, :-1]), dim=1)
    theirs = other(shifted, output_hidden_states=True).hidden_states
    found = extract_features(run, tokens, tmp_path / "f.h5")
    for layer in range(3):
        expected = other.transformer.h[layer].ln_1(theirs[layer]).mean(1)
        np.testing.assert_allclose(found.read("test", layer), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.read("test", 3), theirs[3].mean(1).numpy(), atol=1e-5)


def test_the_batch_changes_nothing_but_rounding_and_the_pass_stops_after_the_deepest_layer(make_run, tokens):
    run = make_run()
    x = tokens.split("train").tokens
    whole = extract(run.model, x, [0, 2], batch_size=64)
    ran = []
    run.model.h[2].attn.register_forward_hook(lambda *a: ran.append("too deep"))
    run.model.h[1].attn.register_forward_hook(lambda *a: ran.append("deep"))
    for size in (1, 7, None):
        for layer, values in extract(run.model, x, [2, 0], batch_size=size).items():
            np.testing.assert_allclose(values, whole[layer], atol=1e-6)
    assert set(ran) == {"deep"}
    ran.clear()
    extract(run.model, x[:8], [2, 1, 0, 2], batch_size=8)
    assert ran == ["deep"] * 2, "one pass for all layers, and one to learn their shapes"


@pytest.mark.parametrize("pool", ["mean", "quadrants", "max", "last", "none"])
def test_pools(make_run, tokens, tmp_path, pool):
    run = make_run()
    found = extract_features(run, tokens, tmp_path / "f.h5", [1], pool=pool).read("train", 1)
    whole = extract(run.model, tokens.split("train").tokens, [1], pool="none")[1]
    side = math.isqrt(whole.shape[1])
    grid = whole.reshape(len(whole), side, side, -1)
    halves = slice(None, side // 2), slice(side // 2, None)
    quarters = np.stack([grid[:, v, h].mean((1, 2)) for v in halves for h in halves], axis=-1)  # (N, D, 4)
    expected = {
        "mean": whole.mean(1),
        "quadrants": quarters.reshape(len(whole), -1),
        "max": whole.max(1),
        "last": whole[:, -1],
        "none": whole,
    }[pool]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_means_are_float32_where_products_are_bfloat16(make_run, tokens):
    run = make_run()
    x = tokens.split("train").tokens
    settings = {"precision": "bfloat16", "batch_size": 8}
    means, whole = (extract(run.model, x, range(4), pool=pool, **settings) for pool in ("mean", "none"))
    exact = extract(run.model, x, range(4))
    for layer in range(4):
        assert means[layer].dtype == np.float32
        # A mean rounded to bfloat16 would be wrong by up to 1 in 256.
        np.testing.assert_allclose(means[layer], whole[layer].mean(1, dtype=np.float64), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means[layer], exact[layer], atol=0.1)
    assert not np.array_equal(means[3], exact[3]), "bfloat16 was not used"


# The model stays as it is.


class Toy(torch.nn.Module):
    """A backend of another kind: two layers over RGB, of different widths."""

    input_kind, n_layers = "rgb", 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.drifts = False

    def features(self, x, layers, pool="mean"):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        if self.drifts:
            self.seen += len(x)
        found = {0: self.weight * x.mean((2, 3)), 1: self.weight * x.flatten(1)}
        return {layer: found[layer] for layer in layers}


def toy_run(make_run, model: Toy, **config) -> ModelDir:
    run = make_run()
    return replace(run, model=model, config={**run.config, **config})


def test_a_model_that_changes_is_found_out(make_run, tokens, tmp_path):
    """As batch norms in training mode, or an optimizer, would change it."""
    model = Toy().train()
    run = toy_run(make_run, model)
    before = Frozen(model).sha256
    extract_features(run, tokens, tmp_path / "good.h5")
    assert Frozen(model).sha256 == before
    model.drifts = True
    with pytest.raises(IgptError, match="changed while its features were taken: seen is not what it was"):
        extract_features(run, tokens, tmp_path / "f.h5")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("f.h5")] == []
    with pytest.raises(IgptError, match="changed while its features"):
        extract(model, tokens.split("train").tokens, [0], decode=decoder(run, tokens.palette))


def test_every_tensor_counts_in_the_hash(make_run):
    run = make_run()
    first = Frozen(run.model).sha256
    assert Frozen(load_model(run.path).model).sha256 == first
    with torch.no_grad():
        run.model.wtet.weight[0, 0] += 1e-7
    assert Frozen(run.model).sha256 != first


def test_rgb_models_see_the_colours_of_the_tokens(make_run, tokens, tmp_path):
    found = extract_features(toy_run(make_run, Toy()), tokens, tmp_path / "f.h5")
    split = tokens.split("test")
    rgb = split.decode(slice(None)).astype(np.float32) / 255  # (N, R, R, 3)
    assert found.describe()["widths"] == [3, 48]
    np.testing.assert_allclose(found.read("test", 0), rgb.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.read("test", 1).reshape(-1, 3, 4, 4), rgb.transpose(0, 3, 1, 2), atol=1e-6)
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    run = toy_run(make_run, Toy(), preparation=stated)
    prepared = extract_features(run, tokens, tmp_path / "g.h5").read("test", 0)
    expected = (rgb.mean((1, 2)) - np.float32(stated["mean"])) / np.float32(stated["std"])
    np.testing.assert_allclose(prepared, expected, atol=1e-5)
    with pytest.raises(OutputError, match="preparation is"):
        extract_features(run, tokens, tmp_path / "f.h5")


# BERT.


def test_bert_masks_depend_on_seed_row_and_draw_alone(make_run, tokens, tmp_path):
    run = make_run("bert")
    found = extract_features(run, tokens, tmp_path / "f.h5", [3], seed=5)
    assert (found.n_masks("train"), found.n_masks("test")) == (1, 5)
    assert found.masked("test", 3).shape == (5, 64, 16)
    assert found.splits["test"].attrs["mask_prob"] == 0.4
    x = as_ids(tokens.split("test"))
    for draw in range(5):
        mask = torch.from_numpy(fixed_mask(np.arange(64), 16, 0.4, 5, draw))
        expected = run.model.features(x, [3], mask=mask)[3].detach().numpy()
        np.testing.assert_allclose(found.read("test", 3, draw), expected, atol=1e-6)
    assert len(np.unique(found.masked("test", 3)[:, 0], axis=0)) > 1
    few = extract_features(run, tokens, tmp_path / "g.h5", [3], ["test"], seed=5, batch_size=3, rows={"test": [9, 60]})
    np.testing.assert_allclose(few.masked("test", 3), found.masked("test", 3)[:, [9, 60]], atol=1e-6)
    other = extract_features(run, tokens, tmp_path / "h.h5", [3], ["test"], seed=6)
    assert not np.allclose(other.read("test", 3), found.read("test", 3))


def test_every_position_under_every_mask(make_run, tokens, tmp_path):
    run = make_run("bert")
    found = extract_features(run, tokens, tmp_path / "f.h5", [0, 3], ["test"], pool="none", bert_masks=2)
    assert found.masked("test", 3).shape == (2, 64, 16, 16)
    means = extract_features(run, tokens, tmp_path / "g.h5", [0, 3], ["test"], bert_masks=2)
    for draw in range(2):
        np.testing.assert_allclose(found.read("test", 3, draw).mean(1), means.read("test", 3, draw), atol=1e-6)


def test_bert_may_see_whole_images(make_run, tokens, tmp_path):
    run = make_run("bert")
    found = extract_features(run, tokens, tmp_path / "f.h5", [3], bert_masks=0)
    expected = run.model.features(as_ids(tokens.split("test")), [3])[3].detach().numpy()
    assert found.n_masks("test") == 0
    assert found.masked("test", 3).shape == (1, 64, 16)
    np.testing.assert_allclose(found.read("test", 3), expected, atol=1e-6)
    chosen = extract_features(run, tokens, tmp_path / "g.h5", [3], bert_masks={"train": 2, "test": 0})
    assert [chosen.n_masks(s) for s in ("train", "test")] == [2, 0]
    with pytest.raises(InputError, match=r"bert_masks is 2, and .*model-ar is no BERT model"):
        extract_features(make_run("ar"), tokens, tmp_path / "h.h5", [0], ["test"], bert_masks=2)


# The file.


def test_the_file_says_what_it_holds(make_run, tokens, tmp_path):
    run = make_run()
    said = []
    found = extract_features(
        run, tokens, tmp_path / "f.h5", [0, 3], ["test"], limit=10, progress=lambda *done: said.append(done)
    )
    assert (found.layers, list(found.splits), found.n_layers, found.resolution) == ([0, 3], ["test"], 3, 4)
    assert found.attrs["checkpoint_sha256"] == Frozen(run.model).sha256
    assert found.attrs["palette_sha256"] == tokens.palette.sha256
    assert found.splits["test"].attrs["tokens_sha256"] == tokens.split("test").sha256
    assert found.classes == ["dark", "light"]
    rows = found.rows("test")
    assert rows.tolist() == [i * 64 // 10 for i in range(10)]
    assert found.names("test") == [tokens.split("test").names[r] for r in rows]
    assert found.labels("test").tolist() == tokens.split("test").labels[rows].tolist()
    values = found.read("test", 3)
    assert isinstance(values, np.memmap)
    assert (values.dtype, values.shape, values.flags.writeable) == (np.float32, (10, 16), False)
    whole = extract(run.model, tokens.split("test").tokens, [3])[3]
    np.testing.assert_allclose(values, whole[rows], atol=1e-6)
    assert said[-1] == (10, 10)
    for wrong, words in (
        (lambda: found.read("val", 0), "has no split 'val'; its splits: test"),
        (lambda: found.read("test", 1), "has no layer 1; its layers: 0, 3"),
        (lambda: found.read("test", 0, 1), "has no mask 1 of the split 'test'; it has 1"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


def test_without_labels_all_splits_are_taken_and_with_them_only_those(make_run, toy_tokens, tmp_path):
    bare = open_tokens(toy_tokens(tmp_path / "bare.h5", labelled=False))
    assert list(extract_features(make_run(), bare, tmp_path / "f.h5", [0]).splits) == ["train", "test"]


def test_a_file_is_reused_where_it_serves(make_run, tokens, tmp_path, monkeypatch):
    run, path = make_run(), tmp_path / "f.h5"
    first = extract_features(run, tokens, path)
    assert not first.reused
    before = path.read_bytes()
    monkeypatch.setattr("igpt_cli.probing.store.batches", None)  # nothing is computed any more
    again = extract_features(run, tokens, path, [3, 1], ["test"], resume=True)
    assert again.reused
    np.testing.assert_array_equal(again.read("test", 1), first.read("test", 1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_file_with_more_images_serves(make_run, tokens, tmp_path, monkeypatch, objective):
    run, path = make_run(objective), tmp_path / "f.h5"
    whole = extract_features(run, tokens, path)
    rows = {"train": np.array([60, 2, 31])}
    fresh = extract_features(run, tokens, tmp_path / "few.h5", rows=rows, limit=5)
    few = extract_features(run, tokens, path, rows=rows, limit=5)
    assert few.reused
    for found in (few, pickle.loads(pickle.dumps(few))):
        for split, wanted in (("train", [60, 2, 31]), ("test", [0, 12, 25, 38, 51])):
            np.testing.assert_array_equal(found.masked(split, 2), whole.masked(split, 2)[:, wanted])
            np.testing.assert_allclose(found.read(split, 2), fresh.read(split, 2), atol=1e-6)
            assert (found.rows(split).tolist(), found.names(split)) == (wanted, fresh.names(split))
            assert found.labels(split).tolist() == fresh.labels(split).tolist()
            assert found.splits[split].attrs == fresh.splits[split].attrs
    with pytest.raises(OutputError, match="other features: 1 of the 4 images of train are missing; choose"):
        extract_features(run, tokens, tmp_path / "few.h5", rows={"train": [60, 2, 31, 3]}, limit=5)


def test_a_file_that_does_not_serve_is_refused_with_what_differs(make_run, toy_tokens, tokens, tmp_path):
    run, path = make_run(), tmp_path / "f.h5"
    extract_features(run, tokens, path, [0, 1, 3])
    other = make_run()
    with torch.no_grad():
        other.model.h[1].ln_1.g[0] += 1
    fewer = open_tokens(toy_tokens(tmp_path / "other.h5", n=32))
    relabelled = open_tokens(toy_tokens(tmp_path / "bare.h5", labelled=False))
    before = path.read_bytes()
    for arguments, settings, words in (
        ((other, tokens), {"layers": [0]}, "checkpoint_sha256 is .{12}..., wanted .{12}...;"),
        ((run, tokens), {"layers": [0], "pool": "max"}, "other features: pool is mean, wanted max;"),
        ((run, tokens), {"precision": "bfloat16", "layers": [0]}, "precision is float32, wanted bfloat16;"),
        ((run, tokens), {}, "layers 2 are missing, there are 0, 1, 3;"),
        (
            (run, fewer),
            {"layers": [0]},
            "tokens_sha256 of train is [^;]*; tokens_sha256 of test is [^;]*;",
        ),
        (
            (run, relabelled),
            {"layers": [0]},
            "holds other features: labels_sha256 of train is [^;]*; labels_sha256 of t",
        ),
    ):
        with pytest.raises(
            OutputError, match=f"{words}.*choose another file, or overwrite it with igpt features --force"
        ):
            extract_features(*arguments, path, **settings)
        assert path.read_bytes() == before
    with pytest.raises(OutputError, match="split test is missing"):
        extract_features(run, tokens, tmp_path / "g.h5", [0], ["train"])
        extract_features(run, tokens, tmp_path / "g.h5", [0])
    forced = extract_features(run, tokens, path, [2], force=True)
    assert forced.layers == [2]
    (tmp_path / "other").write_text("something else")
    with pytest.raises(OutputError, match="exists already .*a features file"):
        extract_features(run, tokens, tmp_path / "other")


class Stop(BaseException):
    """An interrupt."""


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("killed", [False, True], ids=["Ctrl-C", "SIGKILL"])
def test_interrupted_at_any_moment_and_resumed_is_the_same(make_run, tokens, tmp_path, monkeypatch, objective, killed):
    run, path = make_run(objective), tmp_path / "f.h5"
    settings = {"batch_size": 5, "bert_masks": 3 if objective == "bert" else None}
    expected = extract_features(run, tokens, tmp_path / "whole.h5", **settings).path.read_bytes()
    rng = random.Random(3)
    writes = feature_writer.FeatureWriter.write
    monkeypatch.setattr(feature_writer, "NOTE_EVERY", 0.0)
    interrupts, resumed = 0, False
    while not path.exists():
        left = rng.randint(1, 9)

        def write(self, split, at, draw, found):
            nonlocal left
            left -= 1
            if left == 0:  # some layers of the batch are written, others hold nonsense
                writes(self, split, at, draw, {layer: 0 * v - 1 for layer, v in found.items() if layer < 2})
                self._file.flush()
                raise Stop
            writes(self, split, at, draw, found)

        with monkeypatch.context() as patch:
            patch.setattr(feature_writer.FeatureWriter, "write", write)
            if killed:  # nothing is said or done at the end
                patch.setattr(feature_writer.FeatureWriter, "leave", lambda self: self.close())
            try:
                extract_features(run, tokens, path, resume=True, **settings)
            except Stop:
                interrupts += 1
                resumed |= unfinished(path) > 0
                assert not path.exists()
    assert interrupts > 2
    assert resumed
    assert path.read_bytes() == expected
    assert not (tmp_path / "f.h5.part").exists()


SUICIDE = """
import os, signal, sys
from igpt_cli.model_dir import load_model
from igpt_cli.probing import feature_writer
from igpt_cli.probing.store import extract_features
from igpt_cli.tokens.store import open_tokens

run, tokens, path = sys.argv[1:]
feature_writer.NOTE_EVERY, real, count = 0.0, feature_writer.FeatureWriter.write, iter(range(16))

def write(self, *args):
    if next(count) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *args)

feature_writer.FeatureWriter.write = write
extract_features(load_model(run), open_tokens(tokens), path, batch_size=5)
"""


def test_a_killed_process_leaves_what_can_be_resumed(make_run, tokens, tmp_path):
    run, path = make_run(), tmp_path / "f.h5"
    killed = subprocess.run([sys.executable, "-c", SUICIDE, run.path, tokens.path, path], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    assert unfinished(path) in (64 + 5, 64 + 10), "13 batches of train, then of test"
    said = []
    extract_features(run, tokens, path, batch_size=5, resume=True, progress=lambda *done: said.append(done))
    assert said[-1][1] <= 59
    expected = extract_features(run, tokens, tmp_path / "g.h5", batch_size=5).path.read_bytes()
    assert path.read_bytes() == expected


def interrupted(run, tokens, path, monkeypatch, after: int = 4, **settings) -> None:
    with monkeypatch.context() as patch:
        count = iter(range(after))
        real = feature_writer.FeatureWriter.mark
        patch.setattr(feature_writer.FeatureWriter, "mark", lambda self, *a: (next(count), real(self, *a)))
        with pytest.raises((StopIteration, RuntimeError)):
            extract_features(run, tokens, path, batch_size=5, **settings)


def test_what_an_interrupted_run_left(make_run, tokens, tmp_path, monkeypatch):
    run, path = make_run(), tmp_path / "f.h5"
    interrupted(run, tokens, path, monkeypatch)
    assert unfinished(path) == 20
    with pytest.raises(OutputError, match="holds features of 20 images of an interrupted run; go on with --resume"):
        extract_features(run, tokens, path)
    with pytest.raises(MismatchError, match="was begun with other features: pool is mean, wanted max; resume with"):
        extract_features(run, tokens, path, pool="max", resume=True)
    with pytest.raises(MismatchError, match="it has the layers 0-3 of train, test, wanted 0-3 of train; resume"):
        extract_features(run, tokens, path, None, ["train"], resume=True)
    assert unfinished(path) == 20
    said = []
    extract_features(run, tokens, path, resume=True, batch_size=11, progress=lambda *done: said.append(done))
    assert said[-1] == (108, 108)
    whole = extract_features(run, tokens, tmp_path / "whole.h5")
    for split in ("train", "test"):
        np.testing.assert_allclose(open_features(path).read(split, 3), whole.read(split, 3), atol=1e-6)
    interrupted(run, tokens, tmp_path / "g.h5", monkeypatch)
    os.truncate(tmp_path / "g.h5.part" / "features.h5", 999)
    with pytest.raises(InputError, match=r"cannot be resumed: features.h5 is not as noted; start anew with --force"):
        extract_features(run, tokens, tmp_path / "g.h5", resume=True)
    extract_features(run, tokens, tmp_path / "g.h5", force=True)
    interrupted(run, tokens, tmp_path / "h.h5", monkeypatch, after=0)
    assert not (tmp_path / "h.h5.part").exists(), "a folder without good rows is of no use"


def test_two_at_once_are_refused(make_run, tokens, tmp_path, monkeypatch):
    run = make_run()

    def second(*_):
        with pytest.raises(OutputError, match=r"another process is writing .*f.h5; wait for it"):
            extract_features(run, tokens, tmp_path / "f.h5")

    extract_features(run, tokens, tmp_path / "f.h5", progress=second)


# What cannot be done.


def test_refusals(make_run, toy_tokens, tokens, tmp_path):
    run, path = make_run(), tmp_path / "f.h5"
    other = open_tokens(toy_tokens(tmp_path / "shade.h5", shade=1))
    for arguments, settings, error, words in (
        ((run, tokens), {"layers": [4]}, InputError, r"layer 4 asked for; igpt-tiny has the layers 0 to 3 \(3 = final"),
        ((run, tokens), {"splits": ["val"]}, InputError, "has no split 'val'; its splits: train, test"),
        ((run, tokens), {"splits": []}, InputError, "no split was asked for"),
        (
            (run, tokens),
            {"pool": "median"},
            InputError,
            "pool is 'median', expected one of mean, quadrants, max, last, none",
        ),
        ((run, tokens), {"limit": 0}, InputError, "limit is 0; it must be at least 1"),
        ((run, tokens), {"batch_size": 0}, InputError, "the batch size is 0; it must be at least 1"),
        ((run, tokens), {"rows": {"test": [3, 64]}}, InputError, r"rows 3..64 of test asked for; it has rows 0..63"),
        ((run, tokens), {"precision": "float16"}, InputError, "precision is 'float16'"),
        ((run, other), {}, MismatchError, r"uses palette \w{12} \(8 colours\)"),
        ((make_run("bert"), tokens), {"bert_masks": -1}, InputError, "bert_masks is -1; it must be 0"),
    ):
        with pytest.raises(error, match=words):
            extract_features(*arguments, path, **settings)
    run.model.input_kind = "sound"
    with pytest.raises(InputError, match="takes 'sound' as its input; 'tokens' or 'rgb' are needed"):
        extract_features(run, tokens, path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("f.h5")] == []


def test_what_does_not_fit_is_refused_with_numbers(make_run, tokens, tmp_path, monkeypatch):
    run = make_run()
    # 64 + 64 images, 4 layers of 16 positions of 16 numbers.
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300_000}))
    with pytest.raises(OutputError, match=r"not enough space for .*f.h5: about 1 MB are needed, 0 MB are free"):
        extract_features(run, tokens, tmp_path / "f.h5", pool="none")
    assert not list(tmp_path.glob("f.h5*"))
    extract_features(run, tokens, tmp_path / "f.h5")
    monkeypatch.setattr(features, "free_memory", lambda device: 100_000)
    with pytest.raises(InputError, match=r"of 64 images, at 4 layers take 0.0 GB, and 0.0 GB of memory are free; use"):
        extract(run.model, tokens.split("train").tokens, range(4), pool="none")
    with pytest.raises(InputError, match="of 64 images, one batch, at 4 layers take"):
        extract_features(run, tokens, tmp_path / "g.h5", pool="none", batch_size=64)
    monkeypatch.setattr(features, "BATCH_BYTES", 20_000)
    shapes = dict.fromkeys(range(4), (16, 16))
    assert features.images_at_once(None, 16, shapes, torch.device("cpu")) == 4


def test_the_memory_that_is_free_is_about_that_of_the_machine():
    assert 2**20 < features.free_memory(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_feature_that_is_no_number_is_named(make_run, tokens, tmp_path):
    run = make_run()
    with torch.no_grad():
        run.model.h[1].attn.c_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="the features of row 0 at layer 2 hold NaN or infinity"):
        extract_features(run, tokens, tmp_path / "f.h5")
    assert not list(tmp_path.glob("f.h5*"))


def test_a_full_disk_keeps_what_was_done(make_run, tokens, tmp_path, monkeypatch):
    run, path, full = make_run(), tmp_path / "f.h5", [False]
    real = feature_writer.FeatureWriter.mark

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if full[0]:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def mark(self, *args):
        real(self, *args)
        self._file, full[0] = Full(self._file), True

    with monkeypatch.context() as patch:
        patch.setattr(feature_writer.FeatureWriter, "mark", mark)
        with pytest.raises(OutputError, match=r"cannot write .*f.h5: No space left on device; free some space"):
            extract_features(run, tokens, path, batch_size=5)
    assert unfinished(path) == 5
    expected = extract_features(run, tokens, tmp_path / "g.h5", batch_size=5).path.read_bytes()
    assert extract_features(run, tokens, path, batch_size=5, resume=True).path.read_bytes() == expected


DAMAGE = {
    "another kind": (lambda h5: h5.attrs.update(format="igpt-tokens"), "its format is 'igpt-tokens', 'igpt-features'"),
    "no kind": (lambda h5: h5.attrs.pop("format"), "it has no attribute 'format'"),
    "newer": (lambda h5: h5.attrs.update(format_version=2), "has format_version 2, this program reads version 1; upg"),
    "no model": (lambda h5: h5.attrs.pop("model"), "the attribute model is missing or not text"),
    "model of no kind": (lambda h5: h5.attrs.update(model="[1]"), "the attribute model is not a JSON object: '"),
    "no depth": (lambda h5: h5.attrs.update(n_layers=0), "the attribute n_layers is 0, a whole number from 1"),
    "masks": (lambda h5: h5["test"].attrs.update(masks=-1), "the attribute masks of /test is -1, a whole number"),
    "more masks": (lambda h5: h5["test"].attrs.update(masks=2), "/test/layer-0 is .64, 16. float32, .2, 64, N."),
    "no hash": (lambda h5: h5["test"].attrs.pop("rows_sha256"), "the attribute rows_sha256 of /test is missing"),
    "no split": (lambda h5: [h5.pop(s) for s in ("train", "test")], "holds no split"),
    "a layer less": (lambda h5: h5["test"].pop("layer-1"), "/test has other layers than the splits before it"),
    "a layer too deep": (lambda h5: h5.move("test/layer-3", "test/layer-4"), "holds the layers layer-0, .*layer-4"),
    "odd layer": (lambda h5: h5.move("test/layer-3", "test/layer-03"), "layer-0 to layer-3 can be there"),
    "no labels": (lambda h5: h5["test"].pop("labels"), "holds no dataset /test/labels"),
    "labels beyond": (lambda h5: h5["test/labels"].__setitem__(3, 2), "/test/labels holds 2; with 2 classes"),
    "other type": (
        lambda h5: (h5["test"].pop("layer-1"), h5["test"].create_dataset("layer-1", (64, 16), "<f8")),
        "/test/layer-1 is .64, 16. float64, .64, N. float32 is needed",
    ),
    "chunked": (
        lambda h5: (h5["test"].pop("layer-1"), h5["test"].create_dataset("layer-1", (64, 16), "<f4", chunks=(1, 16))),
        "/test/layer-1 is chunked or compressed; it must be contiguous",
    ),
    "a link out": (
        lambda h5: (h5["test"].pop("layer-1"), h5["test"].__setitem__("layer-1", h5py.ExternalLink("/etc/x", "/y"))),
        "/test/layer-1 is an external link, which may lead out of the file",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(make_run, tokens, tmp_path, name):
    path = extract_features(make_run(), tokens, tmp_path / "f.h5").path
    open_features(path)
    damage, words = DAMAGE[name]
    with h5py.File(path, "r+") as h5:
        damage(h5)
    with pytest.raises(FormatError, match=words) as e:
        open_features(path)
    assert str(path) in str(e.value)


def test_a_file_cut_off_is_refused(make_run, tokens, tmp_path):
    path = extract_features(make_run(), tokens, tmp_path / "f.h5").path
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(FormatError, match="is cut off"):
        open_features(path)
