"""Optimizers: which parameters get which, Muon's matrices, SGD's step, learning rates by layer, for every kind of model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_rgb
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from igpt_cli.errors import InputError
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.training.optim import depths, make_optimizers, set_learning_rate

#: A small model of every kind, and what of it lies above the blocks.
MODELS = {
    "igpt-tiny": ({"n_layer": 3, "n_embd": 8, "n_head": 1, "n_vocab": 7, "resolution": 4}, ("ln_f", "wtet", "wclf")),
    "vit-ti-32": ({"embed_dim": 8, "num_heads": 2, "depth": 3, "pos_embed": "relative"}, ("norm", "head")),
    "deit-ti-distilled-32": ({"embed_dim": 8, "num_heads": 2, "depth": 3}, ("norm", "head", "head_dist")),
    "swin-t-32": ({"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}, ("norm", "head")),
    "resnet-18-32": ({"width": 8, "depths": (1, 2)}, ("head",)),
    "sasa-26-32": ({"width": 16, "depths": (1, 1), "num_heads": 2, "window": 3}, ("head",)),
    "attention-conv": ({"depth": 2, "embed_dim": 16, "num_heads": 4}, ("head",)),
}


def model_of(name):
    sizes, above = MODELS[name]
    torch.manual_seed(0)
    return build_model(model_config(name, **sizes, n_classes=3)), above


def rates(optimizers, model):
    """{name of a parameter: its learning rate}."""
    of = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    return {name: of[id(p)] for name, p in model.named_parameters()}


def block_of(model, name):
    """Which block a parameter is in, by its name alone; None outside of them."""
    modules = dict(model.named_modules())
    parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return next((i for i, b in enumerate(model.blocks) for p in parents if modules[p] is b), None)


@pytest.mark.parametrize("name", MODELS)
def test_depths_are_those_of_the_names(name):
    model, above = model_of(name)
    depth, last = depths(model), len(model.blocks)
    for key, p in model.named_parameters():
        expected = block_of(model, key)
        if key.startswith("stages.1.merge"):
            expected = 0  # Swin's first stage has one block, and this comes behind it
        if expected is None:
            expected = last if key.split(".")[0] in above else -1
        assert depth[id(p)] == expected, key


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_optimizer_and_its_layers_rate(name, optimizer):
    model, _ = model_of(name)
    if optimizer == "muon" and name.startswith(("resnet", "sasa")):
        with pytest.raises(InputError, match="muon is for linear maps, and the blocks of this model have none"):
            make_optimizers(model, optimizer, 0.1, (0.9, 0.95))
        return
    made = make_optimizers(model, optimizer, 0.1, (0.9, 0.95), 0.05, layer_decay=0.5)
    kinds = {"adamw": ["AdamW"], "sgd": ["SGD"], "muon": ["AdamW", "Muon"]}[optimizer]
    assert [type(o).__name__ for o in made] == kinds
    for peak in (0.1, 0.02):
        set_learning_rate(made, peak)
        depth, last = depths(model), len(model.blocks)
        for key, rate in rates(made, model).items():
            assert rate == peak * 0.5 ** (last - depth[id(model.get_parameter(key))]), key


def test_three_layers_by_hand():
    """Halved from layer to layer: 1 for the heads, then 1/2, 1/4, 1/8, and 1/16 for what is below the blocks."""
    model, _ = model_of("igpt-tiny")
    found = rates(make_optimizers(model, "adamw", 1.6, (0.9, 0.95), layer_decay=0.5), model)
    assert {k: found[k] for k in ("wte.weight", "wpe", "sos")} == {"wte.weight": 0.1, "wpe": 0.1, "sos": 0.1}
    assert [found[f"h.{layer}.attn.c_attn.weight"] for layer in range(3)] == [0.2, 0.4, 0.8]
    assert [found[f"h.{layer}.ln_2.g"] for layer in range(3)] == [0.2, 0.4, 0.8]
    assert (found["ln_f.g"], found["wtet.weight"], found["wclf.weight"]) == (1.6, 1.6, 1.6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_class_heads_may_have_a_rate_of_their_own(name, optimizer):
    model, _ = model_of(name)
    if optimizer == "muon" and name.startswith(("resnet", "sasa")):
        return  # which Muon refuses, as is tested above
    made = make_optimizers(model, optimizer, 0.1, (0.9, 0.95), layer_decay=0.5, head_rate=0.4)
    without = make_optimizers(model, optimizer, 0.1, (0.9, 0.95), layer_decay=0.5)
    for part in (1.0, 0.5):
        set_learning_rate(made, part * 0.1)
        set_learning_rate(without, part * 0.1)
        found, plain = rates(made, model), rates(without, model)
        heads = {key for key in found if key.split(".")[0] in ("wclf", "head", "head_dist")}
        assert {found[key] for key in heads} == {part * 0.4}
        assert {key for key in found if found[key] != plain[key]} == heads
    assert len(heads) == {"igpt-tiny": 1, "deit-ti-distilled-32": 4}.get(name, 2)


def test_a_decay_by_layers_is_the_rates_of_plain_adam():
    """Two steps, against torch's Adam with a rate for each tensor."""
    model, _ = model_of("igpt-tiny")
    other, _ = model_of("igpt-tiny")
    made = make_optimizers(model, "adamw", 0.01, (0.9, 0.95), layer_decay=0.7)
    by_name = rates(made, model)
    plain = torch.optim.Adam(
        [{"params": [p], "lr": by_name[k]} for k, p in other.named_parameters()], betas=(0.9, 0.95)
    )
    for step in range(2):
        for p, q in zip(model.parameters(), other.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        made[0].step()
        plain.step()
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=key)


