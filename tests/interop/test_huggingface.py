"""Hugging Face's form, with transformers as the oracle: what we write it reads, what it writes we read."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import require_imagegpt
from safetensors.torch import load_file, save_file

from igpt_cli.errors import FormatError, IgptError, InputError, MismatchError, OutputError
from igpt_cli.interop.huggingface import export_huggingface, import_huggingface
from igpt_cli.interop.weights import describe, differences
from igpt_cli.model_dir import load_model, new_config, read_config, write_model
from igpt_cli.models.registry import build_model
from igpt_cli.palette.formats import preprocessor_config
from igpt_cli.palette.palette import Palette

DOCS = Path(__file__).parents[2] / "docs"
V = 11


def palette(n: int = V, low: float = 0.0) -> Palette:
    return Palette(np.random.default_rng(3).uniform(low, 255, (n, 3)))


def write_toy(path: Path, resolution: int = 4, objective: str = "ar", **sizes) -> Path:
    """A model directory of toy size in which every parameter is random."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_vocab": V, **sizes}
    config = describe("igpt", {**sizes, "resolution": resolution, "objective": objective})
    torch.manual_seed(0)
    weights = {k: w + 0.2 * torch.randn_like(w) for k, w in build_model(config).state_dict().items()}
    return write_model(path, weights, palette(), new_config(config))


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "toy")


@pytest.fixture
def theirs(tmp_path, toy) -> Path:
    """Their form of `toy`."""
    export_huggingface(toy, tmp_path / "theirs")
    return tmp_path / "theirs"


def from_pretrained(folder: Path, caplog, **options):
    """Their model; it must take every tensor and warn about none."""
    from transformers import ImageGPTForCausalImageModeling
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            model, info = ImageGPTForCausalImageModeling.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        theirs.disable_propagation()
    assert not any(info.values()), info
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    return model.eval()


