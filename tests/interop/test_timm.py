"""timm's files: key names and shapes written out here as facts, both ways; what the file does not say; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt_cli.errors import FormatError, IgptError, InputError, MismatchError, OutputError
from igpt_cli.interop.timm import ARCHITECTURES, export_timm, import_timm
from igpt_cli.interop.weights import describe
from igpt_cli.model_dir import load_model, new_config, write_model
from igpt_cli.models.registry import RGB_PRESETS, build_model, count_parameters

#: Facts: what timm's vit_base_patch16_224 and deit_base_distilled_patch16_224 hold, one block of twelve.
BLOCK_B = {
    "norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,),
    "attn.proj.weight": (768, 768), "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
    "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,),
}  # fmt: skip
VIT_B = {
    "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
    "patch_embed.proj.bias": (768,), **{f"blocks.{b}.{k}": v for b in range(12) for k, v in BLOCK_B.items()},
    "norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,),
}  # fmt: skip
DEIT_B_DISTILLED = {
    **VIT_B, "dist_token": (1, 1, 768), "pos_embed": (1, 198, 768), "head_dist.weight": (1000, 768),
    "head_dist.bias": (1000,),
}  # fmt: skip
#: (parameters that timm reports, tensors).
FACTS = {"vit-b16": (86_567_656, VIT_B), "deit-b-distilled": (87_338_192, DEIT_B_DISTILLED)}


@pytest.mark.parametrize("name", FACTS)
def test_names_and_shapes_are_timms(name):
    """The tensors of our model are those of theirs, no more and no less."""
    n_parameters, shapes = FACTS[name]
    preset = RGB_PRESETS[name]
    with torch.device("meta"):
        model = build_model(describe(preset.backend, {**preset.sizes, "n_classes": 1000}))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert count_parameters(model) == n_parameters


def test_every_preset_without_a_resnet_has_an_architecture_of_timm():
    ours = {n for n, p in RGB_PRESETS.items() if p.backend in ("vit", "deit", "deit_distilled", "swin")}
    small = {n for n in ours if RGB_PRESETS[n].sizes["resolution"] < 224}
    hybrids = {n for n in ours if "hybrid" in RGB_PRESETS[n].sizes}
    assert set(ARCHITECTURES) == ours - small - hybrids
    for name, theirs in ARCHITECTURES.items():
        sizes = RGB_PRESETS[name].sizes
        assert theirs.endswith(f"_{sizes['resolution']}")
        assert f"patch{sizes['patch_size']}_" in theirs
        assert f"window{sizes.get('window_size')}_" in theirs or "window" not in theirs


TOY = {"embed_dim": 192, "depth": 1, "num_heads": 3, "patch_size": 4, "resolution": 8, "mlp_ratio": 2.0, "n_classes": 5}
SWIN = {
    "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2, "mlp_ratio": 3.0,
    "resolution": 32, "n_classes": 5,
}  # fmt: skip
BACKENDS = {"vit": TOY, "deit": TOY, "deit_distilled": TOY, "swin": SWIN}
PREPARATION = {"size": 8, "crop": 0.875, "filter": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def write(path: Path, backend: str, **changes) -> Path:
    """A model directory of toy size in which every parameter is random."""
    model = describe(backend, {**BACKENDS.get(backend, TOY), **changes})
    torch.manual_seed(0)
    weights = {k: w + 0.2 * torch.randn_like(w) for k, w in build_model(model).state_dict().items()}
    prepared = {**PREPARATION, "size": model["resolution"]}
    classes = {"data": {"classes": list("abcde")}} if model.get("n_classes") == 5 else {}
    return write_model(path, weights, None, new_config(model, preparation=prepared, **classes))


def tensors(backend: str, **changes) -> dict[str, torch.Tensor]:
    model = describe(backend, {**BACKENDS[backend], **changes})
    torch.manual_seed(0)
    return build_model(model).state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_and_back(backend, tmp_path):
    run, told = write(tmp_path / "run", backend), []
    summary = export_timm(run, tmp_path / "theirs", note=told.append)
    back = import_timm(tmp_path / "theirs", tmp_path / "back", note=told.append)
    assert told == []
    before, after = load_model(run), load_model(tmp_path / "back")
    assert after.config["model"] == before.config["model"]
    assert after.config["preparation"] == before.config["preparation"]
    assert back["imported"]["classes"] == before.config["data"]["classes"]
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor)
    assert back["imported"]["architecture"] == summary["architecture"]
    R = before.config["model"]["resolution"]
    x = torch.randn(2, 3, R, R)
    with torch.no_grad():
        torch.testing.assert_close(after.model(x), before.model(x), atol=0, rtol=0)


def test_an_odd_width_of_the_mlp_survives(tmp_path):
    """61 / 56 * 56 is less than 61 in floating point."""
    weights = {**tensors("vit", embed_dim=56, num_heads=2, mlp_ratio=1.5)}
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"):
        weights[name] = weights[name][:61].clone()
    weights["blocks.0.mlp.fc2.weight"] = weights["blocks.0.mlp.fc2.weight"][:, :61].clone()
    save_file(weights, tmp_path / "x.safetensors")
    import_timm(tmp_path / "x.safetensors", tmp_path / "run", num_heads=2)
    assert load_model(tmp_path / "run").model.blocks[0].mlp.fc1.out_features == 61
    export_timm(tmp_path / "run", tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == weights.keys()


def test_what_is_written_is_timms_form(tmp_path):
    run = write(tmp_path / "run", "deit_distilled")
    export_timm(run, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == {
        "architecture": "deit_base_distilled_patch16_224",
        "num_classes": 5,
        "num_features": 192,
        "pretrained_cfg": {
            "input_size": [3, 8, 8], "fixed_input_size": True, "interpolation": "bilinear", "crop_pct": 0.875,
            "crop_mode": "center", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 5,
        },
        "model_args": {
            "img_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 4,
        },
        "label_names": ["a", "b", "c", "d", "e"],
    }  # fmt: skip
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) == set(tensors("deit_distilled"))


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(tensors("vit", depth=12, mlp_ratio=4.0, patch_size=16, resolution=32), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


IMAGENET = [0.485, 0.456, 0.406]


def test_a_file_alone(file, tmp_path):
    """Heads by the width of known models, colours by the architecture; that it may be a DeiT is told."""
    told = []
    config = import_timm(file, tmp_path / "run", note=told.append)
    assert config["model"]["num_heads"] == 3
    assert config["model"]["backend"] == "vit"
    assert config["preparation"] == {
        "size": 32, "crop": 0.9, "filter": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    assert [note.split(";")[0].split(":")[0] for note in told] == [
        "taken as a ViT", "images are prepared as is usual in timm",
    ]  # fmt: skip
    told.clear()
    config = import_timm(file, tmp_path / "other", num_heads=6, resolution=64, note=told.append)
    assert (config["model"]["num_heads"], config["model"]["resolution"], config["preparation"]["size"]) == (6, 64, 64)


def test_a_preset_may_be_named(tmp_path):
    sizes = {k: v for k, v in RGB_PRESETS["deit-ti-32"].sizes.items() if k != "drop_path_rate"}
    save_file(tensors("deit", **{**sizes, "mlp_ratio": 4.0}), tmp_path / "deit.safetensors")
    told = []
    config = import_timm(tmp_path / "deit.safetensors", tmp_path / "run", preset="deit-ti-32", note=told.append)
    assert (config["model"]["name"], config["model"]["backend"]) == ("deit-ti-32", "deit")
    assert config["preparation"]["mean"] == IMAGENET
    assert len(told) == 1
    assert import_timm(tmp_path / "deit.safetensors", tmp_path / "vit")["model"]["name"] == "vit-ti-32"
    with pytest.raises(MismatchError, match="is not vit-ti-64: patch_size 4, not 8; resolution 32, not 64"):
        import_timm(tmp_path / "deit.safetensors", tmp_path / "other", preset="vit-ti-64")
    with pytest.raises(MismatchError, match="is not deit-ti-distilled-32: backend 'vit', not 'deit_distilled'"):
        import_timm(tmp_path / "deit.safetensors", tmp_path / "other", preset="deit-ti-distilled-32")
    with pytest.raises(InputError, match="there is no model 'deit'"):
        import_timm(tmp_path / "deit.safetensors", tmp_path / "other", preset="deit")


def test_config_json_beside_it_tells_what_it_is(file, tmp_path):
    """That of another library is not listened to."""
    config = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"mean": IMAGENET, "crop_pct": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, told = import_timm(file, tmp_path / "run", note=(told := []).append), told
    assert (found["model"]["backend"], found["preparation"]["crop"], told) == ("deit", 1, [])
    assert found["preparation"]["mean"] == IMAGENET
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeiTModel"], "model_type": "deit"}))
    assert import_timm(file, tmp_path / "other")["model"]["backend"] == "vit"
    squash = {"architecture": "vit", "pretrained_cfg": {"crop_mode": "squash", "crop_pct": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(squash))
    assert import_timm(file, tmp_path / "squash")["preparation"]["crop"] is None


def test_the_form_before_0_8_nulls_and_keys_left_out(file, tmp_path):
    """What was beside `architecture` is `pretrained_cfg`; timm's own defaults (its PretrainedCfg) fill what is not."""
    names = [f"c{i}" for i in range(5)]
    at_top = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "interpolation": "bilinear"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, **at_top, "labels": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = import_timm(file, tmp_path / "old")
    assert found["imported"]["classes"] == names
    expected = {"size": 32, "crop": 0.8, "filter": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert found["preparation"] == expected
    cfg = {"mean": [0.1, 0.2, 0.3], "std": None, "interpolation": None, "crop_mode": None, "label_names": names}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": cfg}))
    found = import_timm(file, tmp_path / "nulls")
    assert found["imported"]["classes"] == names
    expected |= {"crop": 0.875, "filter": "bicubic", "std": [0.229, 0.224, 0.225]}
    assert found["preparation"] == expected


@pytest.mark.parametrize(("pretrained", "message"), [
    ({"crop_pct": 0}, "crop is 0"),
    ({"interpolation": "random"}, "filter is 'random', expected one of nearest"),
    ({"std": [1, 1, 0]}, "std is [1, 1, 0], expected three numbers"),
    ({"mean": 0.5}, "mean is 0.5, expected three numbers"),
    ({"input_size": [3, 8, 16]}, "input_size is [3, 8, 16], expected [3, R, R]"),
    ({"input_size": 8}, "input_size is 8, expected [3, R, R]"),
])  # fmt: skip
def test_a_preparation_that_cannot_be_done_is_refused(pretrained, message, file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": pretrained}))
    assert message in refused(file)


@pytest.mark.parametrize("layout", ["timm", "official"])
def test_swin_in_both_layouts(layout, tmp_path):
    """Its image side is that of the preset with the same sizes, or what config.json says."""
    from igpt_cli.interop.swin_keys import to_theirs

    preset = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "mlp_ratio": 4.0}
    preset |= {"window_size": 4, "patch_size": 2, "n_classes": None}
    with torch.device("meta"):
        meta = build_model(describe("swin", {**preset, "resolution": 32})).state_dict()
    ours = {name: torch.full(t.shape, 0.5, dtype=torch.bfloat16) for name, t in meta.items()}
    save_file(to_theirs(ours, layout), tmp_path / "swin.safetensors")
    config = import_timm(tmp_path / "swin.safetensors", tmp_path / "run")
    assert (config["model"]["name"], config["imported"]["layout"]) == ("swin-t-32", layout)
    assert config["preparation"]["mean"] == IMAGENET
    toy = to_theirs(tensors("swin"), layout)
    save_file(toy, tmp_path / "toy.safetensors")
    with pytest.raises(InputError, match="do not show its image side"):
        import_timm(tmp_path / "toy.safetensors", tmp_path / "toy")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 32, 32]}}))
    assert import_timm(tmp_path / "toy.safetensors", tmp_path / "toy")["model"]["resolution"] == 32


