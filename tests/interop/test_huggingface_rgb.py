"""transformers' ViT, DeiT and Swin: what it writes we read and compute the same from, what we write it reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from igpt_cli.errors import FormatError, IgptError, InputError, OutputError
from igpt_cli.images.transforms import prepare
from igpt_cli.interop.huggingface import export_huggingface, import_huggingface
from igpt_cli.interop.huggingface_rgb import crop_fraction
from igpt_cli.interop.weights import describe
from igpt_cli.model_dir import load_model, new_config, write_model
from igpt_cli.model_input import image_spec, pixel_input
from igpt_cli.models.registry import build_model
from igpt_cli.models.vit import resize_grid

R = 16
VIT = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 60, "image_size": R,
    "patch_size": 4, "num_labels": 5,
}  # fmt: skip
SWIN = {
    "image_size": R, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 3.0, "num_labels": 5,
}  # fmt: skip
#: Their class -> (config class, sizes, the backend it becomes here).
KINDS = {
    "ViTForImageClassification": ("ViTConfig", VIT, "vit"),
    "DeiTForImageClassification": ("DeiTConfig", VIT, "deit_two_tokens"),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", VIT, "deit_distilled"),
    "SwinForImageClassification": ("SwinConfig", SWIN, "swin"),
    "ViTModel": ("ViTConfig", VIT, "vit"),
    "DeiTModel": ("DeiTConfig", VIT, "deit_distilled"),
    "SwinModel": ("SwinConfig", SWIN, "swin"),
}
PREPARED = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": R, "width": R}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}  # fmt: skip


def saved(kind: str, folder: Path, processor: dict | None = PREPARED, **changes) -> Path:
    """A model of theirs with every parameter random, as it saves itself, and how its images are prepared."""
    config, sizes, _ = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, R, R, generator=torch.Generator().manual_seed(1))


def normed_inputs(theirs, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What their blocks read after the first norm, and their final norm gives; and the logits, if there are any."""
    body, seen = getattr(theirs, theirs.base_model_prefix, theirs), []
    blocks = body.layers if hasattr(body, "layers") else [b for stage in body.encoder.layers for b in stage.blocks]
    for module in [*(block.layernorm_before for block in blocks), body.layernorm]:
        module.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    return seen, theirs(x)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    """Logits and the features of every layer are theirs; what is exported is what was imported, bit for bit."""
    source = saved(kind, tmp_path / "theirs")
    config = import_huggingface(source, tmp_path / "run")
    run = load_model(tmp_path / "run")
    assert config["model"]["backend"] == KINDS[kind][2]
    assert run.palette is None
    theirs = getattr(transformers, kind).from_pretrained(source).eval()
    with torch.no_grad():
        seen, out = normed_inputs(theirs, images())
        if "Classification" in kind:
            torch.testing.assert_close(run.model(images()), out.logits, atol=1e-4, rtol=1e-4)
        found = run.model.features(images(), range(run.model.n_layers + 1), pool="none")
    assert len(seen) == len(found) == 4
    for layer, expected in enumerate(seen):
        torch.testing.assert_close(found[layer], expected, atol=1e-4, rtol=1e-4)

    summary = export_huggingface(tmp_path / "run", tmp_path / "again")
    assert summary["architecture"] == kind
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "again"))
    before = {name: t for name, t in before.items() if "pooler" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, told = getattr(transformers, kind).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert all("pooler" in name for name in told["missing_keys"])
    assert not any(value for key, value in told.items() if key != "missing_keys"), told
    ours, others = again.config.to_dict(), theirs.config.to_dict()
    of_no_model = {
        "_name_or_path",
        "encoder_stride",
        *({"id2label", "label2id"} if "Classification" not in kind else ()),
    }
    assert not {k for k in ours if ours[k] != others[k]} - of_no_model
    back = import_huggingface(tmp_path / "again", tmp_path / "back")
    assert {k: back[k] for k in ("model", "preparation")} == {k: config[k] for k in ("model", "preparation")}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin"])
def test_models_of_masked_images_are_read_without_what_masks(kind, tmp_path):
    """Their features are those of the model without the head that predicts pixels."""
    config, sizes, _ = KINDS[f"{kind}Model"]
    sizes = {**sizes, "encoder_stride": 4}
    theirs = getattr(transformers, f"{kind}ForMaskedImageModeling")(getattr(transformers, config)(**sizes)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    told: list[str] = []
    import_huggingface(tmp_path / "theirs", tmp_path / "run", note=told.append)
    root = kind.lower()
    assert told[-1] == f"excluded: decoder.0.bias, decoder.0.weight, {root}.embeddings.mask_token"
    ours, x = load_model(tmp_path / "run").model, images()
    places = getattr(theirs, root)(x).last_hidden_state[:, {"ViT": 1, "DeiT": 2, "Swin": 0}[kind] :]
    last = ours.n_layers
    torch.testing.assert_close(ours.features(x, [last])[last], places.mean(1), atol=1e-5, rtol=1e-5)


def test_published_sizes_have_their_names():
    """The defaults of transformers are ViT-B/16 and Swin-T."""
    from igpt_cli.interop import swin_keys, vit_keys

    for config, keys, backend, name in (
        (transformers.ViTConfig(), vit_keys, "vit", "vit-b16"),
        (transformers.DeiTConfig(), vit_keys, "deit_distilled", "deit-b-distilled"),
        (transformers.SwinConfig(), swin_keys, "swin", "swin-t"),
    ):
        sizes, problems = keys.sizes_from_huggingface(config.to_diff_dict())
        assert not problems
        model = describe(backend, {**sizes, "n_classes": 9})
        assert model["name"] == name
        assert keys.sizes_from_huggingface(keys.sizes_to_huggingface(model))[0] == sizes
    assert describe("vit", {"embed_dim": 24, "num_heads": 3})["name"] == "vit"


def test_a_ratio_that_makes_no_whole_number(tmp_path):
    source = saved("SwinModel", tmp_path / "theirs", mlp_ratio=2.7)
    assert import_huggingface(source, tmp_path / "run")["model"]["mlp_ratio"] == 2.7
    source = saved("ViTModel", tmp_path / "vit", hidden_size=56, num_attention_heads=2, intermediate_size=61)
    import_huggingface(source, tmp_path / "other")
    export_huggingface(tmp_path / "other", tmp_path / "again")
    assert transformers.ViTConfig.from_pretrained(tmp_path / "again").intermediate_size == 61


def test_the_names_of_classes_come_along(tmp_path):
    names = ["ape", "bee", "cat", "dog", "eel"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    source = saved("ViTForImageClassification", tmp_path / "theirs", **labels)
    assert import_huggingface(source, tmp_path / "run")["imported"]["classes"] == names
    export_huggingface(tmp_path / "run", tmp_path / "again")
    config = transformers.ViTConfig.from_pretrained(tmp_path / "again")
    assert [config.id2label[i] for i in range(5)] == names
    saved("ViTForImageClassification", tmp_path / "plain")
    assert "classes" not in import_huggingface(tmp_path / "plain", tmp_path / "other")["imported"]


# Preparation of images.


def photo(path: Path, width: int, height: int) -> Path:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


CROPPED = {
    **PREPARED, "image_processor_type": "DeiTImageProcessor", "size": {"height": 20, "width": 20}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": R, "width": R},
}  # fmt: skip
SHORT = {**CROPPED, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}}


@pytest.mark.parametrize("stated", [
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "DeiTImageProcessor"},
    {"image_processor_type": "CLIPImageProcessor"},
    {"image_processor_type": "BitImageProcessor", "do_normalize": None},
    {"feature_extractor_type": "DeiTFeatureExtractor", "do_center_crop": None, "size": 224, "image_mean": [0.1] * 3},
], ids=str)  # fmt: skip
def test_keys_left_out_are_their_processors_defaults_and_null_is_false(stated, tmp_path):
    folder = saved("ViTForImageClassification", tmp_path / "theirs", stated, image_size=224, patch_size=32)
    import_huggingface(folder, tmp_path / "run")
    run, file = load_model(tmp_path / "run"), photo(tmp_path / "photo.png", 300, 300)
    ours = pixel_input(run)(prepare(file, image_spec(run).preprocess, "photo")[None])
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    expected = theirs(Image.open(file), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", [(64, 48), (43, 71), (50, 50)], ids=str)
@pytest.mark.parametrize("processor", [PREPARED, SHORT, CROPPED], ids=["squeezed", "short side", "squeezed and cut"])
def test_images_are_prepared_as_theirs(processor, sides, tmp_path):
    """To the last pixel, but where what is cut off is odd: their centre is then rounded down, timm's to even numbers.

    Of squeezing before a crop only squares are the same, which a note says.
    """
    source, told = saved("ViTForImageClassification", tmp_path / "theirs", processor), []
    import_huggingface(source, tmp_path / "run", note=told.append)
    run = load_model(tmp_path / "run")
    assert bool(told) == (processor is CROPPED)
    file = photo(tmp_path / "photo.png", *sides)
    pixels = prepare(file, image_spec(run).preprocess, "photo")
    ours = pixel_input(run)(pixels[None])
    export_huggingface(tmp_path / "run", tmp_path / "again")
    for folder in ("theirs", "again"):
        if folder == "theirs" and processor is CROPPED and sides[0] != sides[1]:
            continue
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / folder, use_fast=False)
        expected = theirs(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_old_forms_of_the_preparation(tmp_path):
    """Numbers instead of sides by name; the kind that Facebook's DeiT has on the hub."""
    old = {
        "crop_size": R, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 20,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "feature_extractor_type": "DeiTFeatureExtractor",
    }  # fmt: skip
    source = saved("DeiTForImageClassificationWithTeacher", tmp_path / "theirs", old)
    assert import_huggingface(source, tmp_path / "run")["preparation"] == {
        "size": R, "crop": 0.8, "filter": "bicubic", "mean": old["image_mean"], "std": old["image_std"],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "crop", "mean"), [("ViTModel", None, 0.5), ("DeiTModel", 0.875, 0.485)])
def test_without_a_preparation_the_usual_one_is_taken_and_told(kind, crop, mean, tmp_path):
    told = []
    config = import_huggingface(saved(kind, tmp_path / "theirs", None), tmp_path / "run", note=told.append)
    assert config["preparation"]["crop"] == crop
    assert config["preparation"]["mean"][0] == mean
    assert "has no preprocessor_config.json; images are prepared as is usual for" in told[0]


def test_the_short_side_is_met_exactly():
    for side in (16, 192, 224, 384):
        for short in range(side, side + 200):
            assert int(side / crop_fraction(side, short)) == short


# Another resolution.


def test_positions_are_resized_on_the_way(tmp_path):
    source = saved("DeiTForImageClassificationWithTeacher", tmp_path / "theirs")
    config = import_huggingface(source, tmp_path / "run", resolution=24)
    assert (config["model"]["resolution"], config["preparation"]["size"]) == (24, 24)
    assert {k: v for k, v in config["imported"].items() if "resized" in k} == {
        "resized_from": R, "resized_by": "bicubic, without antialiasing",
    }  # fmt: skip
    before = load_file(source / "model.safetensors")["deit.embeddings.position_embeddings"]
    after = load_model(tmp_path / "run").model.pos_embed
    assert torch.equal(after[:, :2], before[:, :2])
    expected = resize_grid(before[0, 2:].unflatten(0, (4, 4)), 6, 6).flatten(0, 1)
    torch.testing.assert_close(after[0, 2:], expected, atol=0, rtol=0)
    x = torch.randn(2, 3, 24, 24)
    theirs = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(source).eval()
    with torch.no_grad():
        expected = theirs(x, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(load_model(tmp_path / "run").model(x), expected, atol=1e-4, rtol=1e-4)
    for kind, resolution, message in (
        ("DeiTForImageClassificationWithTeacher", 25, "does not divide into patches of 4"),
        ("SwinForImageClassification", 32, "--resolution is for ViT, DeiT and ResNet"),
    ):
        with pytest.raises(InputError, match=message):
            import_huggingface(saved(kind, tmp_path / kind), tmp_path / "other", resolution=resolution)
    assert not (tmp_path / "other").exists()


# What is refused.


def refused(folder: Path, error: type[IgptError] = FormatError, **options) -> str:
    """The message; nothing is left beside the folder."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(error) as caught:
        import_huggingface(folder, folder.parent / "made", **options)
    assert sorted(folder.parent.rglob("*")) == before
    return str(caught.value)


def change_json(path: Path, **changes) -> None:
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ViTModel", {"hidden_act": "relu"}, "cannot be read as a ViT: hidden_act is 'relu', a ViT here has 'gelu'"),
        ("ViTModel", {"qkv_bias": False, "num_channels": 1}, "num_channels is 1, .*; qkv_bias is False"),
        ("ViTModel", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the weights have 3"),
        ("ViTModel", {"hidden_size": "24"}, "hidden_size is '24', expected a whole number"),
        ("ViTModel", {"num_attention_heads": 5}, "embed_dim 24 does not divide into num_heads 5 heads"),
        ("ViTModel", {"image_size": [16, 32]}, r"image_size is \[16, 32\], expected a whole number"),
        ("ViTModel", {"intermediate_size": 96}, "mlp_ratio is 4.0, the weights have 2.5"),
        ("ViTModel", {"layer_norm_eps": "1e-6"}, "layer_norm_eps is '1e-6', expected a small number"),
        ("DeiTModel", {"model_type": "vit"}, "says 'vit', and the tensors in .* are named as of 'deit_with_teacher'"),
        ("SwinModel", {"mlp_ratio": math.inf}, "mlp_ratio is inf, the weights have 3.0"),
        ("SwinModel", {"image_size": "16"}, "cannot be read as a Swin: "),
        ("SwinModel", {"depths": [2, 2]}, r"depths is \[2, 2\], the weights have \[2, 1\]"),
        ("SwinModel", {"model_type": "beit"}, "model_type 'beit', expected imagegpt or vit or deit or swin"),
    ],
)
def test_another_config_is_refused(kind, changes, message, tmp_path):
    import re

    source = saved(kind, tmp_path / "theirs")
    change_json(source / "config.json", **changes)
    assert re.search(message, refused(source))


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "SwinForImageClassification"])
def test_other_tensors_are_refused(kind, tmp_path):
    source = saved(kind, tmp_path / "theirs")
    good = load_file(source / "model.safetensors")
    norm = "vit.layernorm" if kind.startswith("ViT") else "swin.layernorm"
    value = next(name for name in good if name.endswith("value.bias"))

    def message(**changes) -> str:
        tensors = {k: v for k, v in {**good, **changes}.items() if v is not None}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        return refused(source)

    weight = good[f"{norm}.weight"]
    assert "norm.weight is missing" in message(**{f"{norm}.weight": None})
    assert "vit.extra is not part of the model" in message(**{"vit.extra": weight.clone()})
    assert f"norm.weight is ({len(weight) + 1},), expected ({len(weight)},)" in message(
        **{f"{norm}.weight": torch.ones(len(weight) + 1)}
    )
    assert f"{norm}.weight is float64; float32, float16, bfloat16 can be read" in message(
        **{f"{norm}.weight": weight.double()}
    )
    assert f"{norm}.weight holds NaN or infinity" in message(**{f"{norm}.weight": weight / 0})
    assert f"{value} is not part of the model" in message(**{value.replace("value", "query"): None})
    assert "are named as of" in message(**dict.fromkeys(good), x=weight)
    save_file(good, source / "model.safetensors")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is not a readable safetensors file" in refused(source)
    (source / "model.safetensors").unlink()
    assert "holds no weights" in refused(source, InputError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_rescale": False}, "colours are not divided by 255"),
        ({"rescale_factor": 1 / 127.5}, "colours are not divided by 255"),
        ({"resample": 9}, "resample is 9"),
        ({"resample": None}, "resample is None"),
        ({"size": None}, "size None or crop_size None is no square"),
        ({"image_mean": [0.5, 0.5]}, "mean is [0.5, 0.5], expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std is [0.5, 0.5, 0], expected three numbers"),
        ({"size": {"height": 16, "width": 20}}, "is no square"),
        ({"do_center_crop": True, "crop_size": 16, "size": 200}, "crop is 0.08, the part of the short side"),
    ],
)
def test_a_preparation_that_cannot_be_done_is_refused(changes, message, tmp_path):
    source = saved("ViTModel", tmp_path / "theirs")
    change_json(source / "preprocessor_config.json", **changes)
    assert message in refused(source)


def test_what_belongs_to_an_imagegpt_is_refused(tmp_path):
    source = saved("ViTModel", tmp_path / "theirs")
    assert "is for an ImageGPT" in refused(source, InputError, palette="builtin:igpt-tiny")
    assert "is for an ImageGPT" in refused(source, InputError, no_head=True)


def test_outputs_are_kept(tmp_path):
    source = saved("ViTModel", tmp_path / "theirs")
    import_huggingface(source, tmp_path / "run")
    with pytest.raises(OutputError, match="exists"):
        import_huggingface(source, tmp_path / "run")
    import_huggingface(source, tmp_path / "run", force=True)
    with pytest.raises(OutputError, match="which is to be read"):
        import_huggingface(source, source, force=True)


def write(path: Path, backend: str, **sizes) -> Path:
    model = describe(backend, sizes)
    return write_model(path, build_model(model).state_dict(), None, new_config(model))


@pytest.mark.parametrize(
    ("backend", "sizes", "message"),
    [
        ("vit", {"pos_embed": "2d"}, "its positions are '2d'"),
        ("vit", {"global_pool": "avg"}, "its head reads the mean over patches"),
        ("vit", {"hybrid": [], "patch_size": 4, "resolution": 8}, "its patches are those of a ResNet"),
        ("swin", {"shift": False}, "the windows of this Swin are not shifted"),
    ],
)
def test_what_transformers_does_not_have_is_not_exported(backend, sizes, message, tmp_path):
    vit = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4, "resolution": 8}
    swin = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4, "patch_size": 2, "resolution": 16}
    run = write(tmp_path / "run", backend, **{**(swin if backend == "swin" else vit), **sizes})
    with pytest.raises(InputError, match=message):
        export_huggingface(run, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_bfloat16_rounds_and_comes_back_as_float32(tmp_path):
    run = write(tmp_path / "run", "deit", embed_dim=8, depth=1, num_heads=2, patch_size=4, resolution=8, n_classes=3)
    told = []
    export_huggingface(run, tmp_path / "theirs", dtype="bfloat16", note=told.append)
    assert told == []
    import_huggingface(tmp_path / "theirs", tmp_path / "back")
    before, after = (load_model(tmp_path / d).model.state_dict() for d in ("run", "back"))
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)