def transformers_model(resolution: int = 4, kind: str = "ImageGPTForCausalImageModeling", **settings):
    """Their own initial values; the gains are made to differ."""
    import transformers

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": V + 1, "n_positions": resolution**2}
    torch.manual_seed(1)
    model = getattr(transformers, kind)(transformers.ImageGPTConfig(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model


def saved(model, folder: Path, **options) -> Path:
    """`save_pretrained`, and the palette beside it."""
    model.save_pretrained(folder, **options)
    document = preprocessor_config(palette(), math.isqrt(model.config.n_positions))
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder


def images(resolution: int, n: int = 2) -> torch.Tensor:
    return torch.randint(V, (n, resolution**2), generator=torch.Generator().manual_seed(1))


def shifted(tokens: torch.Tensor, sos: int = V) -> torch.Tensor:
    return torch.cat((torch.full_like(tokens[:, :1], sos), tokens[:, :-1]), dim=1)


@torch.no_grad()
def assert_alike(ours, theirs, tokens: torch.Tensor, tolerance: float = 5e-5) -> None:
    """Logits, and the features of every layer."""
    require_imagegpt()
    out = theirs(shifted(tokens), output_hidden_states=True)
    torch.testing.assert_close(ours(tokens), out.logits.float(), atol=tolerance, rtol=tolerance)
    found = ours.features(tokens, range(ours.n_layers + 1))
    for layer in range(ours.n_layers):
        normed = theirs.transformer.h[layer].ln_1(out.hidden_states[layer]).mean(dim=1)
        torch.testing.assert_close(found[layer], normed.float(), atol=tolerance, rtol=tolerance)
    last = out.hidden_states[ours.n_layers].mean(dim=1)
    torch.testing.assert_close(found[ours.n_layers], last.float(), atol=tolerance, rtol=tolerance)


def import_refused(folder: Path, error: type[IgptError] = FormatError, **options) -> str:
    """The message; nothing is left beside the folder."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(error) as caught:
        import_huggingface(folder, folder.parent / "made", **options)
    assert sorted(folder.parent.rglob("*")) == before
    return str(caught.value)


def change_json(path: Path, **changes) -> None:
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# What we write, transformers reads.


@pytest.mark.parametrize("resolution", [32, 64])
def test_transformers_computes_the_same_from_an_export(resolution, tmp_path, caplog):
    run = write_toy(tmp_path / "run", resolution)
    export_huggingface(run, tmp_path / "theirs")
    assert_alike(load_model(run).model, from_pretrained(tmp_path / "theirs", caplog), images(resolution, 1))


@pytest.mark.parametrize("resolution", [32, 64])
def test_bfloat16_rounds_the_weights_and_nothing_else(resolution, tmp_path, caplog):
    run, tokens = write_toy(tmp_path / "run", resolution), images(resolution, 1)
    summary = export_huggingface(run, tmp_path / "theirs", dtype="bfloat16")
    assert summary["dtype"] == "bfloat16"
    import_huggingface(tmp_path / "theirs", tmp_path / "back")
    ours, back = load_model(run).model, load_model(tmp_path / "back").model
    for name, weight in back.state_dict().items():
        torch.testing.assert_close(weight, ours.state_dict()[name].bfloat16().float(), atol=0, rtol=0)
    # In float32 they compute what we compute from the same rounded weights; in bfloat16 (their default for such a file)
    # activations are rounded too, each to 8 bits.
    assert_alike(back, from_pretrained(tmp_path / "theirs", caplog, dtype=torch.float32), tokens)
    half = from_pretrained(tmp_path / "theirs", caplog)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        logits, rounded = back(tokens), half(shifted(tokens)).logits.float()
    assert (logits - rounded).abs().max() < 0.05 * logits.abs().max()
    assert (logits - rounded).square().mean().sqrt() < 0.02 * logits.std()


def test_an_export_has_no_dropout_and_zero_biases(theirs):
    config = json.loads((theirs / "config.json").read_text())
    assert [config[f"{part}_pdrop"] for part in ("attn", "embd", "resid")] == [0, 0, 0]
    biases = {k: w for k, w in load_file(theirs / "model.safetensors").items() if k.endswith(".bias")}
    assert len(biases) == 8
    assert not any(bias.any() for bias in biases.values())


def test_the_export_says_what_it_wrote(toy, tmp_path):
    summary = export_huggingface(toy, tmp_path / "theirs")
    assert summary["n_biases"] == 9 * 16 * 2
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert sum(w.numel() for w in stored.values()) == summary["n_parameters"] + summary["n_biases"]
    assert {p.name for p in (tmp_path / "theirs").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }


def test_a_class_head_is_left_out_and_said(toy, tmp_path, caplog):
    run = load_model(toy)
    config = {**run.config, "model": {**run.config["model"], "n_classes": 3, "head_layer": 2}}
    weights = {**run.model.state_dict(), "wclf.weight": torch.ones(3, 16)}
    write_model(tmp_path / "tuned", weights, run.palette, config)
    said = []
    summary = export_huggingface(tmp_path / "tuned", tmp_path / "theirs", note=said.append)
    assert said == [
        "excluded: the class head, of 3 classes, for which transformers' model of pixels has no place",
        "use transformers 5.21 or later: older ones divide scores by 2, not 2.83",
    ]
    assert summary["n_parameters"] == export_huggingface(toy, tmp_path / "plain")["n_parameters"]
    assert_alike(run.model, from_pretrained(tmp_path / "theirs", caplog), images(4, 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resolution", [4, 8])
def test_their_processor_gives_our_tokens(resolution, tmp_path):
    """Of an image that has the model's size, so that neither side resizes."""
    from PIL import Image
    from transformers import AutoImageProcessor

    run = write_toy(tmp_path / "run", resolution)
    export_huggingface(run, tmp_path / "theirs")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    rgb = np.random.default_rng(0).integers(0, 256, (50, resolution, resolution, 3), np.uint8)
    theirs = np.asarray(processor([Image.fromarray(image) for image in rgb])["input_ids"])
    np.testing.assert_array_equal(theirs, load_model(run).palette.quantize(rgb).reshape(50, -1))
    back = processor.clusters[theirs[0]]
    np.testing.assert_array_equal(np.rint(127.5 * (back + 1)).astype(np.uint8), palette().dequantize(theirs[0]))


def test_bert_stays_here(tmp_path):
    run = write_toy(tmp_path / "run", objective="bert")
    with pytest.raises(InputError, match="objective 'bert'.*always autoregressive"):
        export_huggingface(run, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_unknown_dtypes_are_refused(toy, tmp_path):
    with pytest.raises(InputError, match="'float16' is not known.*float32 or bfloat16"):
        export_huggingface(toy, tmp_path / "theirs", dtype="float16")


# What transformers writes, we read.


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_computes_the_same_here(resolution, dtype, tmp_path):
    model = transformers_model(resolution).to(getattr(torch, dtype))
    config = import_huggingface(saved(model, tmp_path / "theirs"), tmp_path / "made")
    assert config["imported"]["dtype"] == dtype
    made = load_model(tmp_path / "made")
    assert made.config == config
    assert made.config["model"]["resolution"] == resolution
    assert made.palette.sha256 == palette().sha256
    assert_alike(made.model, model.float(), images(resolution, 1))


def test_where_it_came_from_is_kept(tmp_path):
    import transformers

    folder = saved(transformers_model(), tmp_path / "theirs")
    config = import_huggingface(folder, tmp_path / "made")
    assert config["model"] == {
        "name": "igpt",
        "backend": "igpt",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "resolution": 4,
        "n_vocab": V,
        "objective": "ar",
    }
    assert config["imported"] == {
        "from": str(folder),
        "form": "huggingface",
        "weights": "model.safetensors",
        "dtype": "float32",
        "transformers_version": transformers.__version__,
        "left_out": [],
        "head": "lm_head",
        "palette": str(folder / "preprocessor_config.json"),
        "palette_sha256": palette().sha256,
        "n_parameters": sum(p.numel() for p in load_model(tmp_path / "made").model.parameters()),
    }


def test_the_name_is_that_of_the_preset_with_the_same_sizes():
    named = [describe("igpt", {"n_layer": n, "n_embd": d, "n_head": h})["name"] for n, d, h in
             [(24, 512, 8), (36, 1024, 8), (48, 1536, 16), (24, 512, 16)]]  # fmt: skip
    assert named == ["igpt-s", "igpt-m", "igpt-l", "igpt"]


def test_several_files_with_an_index(tmp_path):
    model = transformers_model()
    folder = saved(model, tmp_path / "theirs", max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    config = import_huggingface(folder, tmp_path / "made")
    assert config["imported"]["weights"] == "model.safetensors.index.json"
    assert_alike(load_model(tmp_path / "made").model, model, images(4))


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin_with_masks(zipped, tmp_path):
    """As the first versions of transformers wrote it."""
    model = transformers_model()
    folder = saved(model, tmp_path / "theirs")
    (folder / "model.safetensors").unlink()
    weights = model.state_dict()
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    config = import_huggingface(folder, tmp_path / "made")
    assert config["imported"]["weights"] == "pytorch_model.bin"
    assert config["imported"]["left_out"] == []
    assert_alike(load_model(tmp_path / "made").model, model, images(4))


def test_several_bins_with_an_index(tmp_path, theirs):
    weights = load_file(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, theirs / file)
    (theirs / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    import_huggingface(theirs, tmp_path / "made")
    assert_same_model(tmp_path / "made", tmp_path / "toy")


def test_keys_without_their_prefix(theirs, toy, tmp_path):
    def bare(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    change_weights(theirs, bare)
    import_huggingface(theirs, tmp_path / "made")
    assert_same_model(tmp_path / "made", toy)


def test_the_hubs_cache_of_links(theirs, toy, tmp_path):
    """Its snapshots are folders of links to files elsewhere."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    theirs.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    import_huggingface(snapshot, tmp_path / "made")
    assert_same_model(tmp_path / "made", toy)


def assert_same_model(a: Path, b: Path) -> None:
    """Bit by bit."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k].view(torch.int32), second[k].view(torch.int32))] == []
    assert Palette.load(a).sha256 == Palette.load(b).sha256


def test_there_and_back_changes_no_bit(toy, theirs, tmp_path):
    import_huggingface(theirs, tmp_path / "back")
    assert_same_model(toy, tmp_path / "back")
    export_huggingface(tmp_path / "back", tmp_path / "again")
    for file in theirs.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_through_transformers_and_back_changes_no_bit(toy, theirs, tmp_path, caplog):
    from_pretrained(theirs, caplog).save_pretrained(tmp_path / "saved")
    import_huggingface(tmp_path / "saved", tmp_path / "back", palette=toy)
    assert_same_model(toy, tmp_path / "back")


# Palettes.


def test_a_palette_is_needed(theirs, toy, tmp_path):
    (theirs / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in import_refused(theirs, InputError)
    config = import_huggingface(theirs, tmp_path / "made", palette=toy)
    assert config["imported"]["palette"] == str(toy)
    assert_same_model(tmp_path / "made", toy)


def test_the_vocabulary_is_the_palette_and_one(theirs, tmp_path):
    palette(V + 1).save(tmp_path / "larger.npz")
    said = import_refused(theirs, MismatchError, palette=tmp_path / "larger.npz")
    assert f"vocab_size {V + 1}: {V} colours and the start of sequence; the palette" in said
    assert said.endswith(f"has {V + 1} colours")


def test_a_palette_of_light_colours_comes_back(tmp_path):
    """Its clusters are all in 0..1, which elsewhere could be another scale; here their processor says it."""
    config = describe("igpt", {"n_layer": 1, "n_head": 1, "n_embd": 4, "resolution": 2, "n_vocab": V})
    run = write_model(tmp_path / "run", build_model(config).state_dict(), palette(low=128), new_config(config))
    export_huggingface(run, tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "back")
    assert_same_model(run, tmp_path / "back")


def test_clusters_that_transformers_rounded(theirs, toy, tmp_path):
    """With torchvision its processor keeps them, and saves them, in float32."""
    clusters = json.loads((theirs / "preprocessor_config.json").read_text())["clusters"]
    change_json(theirs / "preprocessor_config.json", clusters=np.float32(clusters).tolist())
    import_huggingface(theirs, tmp_path / "rounded")
    rounded = Palette.load(tmp_path / "rounded")
    assert rounded.sha256 != palette().sha256
    rgb = np.random.default_rng(0).integers(0, 256, (10_000, 3), np.uint8)
    np.testing.assert_array_equal(rounded.quantize(rgb), palette().quantize(rgb))
    import_huggingface(theirs, tmp_path / "made", palette=toy)
    assert_same_model(tmp_path / "made", toy)


def test_an_old_feature_extractor(theirs, toy, tmp_path):
    clusters = json.loads((theirs / "preprocessor_config.json").read_text())["clusters"]
    old = {"feature_extractor_type": "ImageGPTFeatureExtractor", "do_normalize": True, "size": 4, "resample": 2}
    (theirs / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters, **old}))
    notes = []
    import_huggingface(theirs, tmp_path / "made", note=notes.append)
    assert notes == []
    assert_same_model(tmp_path / "made", toy)


def test_another_size_is_noted(theirs, tmp_path):
    change_json(theirs / "preprocessor_config.json", size={"height": 256, "width": 256})
    notes = []
    import_huggingface(theirs, tmp_path / "made", note=notes.append)
    assert len(notes) == 1
    assert "256" in notes[0]
    assert "4x4 positions" in notes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_normalize": False}, "clusters are not in -1..1"),
        ({"do_rescale": False}, "clusters are not in -1..1"),
        ({"image_mean": [0.4, 0.5, 0.5]}, "image_mean is [0.4, 0.5, 0.5]"),
        ({"clusters": ...}, "without a list `clusters`"),
        ({"clusters": [[0, 0, 300]] * V}, "outside the scale -1..1"),
        ({"clusters": [[0, 0]] * V}, "`clusters` is not a list of colours of three numbers each"),
        ({"clusters": [[0, 0, float("nan")]] * V}, "not finite"),
    ],
)
def test_palettes_of_another_kind_are_refused(changes, said, theirs):
    change_json(theirs / "preprocessor_config.json", **changes)
    assert said in import_refused(theirs)


# What is not ours is refused.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', expected imagegpt or vit or deit or swin"),
        ({"model_type": ...}, "model_type None, expected imagegpt or vit or deit or swin"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, iGPT has False"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', iGPT has 'quick_gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, iGPT has 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, iGPT has True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, iGPT has False"),
        ({"add_cross_attention": True}, "add_cross_attention is True, iGPT has False"),
        ({"n_inner": 48}, "n_inner is 48, iGPT has 4 * n_embd = 64"),
        ({"n_positions": 18}, "n_positions is 18, which is no square"),
        ({"n_head": 3}, "n_embd 16 does not divide into n_head 3 heads"),
        ({"n_embd": ...}, "n_embd is None, expected a whole number"),
        ({"n_layer": True}, "n_layer is True, expected a whole number"),
        ({"n_layer": 2.0}, "n_layer is 2.0, expected a whole number"),
        ({"n_head": 0}, "n_head is 0, expected a whole number"),
        ({"vocab_size": 1}, "n_vocab is 0"),
        ({"n_layer": 2**31 - 1}, "has 2 blocks, its config.json says n_layer 2147483647"),
        ({"n_layer": 10**4000}, "n_layer is 1000"),
        ({"n_layer": 3}, "has 2 blocks, its config.json says n_layer 3"),
        ({"n_embd": 2**30}, "expected (3221225472,)"),
        ({"n_positions": 25}, "wpe.weight is (16, 16), expected (25, 16)"),
    ],
)
def test_other_models_are_refused(changes, said, theirs):
    change_json(theirs / "config.json", **changes)
    assert said in import_refused(theirs)


def test_all_that_differs_is_said_at_once(theirs):
    change_json(theirs / "config.json", tie_word_embeddings=True, n_head="8", activation_function="relu")
    said = import_refused(theirs)
    assert said.count(";") == 2
    for name in ("tie_word_embeddings", "n_head", "activation_function"):
        assert name in said


def test_n_inner_may_be_written_out_and_defaults_left_out(theirs, toy, tmp_path):
    change_json(theirs / "config.json", n_inner=64, activation_function=..., layer_norm_epsilon=..., dtype=...)
    import_huggingface(theirs, tmp_path / "made")
    assert_same_model(tmp_path / "made", toy)


def test_biases_are_refused_with_the_largest(theirs):
    def bias(weights):
        weights["transformer.h.0.mlp.c_fc.bias"][3] = 0.25
        weights["transformer.h.1.attn.c_proj.bias"][5] = -0.5

    change_weights(theirs, bias)
    said = import_refused(theirs)
    assert "has 2 biases that are not zero, and iGPT has none" in said
    assert "the largest value is 0.5, in h.1.attn.c_proj.bias" in said


def _remove(weights):
    del weights["transformer.h.1.ln_2.weight"]


def _add(weights):
    weights["transformer.h.1.mlp.c_gate.weight"] = torch.ones(2)


def _transpose(weights):
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].T.contiguous()


