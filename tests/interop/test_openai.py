"""igpt import openai: the imported model computes what OpenAI's formula does, written here in plain NumPy.

The checkpoints are of toy size. Where TensorFlow is installed it writes them, sharded and with an optimizer's state as
the originals have them; elsewhere an array for each variable stands in for the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_cli.errors import FormatError, InputError, MismatchError
from igpt_cli.evaluation.pixels import evaluation_masks
from igpt_cli.interop import openai
from igpt_cli.interop.openai import find_checkpoint, import_openai, openai_model, openai_weights
from igpt_cli.model_dir import load_model
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.palette.formats import write_palette
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.loader import MASK_PROB

L, H, D, R, V = 3, 2, 16, 4, 8
PALETTE = Palette(np.random.default_rng(0).uniform(0, 255, (V, 3)))
OBJECTIVES = ("ar", "bert")


def variables(objective="ar", L=L, H=H, D=D, R=R, V=V, seed=0):
    """Random arrays under OpenAI's names, large enough that every one of them matters to the logits."""
    rng = np.random.default_rng(seed)
    shapes = {"wpe": (R * R, D), "wte": (V, D), "wtet": (V, D), "ln_f/g": (D,)}
    shapes |= {"sos": (D,)} if objective == "ar" else {}
    for i in range(L):
        shapes |= {f"h{i}/attn/{x}_proj": (H, D // H, D) for x in "qkvc"}
        shapes |= {f"h{i}/ln_1/g": (D,), f"h{i}/ln_2/g": (D,)}
        shapes |= {f"h{i}/mlp/c_fc/w": (D, 4 * D), f"h{i}/mlp/c_proj/w": (4 * D, D)}
    return {f"model/{name}": rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def norm(x, g):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * g


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def formula(v, tokens, hidden=None):
    """Logits (B, T, V) float64, from the variables as they are; `hidden` (B, T) bool for BERT."""
    v = {name: array.astype(np.float64) for name, array in v.items()}
    L = sum(name.endswith("ln_1/g") for name in v)
    K, D = v["model/h0/attn/q_proj"].shape[1:]
    h = v["model/wte"][tokens]
    T = tokens.shape[1]
    if "model/sos" in v:
        h = np.concatenate([np.broadcast_to(v["model/sos"], (len(h), 1, D)), h[:, :-1]], axis=1)
    else:
        h = h * (1 - hidden)[..., None]
    h = h + v["model/wpe"]
    for i in range(L):
        at = f"model/h{i}"
        x = norm(h, v[f"{at}/ln_1/g"])
        q, k, u = (np.einsum("bsf,hef->bhse", x, v[f"{at}/attn/{name}_proj"]) for name in "qkv")
        w = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(K)
        if "model/sos" in v:
            seen = np.tril(np.ones((T, T)))
            w = w * seen - 1e10 * (1 - seen)
        a = np.einsum("bhst,bhte->bhse", softmax(w), u)
        h = h + np.einsum("bhse,hef->bsf", a, v[f"{at}/attn/c_proj"])
        m = norm(h, v[f"{at}/ln_2/g"]) @ v[f"{at}/mlp/c_fc/w"]
        h = h + (m / (1 + np.exp(-1.702 * m))) @ v[f"{at}/mlp/c_proj/w"]
    return norm(h, v["model/ln_f/g"]) @ v["model/wtet"].T


def formula_losses(v, tokens, hidden=None):
    """(B, T) float64: nats of each token."""
    return -np.log(np.take_along_axis(softmax(formula(v, tokens, hidden)), tokens[..., None], -1)[..., 0])


def tokens_and_mask(objective, n=5):
    rng = np.random.default_rng(7)
    return rng.integers(V, size=(n, R * R)), rng.random((n, R * R)) < 0.4 if objective == "bert" else None


def check_logits(model, v, objective):
    tokens, hidden = tokens_and_mask(objective)
    with torch.inference_mode():
        found = model(torch.from_numpy(tokens), None if hidden is None else torch.from_numpy(hidden)).numpy()
    expected = formula(v, tokens, hidden)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Checkpoints: written by TensorFlow, or stood in for.


def write_with_tensorflow(prefix, arrays, shards=3):
    """As TensorFlow 1's Saver writes it, after a step of Adam, which adds its slots; the parameters stay as they are.

    Saver makes a shard for each machine and merges them; here the same two operations make the shards of one machine.
    """
    tf = pytest.importorskip("tensorflow", reason="TensorFlow writes this checkpoint: pip install 'igpt-cli[openai]'")
    tf1 = tf.compat.v1
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tf1.Graph().as_default():
        made = [tf1.get_variable(n, initializer=tf1.constant(a), use_resource=False) for n, a in arrays.items()]
        loss = sum(tf1.reduce_sum(v * v) for v in made if v.dtype.is_floating)
        step = tf1.train.get_or_create_global_step()
        train = tf1.train.AdamOptimizer(0.0).minimize(loss, global_step=step)
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            session.run(train)
            if shards == 1:
                tf1.train.Saver().save(session, str(prefix))
                return
            values = session.run({v.op.name: v for v in tf1.global_variables()})
    parts = [f"{prefix}.part{i}" for i in range(shards)]
    for i, part in enumerate(parts):
        names = list(values)[i::shards]
        tensors = [tf.constant(values[name]) for name in names]
        tf.raw_ops.SaveV2(prefix=part, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix))
    assert len(list(prefix.parent.glob(f"{prefix.name}.data-*-of-{shards:05d}"))) == shards


def write_stand_in(prefix, arrays, shards=3):
    """Files of the right names; `open_stand_in` reads the arrays."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    (prefix.parent / f"{prefix.name}.index").write_bytes(b"index")
    for i in range(shards):
        (prefix.parent / f"{prefix.name}.data-{i:05d}-of-{shards:05d}").write_bytes(b"data")
    slots = {f"{name}/Adam{end}": np.zeros_like(a) for name, a in arrays.items() for end in ("", "_1")}
    slots |= {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.95), "global_step": np.int64(1)}
    np.savez(prefix.with_name("arrays.npz"), **arrays, **slots)


def open_stand_in(prefix):
    arrays = dict(np.load(prefix.with_name("arrays.npz")))
    return {name: list(a.shape) for name, a in arrays.items()}, arrays.__getitem__


@pytest.fixture(params=["stand-in", "tensorflow"])
def write(request, monkeypatch):
    """write(prefix, arrays): a checkpoint that `import_openai` reads."""
    if request.param == "tensorflow":
        return write_with_tensorflow
    monkeypatch.setattr(openai, "open_checkpoint", open_stand_in)
    return write_stand_in


@pytest.fixture
def checkpoint(workspace, write):
    """checkpoint(objective, arrays): openai/model.ckpt-1000 with kmeans_centers.npy beside it."""

    def made(objective="ar", arrays=None):
        prefix = workspace / "openai" / "model.ckpt-1000"
        write(prefix, variables(objective) if arrays is None else arrays)
        write_palette(PALETTE, prefix.with_name("kmeans_centers.npy"), force=True)
        return prefix

    return made


# The mapping.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_mapping_gives_the_formula(objective):
    v = variables(objective)
    config = openai_model({name: a.shape for name, a in v.items()}, bert=objective == "bert")
    model = build_model(config).eval()
    model.load_state_dict(openai_weights(config, v.__getitem__))
    check_logits(model, v, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_variable_matters_to_the_formula(objective):
    """Or else the test above would not see it in the wrong place."""
    v = variables(objective)
    tokens, hidden = tokens_and_mask(objective)
    expected = formula(v, tokens, hidden)
    for name in v:
        changed = formula(v | {name: np.roll(v[name], 1)}, tokens, hidden)
        assert np.abs(changed - expected).max() > 1e-3, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["igpt-s", "igpt-m", "igpt-l"])
def test_the_published_sizes_are_recognised(name, objective):
    expected = model_config(name, resolution=32, n_vocab=512, objective=objective)
    sizes = {"L": expected["n_layer"], "H": expected["n_head"], "D": expected["n_embd"]}
    D, H = sizes["D"], sizes["H"]
    shapes = {"wpe": (1024, D), "wte": (512, D), "wtet": (512, D), "ln_f/g": (D,)}
    shapes |= {"sos": (D,)} if objective == "ar" else {}
    for i in range(sizes["L"]):
        shapes |= {f"h{i}/attn/{x}_proj": (H, D // H, D) for x in "qkvc"}
        shapes |= {f"h{i}/ln_1/g": (D,), f"h{i}/ln_2/g": (D,)}
        shapes |= {f"h{i}/mlp/c_fc/w": (D, 4 * D), f"h{i}/mlp/c_proj/w": (4 * D, D)}
    assert openai_model({f"model/{k}": s for k, s in shapes.items()}, objective == "bert") == expected


def test_other_floats_become_float32():
    v = variables()
    config = openai_model({name: a.shape for name, a in v.items()}, bert=False)
    halves = {name: a.astype(np.float16) for name, a in v.items()}
    weights = openai_weights(config, lambda name: halves[name].astype(np.float64))
    assert {w.dtype for w in weights.values()} == {torch.float32}
    np.testing.assert_array_equal(weights["wpe"].numpy(), halves["model/wpe"].astype(np.float32))


# The command.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_becomes_a_model(igpt, checkpoint, objective):
    v = variables(objective)
    prefix = checkpoint(objective, v | {"model/clf/wclf": np.zeros((10, D), np.float32)})
    bert = ["--bert"] if objective == "bert" else []
    done = igpt("import", "openai", prefix, "-o", "runs/toy", *bert)
    assert (done.code, done.stdout) == (0, "runs/toy\n")
    assert "excluded: model/clf/wclf, the head of a classifier\n" in done.stderr
    assert f"excluded: {2 * len(v) + 5} variables of the optimizer\n" in done.stderr
    run = load_model("runs/toy")
    check_logits(run.model, v, objective)
    assert run.palette.sha256 == PALETTE.sha256
    assert run.config["model"] == {
        "name": "igpt",
        "backend": "igpt",
        "n_layer": L,
        "n_head": H,
        "n_embd": D,
        "resolution": R,
        "n_vocab": V,
        "objective": objective,
    }
    assert run.config["imported"] == {
        "from": str(prefix),
        "form": "openai",
        "step": 1000,
        "left_out": ["model/clf/wclf"],
        "palette": str(prefix.with_name("kmeans_centers.npy")),
        "palette_sha256": PALETTE.sha256,
        "n_parameters": sum(a.size for a in v.values()),
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_whole_road_of_the_page_gives_the_formula_s_loss(igpt, checkpoint, workspace, objective):
    """docs/checkpoints.md, "OpenAI's figures", on stand-ins: checkpoint and arrays in, nats per token out."""
    v = variables(objective)
    checkpoint(objective, v)
    rng = np.random.default_rng(3)
    x = {name: rng.integers(V, size=(n, R * R)) for name, n in (("tr", 20), ("va", 6), ("te", 50))}
    for name, tokens in x.items():
        np.save(f"openai/toy_{name}X.npy", tokens)
        np.save(f"openai/toy_{name}Y.npy", np.eye(4, dtype=np.float32)[rng.integers(4, size=len(tokens))])
    bert = ["--bert"] if objective == "bert" else []
    assert igpt("import", "openai", "openai/model.ckpt-1000", "-o", "runs/openai-s", *bert, "-q").code == 0
    assert igpt("tokens", "import", "openai/toy", "-o", "data/toy.h5", "-q").code == 0
    done = igpt("evaluate", "runs/openai-s", "data/toy.h5", "--split", "test", "--json", "--per-image", "images.jsonl")
    found = json.loads(done.stdout)
    hidden = evaluation_masks(np.arange(50), R * R, MASK_PROB) if objective == "bert" else np.ones((50, R * R), bool)
    per_image = (formula_losses(v, x["te"], hidden) * hidden).sum(1) / hidden.sum(1)
    assert found["n_images"] == 50
    assert found["nats_per_token"] == pytest.approx(per_image.mean(), abs=2e-5)
    # Without the last, incomplete batch, as the page says.
    lines = [json.loads(line) for line in Path("images.jsonl").read_text().splitlines()]
    kept = [line["nats_per_token"] for line in lines if line["row"] < 48]
    assert np.mean(kept) == pytest.approx(per_image[:48].mean(), abs=2e-5)


# What cannot be read.


def without(name):
    return {k: a for k, a in variables().items() if k != name}


def changed(**arrays):
    return variables() | {f"model/{name}": a for name, a in arrays.items()}


BAD = {
    "missing": (without("model/h1/ln_2/g"), "model.ckpt-1000 cannot be read as an iGPT: model/h1/ln_2/g is missing"),
    "a block is missing": (
        {k: a for k, a in variables().items() if "/h1/" not in k},
        "model/h1/attn/v_proj is missing; model/h1/attn/c_proj is missing",
    ),
    "too many": (changed(extra=np.zeros(3, np.float32)), "model/extra is not part of the model"),
    "biases": (changed(**{"h0/mlp/c_fc/b": np.zeros(4 * D, np.float32)}), "h0/mlp/c_fc/b is not part of the model"),
    "other shape": (
        changed(**{"h2/mlp/c_fc/w": np.zeros((4 * D, D), np.float32)}),
        "model/h2/mlp/c_fc/w is (64, 16), expected (16, 64)",
    ),
    "several": (
        {k: a for k, a in changed(extra=np.zeros(3, np.float32)).items() if k != "model/ln_f/g"},
        "model/ln_f/g is missing; model/extra is not part of the model",
    ),
    "NaN": (changed(**{"h1/ln_1/g": np.full(D, np.nan, np.float32)}), "model/h1/ln_1/g holds NaN or infinity"),
    "infinity": (changed(sos=np.full(D, -np.inf, np.float32)), "model/sos holds NaN or infinity"),
    "whole numbers": (changed(wpe=np.zeros((R * R, D), np.int64)), "model/wpe holds int64, expected floating-point"),
    "not a square": (changed(wpe=np.zeros((R * R - 1, D), np.float32)), "has 15 positions (model/wpe), which is no"),
    "heads": (
        variables() | {f"model/h{i}/attn/{x}_proj": np.zeros((3, 5, D), np.float32) for i in range(L) for x in "qkvc"},
        "n_embd 16 does not divide into n_head 3 heads",
    ),
    "another model": (
        {"dense/kernel": np.zeros((3, 4), np.float32)},
        "is no iGPT: model/h0/attn/q_proj is missing; of 1 variables it holds dense/kernel",
    ),
    "a vector": (changed(wte=np.zeros(D, np.float32)), "is no iGPT: model/wte is (16,), expected 2 axes"),
    "colours": (
        variables(V=9),
        "has 9 colours and openai/kmeans_centers.npy 8; give the palette it was trained with, --palette",
    ),
    "BERT": (variables("bert"), "has no model/sos, which only BERT models lack; if it is one, give --bert"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_one_clear_message(igpt, checkpoint, workspace, name):
    arrays, message = BAD[name]
    checkpoint(arrays=arrays)
    done = igpt("import", "openai", "openai/model.ckpt-1000", "-o", "runs/toy")
    assert (done.code, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: openai/model.ckpt-1000 ")
    assert message in last
    assert not (workspace / "runs").exists() or not list((workspace / "runs").iterdir())


def test_an_autoregressive_checkpoint_is_not_taken_for_bert(igpt, checkpoint):
    checkpoint()
    done = igpt("import", "openai", "openai", "-o", "runs/toy", "--bert")
    assert done.stderr.splitlines()[-1].endswith("has model/sos, so it predicts the next pixel; leave --bert out")


def test_existing_outputs_stay(igpt, checkpoint, workspace):
    checkpoint()
    command = ("import", "openai", "openai", "-o", "runs/toy", "-q")
    assert igpt(*command).code == 0
    before = (workspace / "runs/toy/model.safetensors").read_bytes()
    assert "runs/toy exists already; choose another --out" in igpt(*command).stderr
    checkpoint(arrays=changed(sos=np.full(D, np.nan, np.float32)))
    assert igpt(*command, "--force").code == 1
    assert (workspace / "runs/toy/model.safetensors").read_bytes() == before
    checkpoint(arrays=variables(seed=1))
    assert igpt(*command, "--force").code == 0
    assert (workspace / "runs/toy/model.safetensors").read_bytes() != before
    (workspace / "openai/config.json").write_text("{}")
    done = igpt("import", "openai", "openai", "-o", "openai", "--force")
    assert "openai holds model.ckpt-1000, which is to be read; choose another --out" in done.stderr
    assert (workspace / "openai/model.ckpt-1000.index").exists()


def test_the_palette_is_named_or_lies_beside(igpt, checkpoint, workspace):
    prefix = checkpoint()
    prefix.with_name("kmeans_centers.npy").rename("colours.npy")
    done = igpt("import", "openai", "openai", "-o", "runs/toy")
    assert "no palette was given and none is at openai/kmeans_centers.npy; give --palette" in done.stderr
    assert igpt("import", "openai", "openai", "-o", "runs/toy", "-p", "colours.npy").code == 0
    assert load_model("runs/toy").palette.sha256 == PALETTE.sha256


# Files.


def empty(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_a_checkpoint_is_found_by_any_of_its_names(tmp_path):
    files = ["m.ckpt-9.index", "m.ckpt-9.meta", "m.ckpt-9.data-00000-of-00002", "m.ckpt-9.data-00001-of-00002"]
    empty(tmp_path, *files)
    for name in ("m.ckpt-9", *files, ""):
        assert find_checkpoint(tmp_path / name) == tmp_path / "m.ckpt-9"
    empty(tmp_path, "m.ckpt-10.index", "m.ckpt-10.data-00000-of-00001")
    with pytest.raises(InputError, match=r"holds several checkpoints, m.ckpt-10, m.ckpt-9; name one of them"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text(
        'model_checkpoint_path: "/elsewhere/m.ckpt-9"\nall_model_checkpoint_paths: "x"\n'
    )
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoint") == tmp_path / "m.ckpt-9"
    assert find_checkpoint(tmp_path / "m.ckpt-10") == tmp_path / "m.ckpt-10"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"m\.ckpt-9\.index does not exist; a TensorFlow checkpoint is"),
        (["m.ckpt-9"], r"m\.ckpt-9\.index does not exist"),
        (["m.ckpt-9.index"], r"has no data files: m\.ckpt-9\.data-00000-of-<n> is missing"),
        (["m.ckpt-9.data-00000-of-00001"], r"m\.ckpt-9\.index does not exist"),
        (
            ["m.ckpt-9.index", "m.ckpt-9.data-00001-of-00003"],
            r"2 of the 3 data files of .*m.ckpt-9 are missing: m.ckpt-9.data-00000-of-00003, m.ckpt-9.data-00002-of",
        ),
    ],
)
def test_missing_files_are_named(tmp_path, files, message):
    empty(tmp_path, *files)
    with pytest.raises(InputError, match=message):
        find_checkpoint(tmp_path / "m.ckpt-9")


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"holds no checkpoint \(\*\.index\)"):
        find_checkpoint(tmp_path)


def test_without_tensorflow_the_message_says_how_to_get_it(igpt, workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    write_stand_in(workspace / "m.ckpt-9", variables())
    write_palette(PALETTE, "kmeans_centers.npy")
    done = igpt("import", "openai", "m.ckpt-9", "-o", "runs/toy")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: m.ckpt-9 is a TensorFlow checkpoint, and TensorFlow cannot be imported (")
    assert done.stderr.endswith("install it with pip install 'igpt-cli[openai]'\n")
    assert not list((workspace / "runs").iterdir())


@pytest.mark.parametrize("damage", ["cut", "changed", "no index", "an index of another kind", "index cut"])
def test_damaged_files_are_told(workspace, damage):
    """TensorFlow keeps a checksum of each variable, so a changed byte is found."""
    prefix = workspace / "m.ckpt-9"
    write_with_tensorflow(prefix, variables())
    data, index = prefix.with_name("m.ckpt-9.data-00001-of-00003"), prefix.with_name("m.ckpt-9.index")
    PALETTE.save("p.npz")
    whole = data.read_bytes()
    match damage:
        case "cut":
            data.write_bytes(whole[: len(whole) // 4])
        case "changed":
            # The optimizer's moments are not read, so every byte that may belong to a parameter is changed.
            data.write_bytes(bytes(b ^ 1 for b in whole))
        case "no index":
            index.write_bytes(b"")
        case "an index of another kind":
            index.write_bytes(b"hello" * 100)
        case "index cut":
            index.write_bytes(index.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"m\.ckpt-9 is damaged or cut off: .*; fetch its files again"):
        import_openai(prefix, "runs/toy", palette="p.npz")
    assert not list((workspace / "runs").iterdir())


def test_one_file_as_saver_writes_it(workspace):
    v = variables()
    write_with_tensorflow(workspace / "m.ckpt-9", v, shards=1)
    PALETTE.save("p.npz")
    import_openai(workspace, "runs/toy", palette="p.npz")
    check_logits(load_model("runs/toy").model, v, "ar")


def test_the_library_raises_what_it_says():
    with pytest.raises(MismatchError):
        openai_model({name: a.shape for name, a in variables("bert").items()}, bert=False)
    with pytest.raises(MismatchError):
        openai_model({name: a.shape for name, a in variables().items()}, bert=True)


@pytest.mark.parametrize("name", ["h0/mlp/c_fc/w/adam_v", "AdamWeightDecayOptimizer_1/x", "model/wpe/Adam_1", "_step"])
def test_what_an_optimizer_keeps_is_known(name):
    assert openai.OPTIMIZER.search(name)


def test_no_variable_of_a_model_is_taken_for_an_optimizer_s():
    assert not [name for name in variables() if openai.OPTIMIZER.search(name)]
