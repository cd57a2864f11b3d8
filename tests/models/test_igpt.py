"""The pixel transformer against transformers' ImageGPT, a plain NumPy version, and laws that hold without numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import require_imagegpt

from igpt_cli.models.igpt import IGPT, IGPTConfig


def small(objective="ar", **changes) -> IGPT:
    """A model of toy size in which every parameter, the head included, is random."""
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "resolution": 4, "n_vocab": 11, **changes}
    torch.manual_seed(0)
    model = IGPT(IGPTConfig(objective=objective, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def tokens_for(model: IGPT, batch: int = 3) -> torch.Tensor:
    return torch.randint(model.config.n_vocab, (batch, model.config.n_ctx), generator=torch.Generator().manual_seed(1))


def as_transformers(model: IGPT):
    """The same weights in transformers' ImageGPT: row V of its embedding is sos, its linear maps are transposed."""
    require_imagegpt()
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    c = model.config
    config = ImageGPTConfig(
        vocab_size=c.n_vocab + 1, n_positions=c.n_ctx, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    other = ImageGPTForCausalImageModeling(config).eval()
    weights = {
        "transformer.wte.weight": torch.cat((model.wte.weight, model.sos[None])),
        "transformer.wpe.weight": model.wpe,
        "transformer.ln_f.weight": model.ln_f.g,
        "lm_head.weight": model.wtet.weight,
    }
    for i, block in enumerate(model.h):
        at = f"transformer.h.{i}."
        weights[at + "ln_1.weight"], weights[at + "ln_2.weight"] = block.ln_1.g, block.ln_2.g
        linears = {"attn.c_attn": block.attn.c_attn, "attn.c_proj": block.attn.c_proj}
        linears |= {"mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}
        for name, linear in linears.items():
            weights[at + name + ".weight"] = linear.weight.T
            weights[at + name + ".bias"] = torch.zeros(len(linear.weight))
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith((".attn.bias", ".attn.masked_bias")) for name in missing), missing
    return other


@torch.no_grad()
def test_logits_and_layers_equal_transformers():
    model = small()
    other, tokens = as_transformers(model), tokens_for(model)
    shifted = torch.cat((torch.full((len(tokens), 1), model.config.n_vocab), tokens[:, :-1]), dim=1)
    theirs = other(shifted, output_hidden_states=True)
    torch.testing.assert_close(model(tokens), theirs.logits, atol=1e-4, rtol=1e-4)
    ours = model.features(tokens, range(model.n_layers + 1), pool="none")
    for layer in range(model.n_layers):
        normed = other.transformer.h[layer].ln_1(theirs.hidden_states[layer])
        torch.testing.assert_close(ours[layer], normed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[model.n_layers], theirs.hidden_states[-1], atol=1e-4, rtol=1e-4)


def plain_numpy(model: IGPT, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The formulas of the paper and the released code in float64, one position and head at a time."""
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    c, causal = model.config, model.config.objective == "ar"

    def norm(x, g):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * g

    out = []
    for row, hidden in zip(tokens, mask if mask is not None else [None] * len(tokens)):
        x = w["wte.weight"][row]
        if causal:
            x = np.concatenate((w["sos"][None], x[:-1]))
        elif hidden is not None:
            x = x * ~hidden[:, None]
        x = x + w["wpe"]
        for i in range(c.n_layer):
            n = norm(x, w[f"h.{i}.ln_1.g"])
            q, k, v = (n @ part.T for part in np.split(w[f"h.{i}.attn.c_attn.weight"], 3))
            heads = np.zeros_like(n)
            K = c.n_embd // c.n_head
            for head in range(c.n_head):
                at = slice(head * K, (head + 1) * K)
                for t in range(c.n_ctx):
                    seen = slice(0, t + 1) if causal else slice(None)
                    score = k[seen, at] @ q[t, at] / math.sqrt(K)
                    weight = np.exp(score - score.max())
                    heads[t, at] = weight / weight.sum() @ v[seen, at]
            x = x + heads @ w[f"h.{i}.attn.c_proj.weight"].T
            m = norm(x, w[f"h.{i}.ln_2.g"]) @ w[f"h.{i}.mlp.c_fc.weight"].T
            x = x + (m / (1 + np.exp(-1.702 * m))) @ w[f"h.{i}.mlp.c_proj.weight"].T
        out.append(norm(x, w["ln_f.g"]) @ w["wtet.weight"].T)
    return np.stack(out)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_logits_equal_plain_numpy(objective):
    model = small(objective)
    tokens = tokens_for(model)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.3 if objective == "bert" else None
    expected = plain_numpy(model, tokens.numpy(), mask.numpy() if mask is not None else None)
    np.testing.assert_allclose(model(tokens, mask).detach().numpy(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_equals_transformers_and_is_counted_in_pixels():
    model = small()
    other, tokens = as_transformers(model), tokens_for(model)
    shifted = torch.cat((torch.full((len(tokens), 1), model.config.n_vocab), tokens[:, :-1]), dim=1)
    theirs = other(shifted, output_attentions=True).attentions
    found = model.attention(tokens, [2, 0])
    assert list(found) == [0, 2]
    for layer, p in found.items():
        torch.testing.assert_close(p[..., :-1], theirs[layer], atol=1e-5, rtol=1e-4)
        # Keys are sos and the pixels: the query of pixel t sees those before t, and so never the last one.
        assert torch.equal(p.amax((0, 1)) > 0, torch.ones(16, 17).tril().bool())
    assert model.attention(tokens, []) == {}
    with pytest.raises(ValueError, match=r"layers \[3\] requested; attention is in the layers 0 to 2"):
        model.attention(tokens, [3])


@torch.no_grad()
def test_attention_of_bert_is_what_its_blocks_use():
    model = small("bert")
    tokens = tokens_for(model)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    p, block = model.attention(tokens, [1], mask)[1], model.h[1]
    n = model.features(tokens, [1], pool="none", mask=mask)[1]
    v = block.attn.c_attn(n).view(3, 16, 3, 2, 8)[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(block.attn.c_proj((p @ v).transpose(1, 2).flatten(2)), block.attn(n))
    assert p.shape == (3, 2, 16, 16)


@torch.no_grad()
def test_ar_sees_only_the_past():
    model = small()
    tokens = tokens_for(model, 1)
    before = model(tokens)
    for i in range(model.config.n_ctx):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % model.config.n_vocab
        after = model(changed)
        torch.testing.assert_close(after[:, : i + 1], before[:, : i + 1], atol=0, rtol=0)
        last = i == model.config.n_ctx - 1  # the last pixel is never an input
        assert torch.equal(after[:, i + 1 :], before[:, i + 1 :]) == last


@torch.no_grad()
def test_bert_does_not_see_masked_pixels_and_sees_all_others():
    model = small("bert")
    assert not hasattr(model, "sos")
    tokens = tokens_for(model, 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 5] = True
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % model.config.n_vocab
    assert torch.equal(model(tokens, mask), model(changed, mask))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.n_vocab
    assert not torch.allclose(model(tokens, mask)[0, 0], model(changed, mask)[0, 0])


def test_a_mask_is_refused_by_an_autoregressive_model():
    model = small()
    with pytest.raises(ValueError, match="a mask belongs to the BERT objective"):
        model(tokens_for(model), torch.zeros(3, 16, dtype=torch.bool))


def test_initial_values():
    torch.manual_seed(0)
    c = IGPTConfig(n_layer=6, n_head=4, n_embd=128)
    model = IGPT(c)
    stds = {
        "wte.weight": 0.02, "wpe": 0.01, "sos": 0.02, "h.2.attn.c_attn.weight": 1 / math.sqrt(128),
        "h.2.attn.c_proj.weight": 1 / math.sqrt(128 * 6), "h.2.mlp.c_fc.weight": 0.02, "h.2.mlp.c_proj.weight": 0.02,
    }  # fmt: skip
    for name, std in stds.items():
        found = model.get_parameter(name).std().item()
        assert found == pytest.approx(std, rel=0.03 if name != "sos" else 0.3), name
    assert not model.wtet.weight.any()
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith(".g"))
    assert not any("bias" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_first_loss_is_the_log_of_the_palette_size():
    from igpt_cli.training.objectives import Objective

    torch.manual_seed(0)
    model = IGPT(IGPTConfig(n_layer=2, n_head=2, n_embd=16, resolution=8))
    tokens = torch.randint(512, (4, 64))
    assert Objective(model)(tokens).mean().item() == pytest.approx(math.log(512), abs=1e-6)


@torch.no_grad()
def test_features_come_from_one_pass_that_stops_early():
    model = small()
    tokens, calls = tokens_for(model), []
    for i, block in enumerate(model.h):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    found = model.features(tokens, [2, 0], pool="mean")
    assert calls == [0, 1]
    assert list(found) == [0, 2]
    everything = model.features(tokens, range(4), pool="none")
    torch.testing.assert_close(found[2], everything[2].mean(1))
    torch.testing.assert_close(model.features(tokens, [3], pool="last")[3], everything[3][:, -1])
    torch.testing.assert_close(model.features(tokens, [3], pool="max")[3], everything[3].amax(1))
    assert model.features(tokens, []) == {}


def test_unknown_layers_pools_and_sizes_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"layers \[4\] requested, this model has the layers 0 to 3"):
        model.features(tokens_for(model), [4])
    with pytest.raises(ValueError, match="pool is 'median'"):
        model.features(tokens_for(model), [1], pool="median")
    with pytest.raises(ValueError, match="n_embd 16 does not divide into n_head 3 heads"):
        small(n_head=3)
    with pytest.raises(ValueError, match="n_layer is 0"):
        small(n_layer=0)
    with pytest.raises(ValueError, match="objective is 'mlm'"):
        small("mlm")