def _spoil(weights):
    weights["transformer.h.0.ln_1.weight"][2] = float("nan")
    weights["lm_head.weight"][0] = float("inf")


def _spoil_bias(weights):
    weights["transformer.h.0.mlp.c_fc.bias"][2] = float("nan")


def _double(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"].double()


def _whole(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)


def _twice(weights):
    weights["wpe.weight"] = weights["transformer.wpe.weight"].clone()


def _fewer(weights):
    for name in list(weights):
        if ".h.1." in name:
            del weights[name]


def _headless(weights):
    del weights["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_remove, ["h.1.ln_2.weight is missing"]),
        (_add, ["h.1.mlp.c_gate.weight is not part of the model"]),
        (_transpose, ["h.0.mlp.c_fc.weight is (64, 16), expected (16, 64)"]),
        (_spoil, ["h.0.ln_1.weight holds NaN or infinity", "lm_head.weight holds NaN or infinity"]),
        (_spoil_bias, ["h.0.mlp.c_fc.bias holds NaN or infinity"]),
        (_double, ["lm_head.weight is float64; float32, float16 and bfloat16 can be read"]),
        (_whole, ["lm_head.weight is I8; float32"]),
        (_twice, ["has wpe.weight twice, with and without 'transformer.'"]),
        (_fewer, ["has 1 blocks, its config.json says n_layer 2"]),
        (_headless, ["has no lm_head.weight", "--no-head"]),
        (lambda w: w.clear(), ["has 0 blocks"]),
    ],
)
def test_tensors_that_differ_are_named(change, said, theirs):
    change_weights(theirs, change)
    message = import_refused(theirs)
    for part in said:
        assert part in message


