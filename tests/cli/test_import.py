"""igpt import and igpt export, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def exported(workspace, igpt) -> Path:
    """Hugging Face's form of the shipped model."""
    assert igpt("export", "huggingface", "builtin:igpt-tiny", "-o", "theirs", "-q").code == 0
    return workspace / "theirs"


def test_there_and_back(workspace, igpt):
    done = igpt("export", "huggingface", "builtin:igpt-tiny", "-o", "theirs")
    assert (done.code, done.stdout) == (0, "theirs\n")
    assert "1,313,920 parameters and 13,824 biases, which are zero, in float32" in done.stderr
    assert "docs/checkpoints.md" in done.stderr
    done = igpt("import", "huggingface", "theirs", "-o", "runs/back")
    assert (done.code, done.stdout) == (0, "runs/back\n")
    assert "igpt-tiny: 24 layers, width 64, 1 heads, 32x32, 512 colours, objective ar; 1,313,920" in done.stderr
    assert "next: igpt evaluate runs/back" in done.stderr
    from igpt_cli.model_dir import load_model
    from igpt_cli.workspace import resolve_run

    theirs = load_file(resolve_run("builtin:igpt-tiny") / "model.safetensors")
    back = load_model("runs/back").model.state_dict()
    assert theirs.keys() == back.keys()
    assert all(theirs[name].equal(back[name]) for name in back)


def test_quiet_and_json(exported, igpt):
    done = igpt("import", "huggingface", exported, "-o", "back", "--json", "-q")
    found = json.loads(done.stdout)
    assert (done.code, done.stderr) == (0, "")
    assert found["path"] == "back"
    assert found["model"]["name"] == "igpt-tiny"
    assert found["imported"]["form"] == "huggingface"
    assert found["imported"]["n_parameters"] == 1_313_920
    done = igpt("export", "huggingface", "back", "-o", "again", "--dtype", "bfloat16", "--json", "-q")
    found = json.loads(done.stdout)
    assert (done.code, done.stderr) == (0, "")
    assert {k: found[k] for k in ("path", "dtype", "n_parameters", "n_biases")} == {
        "path": "again",
        "dtype": "bfloat16",
        "n_parameters": 1_313_920,
        "n_biases": 13_824,
    }
    half = exported.parent / "again" / "model.safetensors"
    assert half.stat().st_size < 0.6 * (exported / "model.safetensors").stat().st_size


def test_the_newest_run_is_exported_and_what_comes_back_is_a_run_like_any_other(workspace, igpt, toy_tokens):
    tokens = toy_tokens()
    assert igpt("pretrain", tokens, "--steps", "1", "--device", "cpu", "-q", "--n-layer", "1").code == 0
    done = igpt("export", "huggingface", "-o", "theirs")
    assert (done.code, done.stdout) == (0, "theirs\n")
    assert f"run: {Path('runs/igpt-tiny-1')} (default)" in done.stderr
    assert json.loads((workspace / "theirs" / "preprocessor_config.json").read_text())["size"]["height"] == 4
    assert igpt("import", "huggingface", "theirs", "-o", "back", "-q").code == 0
    for command in (["evaluate"], ["probe", "--layers", "all", "--no-floors"]):
        first, second = (igpt(*command, run, tokens, "--json", "-q") for run in ("runs/igpt-tiny-1", "back"))
        assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
        found = [json.loads(done.stdout) for done in (first, second)]
        for key in ("nats_per_token", "accuracy", "layers"):
            assert found[0].get(key) == found[1].get(key)


def test_outputs_are_kept(exported, igpt):
    before = {p: p.read_bytes() for p in exported.iterdir()}
    done = igpt("export", "huggingface", "builtin:igpt-tiny", "-o", exported)
    assert (done.code, done.stdout) == (1, "")
    assert "exists already" in done.stderr
    assert {p: p.read_bytes() for p in exported.iterdir()} == before
    assert igpt("export", "huggingface", "builtin:igpt-tiny", "-o", exported, "--force", "-q").code == 0
    assert {p: p.read_bytes() for p in exported.iterdir()} == before


@pytest.mark.parametrize("kind", ["import", "export"])
def test_the_place_must_be_named(kind, exported, igpt):
    done = igpt(kind, "huggingface", exported)
    assert done.code == 2
    assert "--out" in done.stderr
    assert igpt(kind, "huggingfase", exported, "-o", "x").code == 2


def test_one_message_and_nothing_left(exported, igpt):
    weights = load_file(exported / "model.safetensors")
    weights["transformer.h.3.attn.c_attn.bias"][7] = 0.125
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    done = igpt("import", "huggingface", exported, "-o", "runs/back")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "the largest value is 0.125, in h.3.attn.c_attn.bias" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (exported.parent / "runs" / "back").exists()


