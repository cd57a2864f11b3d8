"""Checkpoints as people bring them: torch.save's, wrapped models, timm's arguments, its ResNets, transformers 5's names."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from igpt_cli.errors import FormatError, IgptError, InputError, MismatchError
from igpt_cli.interop.huggingface import export_huggingface, import_huggingface
from igpt_cli.interop.timm import export_timm, import_timm
from igpt_cli.interop.weights import describe
from igpt_cli.model_dir import load_model, new_config, write_model
from igpt_cli.models.registry import build_model

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "resolution": 32, "n_classes": 3}


def tensors(backend: str = "vit", **sizes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(describe(backend, sizes or SIZES))
    return {k: v + 0.1 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in model.state_dict().items()}


@pytest.fixture
def plain() -> dict[str, torch.Tensor]:
    return tensors()


def refused(source: Path, error: type[IgptError] = FormatError, **options) -> str:
    with pytest.raises(error) as caught:
        import_timm(source, source.parent / "made", **options)
    assert not (source.parent / "made").exists()
    return str(caught.value)


# Files that torch.save wrote, and wrapped models.


@pytest.mark.parametrize(("nested", "zipped"), [(None, True), ("model", True), ("state_dict", False)])
def test_the_line_that_converts_a_pytorch_checkpoint_works(nested, zipped, plain, tmp_path):
    """Also where tensors share memory, are transposed, and options of the training lie next to them."""
    both = torch.stack([plain["norm.weight"], plain["norm.bias"]])
    held = {**plain, "norm.weight": both[0], "norm.bias": both[1], "head.weight": plain["head.weight"].T.clone().T}
    document = {nested: held, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if nested else held
    file = tmp_path / "it's official.pth"
    torch.save(document, file, _use_new_zipfile_serialization=zipped)
    message = refused(file, num_heads=2)
    assert "is a PyTorch checkpoint, and safetensors is read here; convert it: python -c " in message
    assert "\n" not in message
    line = shlex.split(message.split("convert it: ")[1])
    subprocess.run([sys.executable, *line[1:]], check=True)
    made = tmp_path / "it's official.safetensors"
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load_file(made).items())
    import_timm(made, tmp_path / "run", num_heads=2)
    assert torch.equal(load_model(tmp_path / "run").model.state_dict()["norm.bias"], plain["norm.bias"])


def test_a_folder_with_weights_of_torch_alone(plain, tmp_path):
    torch.save(plain, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model.bin .*model.safetensors$"):
        import_timm(tmp_path, tmp_path / "run", num_heads=2)


def test_other_zip_files_are_no_checkpoints(tmp_path):
    import numpy as np

    np.savez(tmp_path / "ViT-B_16.npz", x=np.zeros(3))
    assert "is not a readable safetensors file" in refused(tmp_path / "ViT-B_16.npz")


@pytest.mark.parametrize(
    "prefix", ["backbone.", "module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod."]
)
def test_prefixes_of_wrapped_models_are_stripped_and_said(prefix, plain, tmp_path):
    save_file({prefix + name: tensor for name, tensor in plain.items()}, tmp_path / "x.safetensors")
    notes: list[str] = []
    import_timm(tmp_path / "x.safetensors", tmp_path / "run", num_heads=2, note=notes.append)
    assert notes[0] == f"names of tensors: {prefix} stripped (20 times)"
    found = load_model(tmp_path / "run").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_a_wrapper_inside_a_model_and_two_models_in_one_file(plain, tmp_path):
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in plain.items()}
    save_file(inner, tmp_path / "x.safetensors")
    notes: list[str] = []
    import_timm(tmp_path / "x.safetensors", tmp_path / "run", num_heads=2, note=notes.append)
    assert notes[0] == "names of tensors: _orig_mod. stripped (12 times)"
    save_file({**plain, "module.cls_token": plain["cls_token"] + 1}, tmp_path / "y.safetensors")
    message = "has cls_token twice, once as module.cls_token; it holds more than one model"
    assert message in refused(tmp_path / "y.safetensors", num_heads=2)


def test_prefixes_in_a_folder_of_transformers(tmp_path, workspace):
    export_huggingface("builtin:igpt-tiny", tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file({f"module.{name}": t for name, t in weights.items()}, tmp_path / "theirs" / "model.safetensors")
    notes: list[str] = []
    import_huggingface(tmp_path / "theirs", tmp_path / "run", note=notes.append)
    assert notes == [f"names of tensors: module. stripped ({len(weights)} times)"]


# ViTs that igpt does not have.


def test_models_of_other_kinds_are_named(plain, tmp_path):
    D = 16

    def message(**changes) -> str:
        found = {**plain, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        save_file({k: v for k, v in found.items() if v is not None}, tmp_path / "x.safetensors")
        return refused(tmp_path / "x.safetensors", num_heads=2)

    assert "pos_embed has 16 rows, one a patch and none for the class token, as in DeiT III" in message(
        pos_embed=torch.zeros(1, 16, D)
    )
    registers = {"reg_token": torch.zeros(1, 4, D), "pos_embed": torch.zeros(1, 21, D)}
    assert "a ViT: it has 4 register tokens (reg_token), which igpt has not" in message(**registers)
    assert "(LayerScale), as DeiT III has (blocks.0.ls1.gamma)" in message(blocks__0__ls1__gamma=torch.ones(D))
    assert "a norm in front of its blocks, as CLIP has (norm_pre.weight)" in message(norm_pre__weight=torch.ones(D))
    assert "it has no class token (cls_token)" in message(cls_token=None)
    both = message(**registers, blocks__0__ls1__gamma=torch.ones(D))
    assert "4 register tokens" in both
    assert "LayerScale" in both


# timm's model_args.


def write_timm(folder: Path, weights: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    document = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, **config}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize("more", [
    {}, {"act_layer": "gelu"}, {"act_layer": None}, {"mlp_ratio": 4}, {"img_size": [32, 32]}, {"patch_size": [8, 8]},
    {"global_pool": "token"}, {"drop_path_rate": 0.1, "weight_init": "moco"}, {"init_values": None}, {"reg_tokens": 0},
    {"dynamic_img_size": True}, {"norm_layer": "layernorm"}, {"qkv_bias": True}, {"fc_norm": False},
])  # fmt: skip
def test_arguments_that_change_nothing_are_taken(more, plain, tmp_path):
    source = write_timm(tmp_path / "theirs", plain, model_args={**ARGS, **more})
    assert import_timm(source, tmp_path / "run")["model"]["num_heads"] == 2


@pytest.mark.parametrize(("more", "message"), [
    ({"act_layer": "quick_gelu"}, "act_layer is 'quick_gelu', a ViT here has 'gelu'"),
    ({"act_layer": "gelu_tanh"}, "act_layer is 'gelu_tanh'"),
    ({"norm_layer": "rmsnorm"}, "norm_layer is 'rmsnorm', a ViT here has 'layernorm'"),
    ({"global_pool": "avg", "fc_norm": False}, "global_pool is 'avg', a ViT here has 'token'"),
    ({"qk_norm": True}, "qk_norm is True, a ViT here has False"),
    ({"no_embed_class": True}, "no_embed_class is True"),
    ({"in_chans": 1}, "in_chans is 1, a ViT here has 3"),
    ({"mlp_ratio": 3}, "mlp_ratio is 3, the model has 4.0"),
    ({"img_size": 64}, "img_size is 64, the model has 32"),
    ({"img_size": [32, 64]}, "img_size is [32, 64], the model has 32"),
    ({"depth": 12}, "depth is 12, the model has 1"),
    ({"num_classes": 1000}, "num_classes is 1000, the model has 3"),
    ({"num_heads": "2"}, "num_heads is '2', the model has 4"),
    ({"scale": 3}, "scale is 3, an argument that igpt does not know"),
])  # fmt: skip
def test_arguments_that_make_another_model_are_refused(more, message, plain, tmp_path):
    source = write_timm(tmp_path / "theirs", plain, model_args={**ARGS, **more})
    heads = {"num_heads": 4} if isinstance(more.get("num_heads"), str) else {}
    with pytest.raises(FormatError) as caught:
        import_timm(source, tmp_path / "run", **heads)
    assert f"config.json cannot be read as a ViT: {message}" in str(caught.value)


@pytest.mark.parametrize(("config", "message"), [
    ({"global_pool": "avg"}, "global_pool is 'avg'"),
    ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "act_layer is 'quick_gelu'"),
    ({"model_args": [1]}, "model_args is [1], expected an object"),
    ({"pretrained_cfg": "x"}, "pretrained_cfg is 'x', expected an object"),
])  # fmt: skip
def test_what_else_config_json_says_of_the_architecture(config, message, plain, tmp_path):
    source = write_timm(tmp_path / "theirs", plain, **config)
    with pytest.raises(FormatError) as caught:
        import_timm(source, tmp_path / "run", num_heads=2)
    assert message in str(caught.value)


def test_heads_named_in_two_ways(plain, tmp_path):
    source = write_timm(tmp_path / "theirs", plain, model_args=ARGS)
    with pytest.raises(FormatError, match="num_heads is 2, the model has 4"):
        import_timm(source, tmp_path / "run", num_heads=4)


def test_arguments_of_a_swin(tmp_path):
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 2, "resolution": 16}
    from igpt_cli.interop.swin_keys import to_theirs

    weights = to_theirs(tensors("swin", **sizes), "timm")
    args = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}

    def read(**more):
        source = write_timm(tmp_path / "theirs", weights, architecture="swin_x", model_args={**args, **more})
        return import_timm(source, tmp_path / "run", force=True)["model"]["resolution"]

    assert read() == 16
    assert read(always_partition=False, drop_path_rate=0.2) == 16
    for more, message in (
        ({"always_partition": True}, "always_partition is True, a Swin here has False"),
        ({"depths": [2, 1]}, "depths is .2, 1., the model has .1, 1."),
        ({"window_size": 2}, "window_size is 2, the model has 4"),
    ):
        with pytest.raises(FormatError, match=message):
            read(**more)


# timm's ResNets.


def names_of_resnet(depths: tuple[int, ...], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Facts: the tensors of timm's resnet18 to resnet152, which are torchvision's, for 1,000 classes."""

    def norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
        return {
            **{f"{name}.{k}": (d,) for k in ("weight", "bias", "running_mean", "running_var")},
            f"{name}.num_batches_tracked": (),
        }

    found: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    d_in = 64
    for stage, depth in enumerate(depths, 1):
        d = 32 * 2**stage
        out = 4 * d if bottleneck else d
        for b in range(depth):
            at = f"layer{stage}.{b}"
            sides = ((1, d_in, d), (3, d, d), (1, d, out)) if bottleneck else ((3, d_in, d), (3, d, d))
            for i, (side, before, after) in enumerate(sides, 1):
                found |= {f"{at}.conv{i}.weight": (after, before, side, side), **norm(f"{at}.bn{i}", after)}
            if d_in != out or (b == 0 and stage > 1):
                found |= {f"{at}.downsample.0.weight": (out, d_in, 1, 1), **norm(f"{at}.downsample.1", out)}
            d_in = out
    return {**found, "fc.weight": (1000, d_in), "fc.bias": (1000,)}