def test_many_differences_are_named_and_counted(theirs):
    def rename(weights):
        for name in list(weights):
            weights[name.replace("mlp", "ffn")] = weights.pop(name)

    change_weights(theirs, rename)
    said = import_refused(theirs)
    assert said.count(" is missing") == 8
    assert said.endswith("; and 8 more")


def test_differences_in_order():
    expected = {"a": (2,), "b": (3, 4), "c": (1,)}
    found = {"b": (4, 3), "c": [1], "d": (9,)}
    assert differences(found, expected) == [
        *("a is missing", "d is not part of the model", "b is (4, 3), expected (3, 4)")
    ]


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_safetensors_cut_off(keep, theirs):
    file = theirs / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is not a readable safetensors file" in import_refused(theirs)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((text, "is not readable JSON") for text in ("", "{", "\x00\xff", "[" * 100_000)),
        ("[]", "holds []"),
        ("null", "holds None"),
    ],
)
def test_json_that_is_none(name, text, problem, theirs):
    (theirs / name).write_text(text, encoding="latin-1")
    assert f"{theirs / name} {problem}" in import_refused(theirs)


def test_files_that_are_missing(theirs, tmp_path):
    (theirs / "model.safetensors").rename(tmp_path / "weights")
    assert "holds no weights: neither model.safetensors nor pytorch_model.bin" in import_refused(theirs, InputError)
    (theirs / "config.json").unlink()
    assert "config.json does not exist" in import_refused(theirs, InputError)
    said = import_refused(tmp_path / "openai" / "imagegpt-small", InputError)
    assert "is not a folder" in said
    assert "hf download" in said