# What is refused.


def refused(file: Path, error: type[IgptError] = FormatError, **options) -> str:
    """The message; nothing is left beside the file."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(error) as caught:
        import_timm(file, file.parent / "made", **options)
    assert sorted(file.parent.rglob("*")) == before
    return str(caught.value)


def test_other_files_are_refused(tmp_path):
    good, file = tensors("deit_distilled"), tmp_path / "x.safetensors"

    def message(error=FormatError, **changes) -> str:
        found = {k.replace("__", "."): v for k, v in {**good, **changes}.items()}
        save_file({k: v.clone() for k, v in found.items() if v is not None}, file)
        return refused(file, error)

    norm = good["norm.weight"]
    assert "cannot be read as a DeiT: norm.bias is missing" in message(**{"norm.bias": None})
    assert "pre_logits.fc.weight is not part of the model" in message(pre_logits__fc__weight=norm)
    assert "fc_norm.weight" in message(fc_norm__weight=norm)
    assert "it has a ResNet that makes its patches (patch_embed.backbone.stem)" in message(
        patch_embed__backbone__stem=norm
    )
    assert "a DeiT: it has a distillation token, and head_dist.weight is missing" in message(
        **{"head_dist.weight": None, "head_dist.bias": None}
    )
    assert "pos_embed has 3 rows for patches, which is no square grid" in message(pos_embed=torch.zeros(1, 5, 192))
    assert "pos_embed is missing" in message(pos_embed=None)
    assert "holds NaN or infinity" in message(**{"norm.weight": norm / 0})
    assert "norm.weight is I64" in message(**{"norm.weight": norm.long()})
    assert "head_dist.weight is (4, 192), expected (5, 192)" in message(**{"head_dist.weight": torch.zeros(4, 192)})
    assert "is no ViT, DeiT, Swin or ResNet in timm's names; its tensors are x, ..." in message(
        **dict.fromkeys(good), x=norm
    )
    file.write_bytes(b"\x08\x02}")
    assert "is not a readable safetensors file" in refused(file)
    file.unlink()
    assert "timm's weights" in refused(file, InputError)


def test_a_width_of_no_known_model_needs_its_heads(tmp_path):
    save_file(tensors("vit", embed_dim=24), tmp_path / "x.safetensors")
    assert "say --num-heads N" in refused(tmp_path / "x.safetensors", InputError)
    assert "does not divide into num_heads 5" in refused(tmp_path / "x.safetensors", num_heads=5)
    assert import_timm(tmp_path / "x.safetensors", tmp_path / "run", num_heads=4)["model"]["num_heads"] == 4


def test_transformers_names_are_sent_to_the_other_command(tmp_path):
    from igpt_cli.interop.swin_keys import to_theirs

    save_file(to_theirs(tensors("swin"), "huggingface"), tmp_path / "x.safetensors")
    assert "has transformers' names; read its folder: igpt import huggingface" in refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("vit", {"pos_embed": "relative"}, "its positions are 'relative'"),
        ("swin", {"shift": False}, "are not shifted, and timm's always are"),
        ("deit_two_tokens", {}, "has a distillation token and no head for it"),
        ("attention_conv", {}, "models of backend 'attention_conv' are not exchanged"),
    ],
)
def test_what_timm_does_not_have_is_not_exported(backend, changes, message, tmp_path):
    if backend == "attention_conv":
        model = {"backend": backend, "name": backend, "resolution": 8}
        run = write_model(tmp_path / "run", {}, None, new_config(model))
    else:
        run = write(tmp_path / "run", backend, **changes)
    with pytest.raises(InputError, match=message):
        export_timm(run, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_other_norms_are_told_and_outputs_are_kept(tmp_path):
    told = []
    run = write(tmp_path / "run", "vit", norm_eps=1e-12)
    export_timm(run, tmp_path / "theirs", note=told.append)
    assert told == ["the norms of this model add 1e-12, timm's 1e-06: late digits differ"]
    with pytest.raises(OutputError, match="exists"):
        export_timm(run, tmp_path / "theirs")
    export_timm(run, tmp_path / "theirs", dtype="bfloat16", force=True)
    assert load_file(tmp_path / "theirs" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    with pytest.raises(OutputError, match="which is to be read"):
        import_timm(tmp_path / "theirs", tmp_path / "theirs", force=True)
    with pytest.raises(InputError, match="dtype 'int8' is not known"):
        export_timm(run, tmp_path / "other", dtype="int8")