def test_without_a_decay_by_layers_nothing_is_changed():
    """Groups and rates are those of plain AdamW, and so is every bit."""
    model, _ = model_of("vit-ti-32")
    other, _ = model_of("vit-ti-32")
    made = make_optimizers(model, "adamw", 0.01, (0.9, 0.95), 0.1)
    assert [g["lr"] for g in made[0].param_groups] == [0.01, 0.01]
    decays = [
        (n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight")))
        for n, _ in other.named_parameters()
    ]
    kinds = [
        {"params": [p for p, d in zip(other.parameters(), decays) if d is k], "weight_decay": 0.1 * k}
        for k in (True, False)
    ]
    plain = torch.optim.AdamW(kinds, lr=0.01, betas=(0.9, 0.95), fused=True)
    for p, q in zip(model.parameters(), other.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        q.grad = p.grad.clone()
    set_learning_rate(made, 0.01)
    made[0].step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("name", ["vit-ti-32", "swin-t-32", "attention-conv"])
def test_muon_has_the_linear_maps_between_embedding_and_heads(name):
    model, _ = model_of(name)
    adam, muon = make_optimizers(model, "muon", 0.1, (0.9, 0.95), 0.05)
    chosen = {id(p) for g in muon.param_groups for p in g["params"]}
    found = {key for key, p in model.named_parameters() if id(p) in chosen}
    ends = {
        "vit-ti-32": ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight"),
        "swin-t-32": ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "reduction.weight"),
        "attention-conv": ("value.weight", "dense.weight", "fc1.weight", "fc2.weight"),
    }[name]
    assert found == {key for key, _ in model.named_parameters() if key.endswith(ends)}
    assert {g["weight_decay"] for g in muon.param_groups} == {0.05}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    for optimizer in (adam, muon):
        optimizer.step()
    assert all(not torch.equal(before[key], p) for key, p in model.named_parameters())


def test_sgd_is_the_plain_computation():
    """He et al. 2016: v = 0.9 v + (g + weight decay * w), w = w - rate * v; three steps in NumPy, in float64."""
    model, _ = model_of("resnet-18-32")
    (optimizer,) = make_optimizers(model, "sgd", 0.1, (0.9, 0.999), weight_decay=0.01)
    names = ("stages.0.0.conv1.weight", "stages.0.0.norm1.weight", "head.bias")
    w = {n: model.get_parameter(n).detach().double().numpy().copy() for n in names}
    v = dict.fromkeys(names, 0.0)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        set_learning_rate([optimizer], rate := 0.1 / (step + 1))
        optimizer.step()
        for n in names:
            g = model.get_parameter(n).grad.double().numpy()
            v[n] = 0.9 * v[n] + g + (0.01 * w[n] if n.endswith("conv1.weight") else 0)
            w[n] = w[n] - rate * v[n]
    for n in names:
        np.testing.assert_allclose(model.get_parameter(n).detach().numpy(), w[n], rtol=1e-4, atol=1e-5)


def test_a_first_step_of_sgd_that_must_change_nothing_does_not():
    """A gradient that is not finite: the flag on the device says so, as the training loop sets it."""
    model, _ = model_of("resnet-18-32")
    (optimizer,) = make_optimizers(model, "sgd", 0.1, (0.9, 0.999), weight_decay=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all((s["momentum_buffer"] == 0).all() for s in optimizer.state.values())
    assert get_optimizer_state_dict(model, [optimizer])["state"]["head.bias"]["momentum_buffer"].abs().sum() == 0


def test_unknown_optimizers_are_refused():
    with pytest.raises(InputError, match="optimizer is 'lion', expected one of adamw, muon, sgd"):
        make_optimizers(toy_rgb.Toy(toy_rgb.ToyConfig()), "lion", 0.1, (0.9, 0.95))