def test_our_own_directory_is_told(toy):
    assert "is a model directory of igpt already" in import_refused(toy)


# Hostile files.


class Hostile:
    """Unpickled by a trusting reader, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("made-by-a-pickle"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_trusted(zipped, theirs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = load_file(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    bin_ = theirs / "pytorch_model.bin"
    torch.save({**weights, "transformer.x": Hostile()}, bin_, _use_new_zipfile_serialization=zipped)
    said = import_refused(theirs)
    assert re.search(r"it asks for pathlib[\w.]*Path\.touch|it asks for [\w.]+, and only tensors are read", said)
    assert "weights_only" not in said
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"a": 3}, "'a' is a int, expected a tensor"),
        ({3: torch.ones(2)}, "3 is a Tensor, expected a tensor of numbers with a name"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is a Tensor, expected a tensor of numbers with a name"),
        ({"a": torch.ones(3, device="meta")}, "'a' is a Tensor, expected a tensor of numbers with a name"),
    ],
)
def test_other_things_in_a_bin(held, said, theirs):
    (theirs / "model.safetensors").unlink()
    torch.save(held, theirs / "pytorch_model.bin")
    assert said in import_refused(theirs)


@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_a_bin_cut_off(keep, theirs):
    torch.save(load_file(theirs / "model.safetensors"), theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    file = theirs / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is not a readable file of weights: it is damaged or cut off" in import_refused(theirs)


def test_a_bin_that_unpacks_to_more_is_refused(theirs):
    torch.save(load_file(theirs / "model.safetensors"), theirs / "plain.bin")
    with zipfile.ZipFile(theirs / "plain.bin") as plain:
        with zipfile.ZipFile(theirs / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    (theirs / "plain.bin").unlink()
    (theirs / "model.safetensors").unlink()
    assert "is compressed" in import_refused(theirs)


@pytest.fixture
def index(theirs) -> Path:
    """The weights in one part, with an index."""
    (theirs / "model.safetensors").rename(theirs / "part.safetensors")
    names = load_file(theirs / "part.safetensors")
    file = theirs / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    return file


@pytest.mark.parametrize(
    "name",
    ["../part.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "..\\x.safetensors", "a\0", 7, None],
)
def test_an_index_that_leads_elsewhere(name, index):
    shutil.copy(index.parent / "part.safetensors", index.parent.parent / "part.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "transformer.wpe.weight": name}}))
    assert "only .safetensors files in its folder are read" in import_refused(index.parent)


def test_an_index_of_another_kind_of_file(index):
    """Else an index of safetensors could have a pickle read."""
    (index.parent / "part.bin").write_bytes(b"")
    index.write_text(json.dumps({"weight_map": {"transformer.wpe.weight": "part.bin"}}))
    assert "names the file 'part.bin'; only .safetensors files" in import_refused(index.parent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda places: places.pop("lm_head.weight"), "lm_head.weight: the index does not name it there"),
        (lambda places: places.update(more="part.safetensors"), "more: only the index says it is there"),
        (lambda places: places.update(more="gone.safetensors"), "gone.safetensors does not exist"),
        (lambda places: places.clear(), "has no `weight_map`"),
    ],
)
def test_an_index_that_is_wrong(change, said, index):
    places = json.loads(index.read_text())["weight_map"]
    change(places)
    index.write_text(json.dumps({"weight_map": places}))
    assert said in import_refused(index.parent, InputError)


def test_an_index_with_its_file_is_read(index, toy, tmp_path):
    import_huggingface(index.parent, tmp_path / "made")
    assert_same_model(tmp_path / "made", toy)


# Classifiers and bare models.


def test_a_classifier_is_taken_without_its_head_when_asked(tmp_path):
    model = transformers_model(kind="ImageGPTForImageClassification", num_labels=5)
    folder = saved(model, tmp_path / "theirs")
    said = import_refused(folder)
    assert "has no lm_head.weight" in said
    notes = []
    config = import_huggingface(folder, tmp_path / "made", no_head=True, note=notes.append)
    assert notes == ["excluded: score.weight (5, 16), the head of a classifier"]
    assert (config["imported"]["left_out"], config["imported"]["head"]) == (["score.weight"], "zeros")
    made, tokens = load_model(tmp_path / "made").model, images(4)
    assert not made.wtet.weight.any()
    with torch.no_grad():
        out = model.transformer(shifted(tokens))
    torch.testing.assert_close(made.features(tokens, [2])[2], out.last_hidden_state.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_a_bare_model_is_taken_without_a_head_when_asked(tmp_path):
    model = transformers_model(kind="ImageGPTModel")
    config = import_huggingface(saved(model, tmp_path / "theirs"), tmp_path / "made", no_head=True)
    assert config["imported"]["left_out"] == []
    tokens = images(4)
    with torch.no_grad():
        out = model(shifted(tokens))
        features = load_model(tmp_path / "made").model.features(tokens, [2])[2]
    torch.testing.assert_close(features, out.last_hidden_state.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_a_classifier_that_has_both_heads_is_read(theirs, toy, tmp_path):
    change_weights(theirs, lambda weights: weights.update({"score.weight": torch.ones(3, 16)}))
    config = import_huggingface(theirs, tmp_path / "made")
    assert config["imported"]["left_out"] == ["score.weight"]
    assert_same_model(tmp_path / "made", toy)


# Where things are written.


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_replaced(force, toy, theirs):
    for call, source in ((import_huggingface, theirs), (export_huggingface, toy)):
        before = {p: p.read_bytes() for p in source.iterdir()}
        for out in (source, source.parent, source.parent / "x" / ".." / source.name):
            with pytest.raises(OutputError, match="which is to be read"):
                call(source, out, force=force)
        assert {p: p.read_bytes() for p in source.iterdir()} == before


def test_force_replaces_its_own_kind_and_nothing_else(toy, theirs, tmp_path):
    import_huggingface(theirs, tmp_path / "made")
    shutil.copytree(theirs, tmp_path / "other")
    with pytest.raises(OutputError, match="exists already.*--force"):
        import_huggingface(theirs, tmp_path / "made")
    with pytest.raises(OutputError, match="has no palette.npz, so it is something else"):
        import_huggingface(theirs, tmp_path / "other", force=True)
    with pytest.raises(OutputError, match="has no preprocessor_config.json, so it is something else"):
        export_huggingface(toy, tmp_path / "made", force=True)
    import_huggingface(theirs, tmp_path / "made", force=True)
    export_huggingface(toy, tmp_path / "other", force=True)
    assert_same_model(tmp_path / "made", toy)


def test_their_folder_where_ours_belongs(theirs):
    with pytest.raises(FormatError, match=r"is a Hugging Face folder.*igpt import huggingface .*theirs -o MODEL"):
        read_config(theirs)
    with pytest.raises(FormatError, match="is a Hugging Face folder"):
        load_model(theirs)


# The page.


def blocks(language: str) -> list[str]:
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(workspace, igpt, capsys):
    """Its code for transformers, with its commands around, gives igpt's tokens, likelihood and features."""
    from PIL import Image

    from igpt_cli.images.transforms import Preprocess, prepare

    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(rgb).save("photo.png")
    saved(transformers_model(), Path("imagegpt-small"))
    calls = [line.split()[1:] for block in blocks("sh") for line in block.splitlines() if " huggingface " in line]
    # Those of the section on ViT, DeiT and Swin come last; test_interop_huggingface_rgb has such folders.
    assert [call[0] for call in calls] == ["import", "export", "import", "import", "export"]
    for call in calls[:2]:
        assert igpt(*call).code == 0
    namespace: dict = {"__name__": "docs"}
    code = [block for block in blocks("python") if "tensorflow" not in block]
    assert len(code) >= 6
    for block in code:
        exec(compile(block, "docs/checkpoints.md", "exec"), namespace)

    ours = load_model("builtin:igpt-tiny")
    tokens = ours.palette.quantize(prepare(Path("photo.png"), Preprocess(32), "photo.png")).reshape(1, -1)
    np.testing.assert_array_equal(namespace["ids"].numpy(), tokens)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(ours.model(tokens).transpose(1, 2), tokens, reduction="none")
        features = ours.model.features(tokens, range(25))
        model, inputs = namespace["model"], namespace["inputs"]
        labelled = model(inputs, labels=inputs).loss
    assert namespace["nats_per_token"] == pytest.approx(float(each.mean()), abs=1e-4)
    assert float(labelled) == pytest.approx(float(each[0, :-1].mean()), abs=1e-4)
    assert namespace["features"].keys() == features.keys()
    for layer, feature in features.items():
        torch.testing.assert_close(namespace["features"][layer], feature, atol=5e-5, rtol=5e-5)
    assert float(capsys.readouterr().out) < 5e-5

    # A step of fine-tuning moves everything but the biases, and the model comes back.
    trained = [p for p in model.parameters() if p.requires_grad]
    model(inputs, labels=inputs).loss.backward()
    torch.optim.SGD(trained, 0.01).step()
    model.save_pretrained("tuned")
    assert igpt(*calls[2]).code == 0
    with torch.no_grad():
        tuned, expected = load_model("runs/tuned").model(tokens), model(inputs).logits
    torch.testing.assert_close(tuned, expected, atol=3e-4, rtol=3e-4)  # a trained model has larger logits
    assert not torch.equal(tuned, ours.model(tokens))


def test_fed_as_documented_elsewhere_it_is_another_model(theirs, toy, caplog):
    """Why the page insists: without the start of sequence every feature differs."""
    model, tokens = from_pretrained(theirs, caplog), images(4)
    with torch.no_grad():
        wrong = model(tokens, output_hidden_states=True).hidden_states[-1].mean(dim=1)
        right = load_model(toy).model.features(tokens, [2])[2]
    assert ((wrong - right).norm(dim=1) > 0.02 * right.norm(dim=1)).all()