def test_a_model_without_a_head(exported, igpt):
    weights = load_file(exported / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")[:10]
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    done = igpt("import", "huggingface", exported, "-o", "back")
    assert done.code == 1
    assert "--no-head" in done.stderr
    done = igpt("import", "huggingface", exported, "-o", "back", "--no-head")
    assert (done.code, done.stdout) == (0, "back\n")
    assert "excluded: score.weight (10, 64), the head of a classifier" in done.stderr


def test_a_palette_may_be_named(exported, igpt):
    (exported / "preprocessor_config.json").unlink()
    done = igpt("import", "huggingface", exported, "-o", "back")
    assert done.code == 1
    assert "--palette" in done.stderr
    assert igpt("import", "huggingface", exported, "-o", "back", "-p", "builtin:igpt-tiny", "-q").code == 0


def test_a_folder_of_theirs_where_a_run_is_asked_for(exported, igpt):
    done = igpt("evaluate", "theirs", "embedded")
    assert done.code == 1
    assert "theirs is a Hugging Face folder; make a model of it: igpt import huggingface theirs -o MODEL" in done.stderr


@pytest.fixture
def vit(workspace) -> Path:
    """A model directory of a toy ViT with the width of vit-ti16."""
    import torch

    from igpt_cli.interop.rgb import describe
    from igpt_cli.model_dir import new_config, write_model
    from igpt_cli.models.registry import build_model

    sizes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 1.0, "patch_size": 4, "resolution": 8}
    model = describe("vit", {**sizes, "n_classes": 10})
    torch.manual_seed(0)
    weights = {k: w + 0.1 * torch.randn_like(w) for k, w in build_model(model).state_dict().items()}
    preparation = {"size": 8, "crop": 0.8, "filter": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    return write_model(workspace / "vit", weights, None, new_config(model, preparation=preparation))


@pytest.mark.parametrize("kind", ["huggingface", "timm"])
def test_a_vit_goes_and_comes_and_is_probed_on_images(kind, vit, igpt):
    done = igpt("export", kind, vit, "-o", "theirs")
    assert (done.code, done.stdout) == (0, "theirs\n")
    assert "459,082 parameters in float32" in done.stderr
    done = igpt("import", kind, "theirs", "-o", "back")
    assert (done.code, done.stdout) == (0, "back\n")
    assert done.stderr.splitlines() == [
        "vit: 2 blocks, width 192, patches of 4, 8x8, 10 classes; 459,082 parameters",
        "images: 0.8 of the short side, bicubic, mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]",
        "next: igpt evaluate back IMAGES, or igpt probe back IMAGES",
    ]
    found = json.loads(igpt("import", kind, "theirs", "-o", "back", "--force", "--json", "-q").stdout)
    assert list(found) == ["path", "model", "preparation", "imported"]
    assert found["imported"]["form"] == kind
    probes = [
        json.loads(igpt("probe", run, "embedded", "--layer", "1", "--no-floors", "--json", "-q").stdout)
        for run in (vit, "back")
    ]
    assert probes[0]["accuracy"] == probes[1]["accuracy"]


def test_a_timm_file_says_what_it_lacks(vit, igpt):
    weights = load_file(vit / "model.safetensors")
    save_file(weights, "x.safetensors")
    done = igpt("import", "timm", "x.safetensors", "-o", "back", "--num-heads", "6", "--resolution", "12")
    assert (done.code, done.stdout) == (0, "back\n")
    assert "taken as a ViT; a DeiT has the same tensors and other colours: name it with --preset" in done.stderr
    assert "patches of 4, 12x12" in done.stderr
    done = igpt("import", "timm", "x.safetensors", "-o", "other", "--preset", "deit-s")
    assert (done.code, done.stdout) == (1, "")
    assert "error: x.safetensors is not deit-s: embed_dim 192, not 384; depth 2, not 12; " in done.stderr
    assert not Path("other").exists()


def test_a_folder_of_a_vit_where_a_run_is_asked_for(vit, igpt):
    igpt("export", "huggingface", vit, "-o", "theirs")
    done = igpt("probe", "theirs", "embedded")
    assert done.code == 1
    assert "theirs is a Hugging Face folder; make a model of it: igpt import huggingface theirs -o MODEL" in done.stderr


@pytest.mark.parametrize(("kind", "shown"), [("import", "runs/imagegpt-small"), ("export", "--dtype bfloat16")])
def test_help_has_examples(kind, shown, igpt):
    assert "huggingface" in igpt(kind, "--help").stdout
    assert shown in igpt(kind, "huggingface", "--help").stdout