@pytest.mark.parametrize(("name", "depths", "bottleneck", "n_parameters", "n_tensors"), [
    ("resnet-18", (2, 2, 2, 2), False, 11_689_512, 122),
    ("resnet-34", (3, 4, 6, 3), False, 21_797_672, 218),
    ("resnet-50", (3, 4, 6, 3), True, 25_557_032, 320),
])  # fmt: skip
def test_names_of_resnets_match_one_to_one(name, depths, bottleneck, n_parameters, n_tensors):
    from igpt_cli.interop.resnet_keys import sizes_of, to_ours
    from igpt_cli.models.registry import model_config

    facts = names_of_resnet(depths, bottleneck)
    assert len(facts) == n_tensors
    ours = to_ours({k: torch.empty(shape, device="meta") for k, shape in facts.items()}, "timm")
    with torch.device("meta"):
        model = build_model(model_config(name, n_classes=1000))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert describe("resnet", {**sizes_of(ours), "resolution": 224})["name"] == name


def theirs_on(x: torch.Tensor, w: dict[str, torch.Tensor], bottleneck: bool) -> torch.Tensor:
    """timm's ResNet.forward in evaluation mode, written out on their names; a stem of 7x7."""

    def norm(x, name):
        stored = (w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *stored)

    x = F.max_pool2d(norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1").relu(), 3, 2, 1)
    for stage in (1, 2):
        at, stride = f"layer{stage}.0", stage
        shortcut = x
        if f"{at}.downsample.0.weight" in w:
            shortcut = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
        strided = 2 if bottleneck else 1
        for i in range(1, 4 if bottleneck else 3):
            kernel = w[f"{at}.conv{i}.weight"]
            x = F.conv2d(x, kernel, stride=stride if i == strided else 1, padding=kernel.shape[-1] // 2)
            x = norm(x, f"{at}.bn{i}")
            x = x if i == (3 if bottleneck else 2) else x.relu()
        x = (x + shortcut).relu()
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.fixture(params=["basic", "bottleneck"])
def resnet(request) -> tuple[str, dict[str, torch.Tensor]]:
    """A small ResNet in timm's names, with statistics of its norms that a training could have left."""
    bottleneck = request.param == "bottleneck"
    shapes, generator = names_of_resnet((1, 1), bottleneck), torch.Generator().manual_seed(3)
    weights = {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items() if shape}
    weights |= {k: v.abs() + 0.5 for k, v in weights.items() if k.endswith("running_var")}
    weights |= {k: torch.tensor(7) for k in shapes if not shapes[k]}
    weights |= {"fc.weight": weights["fc.weight"][:5].clone(), "fc.bias": weights["fc.bias"][:5].clone()}
    return request.param, weights


@torch.no_grad()
def test_a_resnet_of_timm_computes_the_same_here(resnet, tmp_path):
    block, weights = resnet
    save_file(weights, tmp_path / "resnet.safetensors")
    notes: list[str] = []
    config = import_timm(tmp_path / "resnet.safetensors", tmp_path / "run", note=notes.append)
    assert (config["model"]["block"], config["model"]["resolution"], config["model"]["n_classes"]) == (block, 224, 5)
    assert config["preparation"] == {
        "size": 224, "crop": 0.875, "filter": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert [note.split(",")[0] for note in notes] == [
        "taken as a model of 224x224 images", "images are prepared as is usual in timm: {'crop': 0.875",
    ]  # fmt: skip
    run, x = load_model(tmp_path / "run"), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(run.model(x), theirs_on(x, weights, block == "bottleneck"), atol=1e-5, rtol=1e-4)
    assert all(int(v) == 7 for k, v in run.model.state_dict().items() if k.endswith("num_batches_tracked"))


def test_a_resnet_with_config_json_without_counts_and_at_another_resolution(resnet, tmp_path):
    weights = {k: v for k, v in resnet[1].items() if not k.endswith("num_batches_tracked")}
    cfg = {"input_size": [3, 96, 96], "interpolation": "bicubic", "crop_pct": 0.95}
    source = write_timm(
        tmp_path / "theirs", weights, architecture="resnet18", pretrained_cfg=cfg, global_pool="avg",
        model_args={"layers": [1, 1], "zero_init_last": False},
    )  # fmt: skip
    config = import_timm(source, tmp_path / "run")
    assert (config["model"]["resolution"], config["preparation"]["crop"]) == (96, 0.95)
    assert load_model(tmp_path / "run").model.state_dict()["stem.norm.num_batches_tracked"] == 0
    config = import_timm(source, tmp_path / "other", resolution=128)
    assert (config["model"]["resolution"], config["preparation"]["size"]) == (128, 128)
    assert (config["imported"]["resized_from"], config["imported"].get("resized_by")) == (96, None)
    with pytest.raises(InputError, match="a ResNet is read from timm's form and not written in it"):
        export_timm(tmp_path / "run", tmp_path / "back")
    for args, message in (
        ({"act_layer": "silu"}, "act_layer is 'silu', a ResNet here has 'relu'"),
        ({"layers": [2, 1]}, "layers is .2, 1., the model has .1, 1."),
        ({"output_stride": 8}, "output_stride is 8, a ResNet here has 32"),
    ):
        write_timm(source, weights, architecture="resnet18", model_args=args)
        with pytest.raises(FormatError, match=message):
            import_timm(source, tmp_path / "x")
    # Filters without tensors, in front of strides: the weights are as those of resnet50.
    for name in ("resnetaa50", "resnetblur18.bt_in1k"):
        write_timm(source, weights, architecture=name)
        with pytest.raises(FormatError, match="aa_layer is '(avg|blur)', a ResNet here has None"):
            import_timm(source, tmp_path / "x")


def test_a_resnet_with_a_stem_of_3x3_needs_its_preset(tmp_path):
    sizes = {"depths": [2, 2, 2, 2], "width": 64, "stem": "3x3", "resolution": 32}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build_model(describe("resnet", sizes)).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        theirs = name.replace("stem.conv", "conv1").replace("stem.norm", "bn1").replace("shortcut", "downsample")
        for stage in range(4):
            theirs = theirs.replace(f"stages.{stage}.", f"layer{stage + 1}.")
        dtype = torch.int64 if theirs.endswith("tracked") else torch.float16
        weights[theirs.replace(".norm", ".bn")] = torch.ones(shape, dtype=dtype)
    save_file(weights, tmp_path / "x.safetensors")
    assert "say --preset NAME, such as resnet-18-32" in refused(tmp_path / "x.safetensors", InputError)
    config = import_timm(tmp_path / "x.safetensors", tmp_path / "run", preset="resnet-18-32")
    assert (config["model"]["name"], config["model"]["stem"]) == ("resnet-18-32", "3x3")
    assert refused(tmp_path / "x.safetensors", MismatchError, preset="resnet-34-32")
    assert "--preset igpt-s is no ViT, DeiT, Swin or ResNet" in refused(
        tmp_path / "x.safetensors", InputError, preset="igpt-s"
    )
    weights["conv1.0.weight"] = weights.pop("conv1.weight")
    save_file(weights, tmp_path / "x.safetensors")
    assert "a ResNet: it has a stem of several convolutions (conv1.0.weight)" in refused(tmp_path / "x.safetensors")


# transformers 5's names.


def inner(name: str) -> str:
    """Facts: what transformers 5.24 calls a tensor in `state_dict()`, by its name on disk."""
    for theirs, five in (
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"), ("encoder.layer.", "layers."), ("attention.attention.", "attention."),
        ("attention.self.relative", "attention.relative_position_bias.relative"), ("attention.self.", "attention."),
        ("query", "q_proj"), ("attention.key", "attention.k_proj"), ("value", "v_proj"),
    ):  # fmt: skip
        name = name.replace(theirs, five)
    return name


SWIN = {
    "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 2, "resolution": 16,
    "n_classes": 3,
}  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("backend", ["vit", "deit_distilled", "deit_two_tokens", "swin"])
def test_names_inside_models_of_transformers_5(backend, bare, tmp_path):
    sizes = SWIN if backend == "swin" else SIZES
    model = describe(backend, {k: v for k, v in sizes.items() if not (bare and k == "n_classes")})
    torch.manual_seed(0)
    weights = {k: v + 0.1 * torch.randn_like(v) for k, v in build_model(model).state_dict().items()}
    preparation = {"size": model["resolution"], "crop": None, "filter": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    run = write_model(tmp_path / "run", weights, None, new_config(model, preparation=preparation))
    export_huggingface(run, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    on_disk = load_file(file)
    renamed = {inner(name): tensor for name, tensor in on_disk.items()}
    assert renamed.keys() != on_disk.keys()
    assert not any(".query." in name or "encoder.layer." in name or "dense" in name for name in renamed)
    save_file(renamed, file)
    notes: list[str] = []
    import_huggingface(tmp_path / "theirs", tmp_path / "back", note=notes.append)
    assert notes == ["names of tensors: those of transformers 5's state_dict(), read as what save_pretrained writes"]
    found = load_model(tmp_path / "back").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_the_facts_are_those_of_the_transformers_that_is_installed():
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("before transformers 5 both names are the same")
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**config), add_pooling_layer=False)
    assert inner("encoder.layer.0.attention.attention.query.weight") in model.state_dict()
    assert inner("encoder.layer.0.attention.output.dense.bias") in model.state_dict()
    assert inner("encoder.layer.0.output.dense.bias") in model.state_dict()


def test_names_of_the_other_library_are_said(plain, tmp_path):
    source = write_timm(tmp_path / "theirs", plain, model_args=ARGS)
    with pytest.raises(FormatError, match=f"it is timm's: igpt import timm {source}"):
        import_huggingface(source, tmp_path / "run")
    from igpt_cli.interop.vit_keys import to_theirs

    save_file(to_theirs(plain, "vit"), tmp_path / "x.safetensors")
    assert "has transformers' names; read its folder: igpt import huggingface" in refused(tmp_path / "x.safetensors")
