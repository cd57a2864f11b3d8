"""The losses of pretraining against plain NumPy in float64, finite differences and transformers, and their laws."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models.test_igpt import as_transformers, plain_numpy, small, tokens_for

from igpt_cli.tokens.loader import TokenLoader, fixed_mask
from igpt_cli.training import objectives
from igpt_cli.training.objectives import Objective


def mask_for(tokens: torch.Tensor, prob: float = 0.3) -> torch.Tensor:
    """Masks in which no two images have the same number of masked pixels, so that means of means differ from means."""
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < prob
    assert len(set(mask.sum(1).tolist())) == len(mask)
    return mask


def inputs(objective: str, batch: int = 3):
    model = small(objective)
    tokens = tokens_for(model, batch)
    return model, tokens, mask_for(tokens) if objective == "bert" else None


def plain_losses(model, tokens, mask=None) -> np.ndarray:
    """(B, T) float64: -log softmax of the plain NumPy model's logits, at the pixel that is there."""
    logits = plain_numpy(model, tokens.numpy(), None if mask is None else mask.numpy())
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return log_sum - np.take_along_axis(logits, tokens.numpy()[..., None], -1)[..., 0]


def plain_loss(model, tokens, mask=None) -> np.ndarray:
    """(B,) float64, one image at a time: the mean over its pixels, or over its masked ones."""
    losses = plain_losses(model, tokens, mask)
    if mask is None:
        return np.array([row.mean() for row in losses])
    return np.array([row[hidden].mean() if hidden.any() else 0.0 for row, hidden in zip(losses, mask.numpy())])


# Values.


@pytest.mark.parametrize("objective", ["ar", "bert"])
@torch.no_grad()
def test_losses_equal_plain_numpy(objective):
    model, tokens, mask = inputs(objective)
    found = Objective(model)(tokens, mask)
    assert (found.shape, found.dtype) == ((3,), torch.float32)
    np.testing.assert_allclose(found, plain_loss(model, tokens, mask), rtol=1e-5)
    each = Objective(model).token_losses(tokens, mask)
    np.testing.assert_allclose(each, plain_losses(model, tokens, mask), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_bert_loss_is_a_mean_over_images_of_means_over_masked_pixels():
    model, tokens, mask = inputs("bert")
    each = plain_losses(model, tokens, mask)
    over_images = Objective(model)(tokens, mask).mean().item()
    assert over_images == pytest.approx(np.mean([each[b][mask[b].numpy()].mean() for b in range(3)]), rel=1e-5)
    assert abs(over_images - each[mask.numpy()].mean()) > 1e-3  # not the mean over all masked pixels together
    mask[1] = False
    found = Objective(model)(tokens, mask)
    assert found[1] == 0  # and not 0 / 0
    assert torch.isfinite(found).all()


def test_the_ar_loss_equals_the_one_of_transformers():
    model = small()
    other, tokens = as_transformers(model), tokens_for(model)
    V = model.config.n_vocab
    shifted = torch.cat((torch.full((len(tokens), 1), V), tokens[:, :-1]), dim=1)
    theirs = other(shifted, labels=shifted)  # it predicts each input from those before it, so all pixels but the last
    ours = Objective(model).token_losses(tokens)
    torch.testing.assert_close(ours[:, :-1].mean(), theirs.loss, rtol=1e-5, atol=1e-5)
    F.cross_entropy(theirs.logits.flatten(0, 1), tokens.flatten()).backward()
    ours.mean().backward()
    close = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(model.wtet.weight.grad, other.lm_head.weight.grad, **close)
    torch.testing.assert_close(model.wpe.grad, other.transformer.wpe.weight.grad, **close)
    table = other.transformer.wte.weight.grad
    torch.testing.assert_close(torch.cat((model.wte.weight.grad, model.sos.grad[None])), table, **close)
    for block, theirs_block in zip(model.h, other.transformer.h):
        torch.testing.assert_close(block.attn.c_attn.weight.grad, theirs_block.attn.c_attn.weight.grad.T, **close)
        torch.testing.assert_close(block.mlp.c_fc.weight.grad, theirs_block.mlp.c_fc.weight.grad.T, **close)


# Gradients.


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_gradients_equal_finite_differences_of_the_plain_version(objective):
    """Along a random direction for each tensor, so that every entry of it counts."""
    model, tokens, mask = inputs(objective, batch=2)
    Objective(model)(tokens, mask).mean().backward()
    exact, rng, step = copy.deepcopy(model).double(), torch.Generator().manual_seed(3), 1e-5
    for name, parameter in exact.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=rng)
        ends = []
        for sign in (1, -1):
            parameter.data += sign * step * direction
            ends.append(plain_loss(exact, tokens, mask).mean())
            parameter.data -= sign * step * direction
        expected = (ends[0] - ends[1]) / (2 * step)
        found = (model.get_parameter(name).grad.double() * direction).sum().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def logit_gradients(model, tokens, mask=None) -> torch.Tensor:
    """(B, T, V): how the mean loss changes with each logit."""
    kept = []
    hook = model.wtet.register_forward_hook(lambda *call: (call[2].retain_grad(), kept.append(call[2]))[0])
    Objective(model)(tokens, mask).mean().backward()
    hook.remove()
    (logits,) = kept
    return logits.grad


def test_unmasked_pixels_carry_no_bert_loss():
    model, tokens, mask = inputs("bert")
    gradient = logit_gradients(model, tokens, mask)
    assert not gradient[~mask].any()
    assert gradient[mask].any(-1).all()
    # softmax - one-hot, by the number of masked pixels of the image, by the number of images
    expected = F.softmax(model(tokens, mask), -1) - F.one_hot(tokens, model.config.n_vocab)
    expected = expected * (mask / mask.sum(1, keepdim=True))[..., None] / len(tokens)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_every_pixel_carries_the_same_ar_loss():
    model, tokens, _ = inputs("ar")
    expected = (F.softmax(model(tokens), -1) - F.one_hot(tokens, model.config.n_vocab)) / tokens.numel()
    torch.testing.assert_close(logit_gradients(model, tokens), expected, rtol=1e-4, atol=1e-7)


# What may be seen.


@torch.no_grad()
def test_no_pixel_changes_the_ar_loss_of_those_before_it():
    model = small()
    tokens = tokens_for(model, 1)
    before = Objective(model).token_losses(tokens)[0]
    for j in range(model.config.n_ctx):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % model.config.n_vocab
        after = Objective(model).token_losses(changed)[0]
        assert torch.equal(after[:j], before[:j])
        assert (after[j:] != before[j:]).all()  # itself, as what is to be predicted, and all that see it


def test_what_a_masked_pixel_is_changes_nothing_but_what_is_to_be_predicted():
    model = small("bert")
    tokens = tokens_for(model, 2) % (model.config.n_vocab - 1)
    mask = mask_for(tokens)
    tokens[mask] = model.config.n_vocab - 1  # a colour that is seen nowhere
    Objective(model)(tokens, mask).mean().backward()
    assert not model.wte.weight.grad[-1].any()
    assert model.wte.weight.grad[tokens[~mask].unique()].any(-1).all()
    with torch.no_grad():
        torch.testing.assert_close(model.embed(tokens, mask)[0][mask[0]], model.wpe[mask[0]], rtol=0, atol=0)
        others = tokens.masked_fill(mask, 0)
        assert torch.equal(model(tokens, mask), model(others, mask))
        assert not hasattr(model, "sos")
        losses = Objective(model).token_losses(tokens, mask)
        changed = Objective(model).token_losses(others, mask)
    assert torch.equal(losses[~mask], changed[~mask])


@torch.no_grad()
def test_bert_sees_both_ways():
    model = small("bert")
    tokens = tokens_for(model, 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 8] = True
    before = Objective(model)(tokens, mask)
    for j in (0, 7, 9, 15):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % model.config.n_vocab
        assert Objective(model)(changed, mask) != before, f"pixel {j} is not seen from pixel 8"


# In parts.


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("at_once", [1, 32, 40])
def test_logits_in_parts_give_the_same_losses_and_gradients(objective, at_once, monkeypatch):
    model, tokens, mask = inputs(objective, batch=3)
    tokens = torch.cat((tokens, tokens.flip(1)))[:5]
    mask = None if mask is None else torch.cat((mask, mask.flip(1)))[:5]
    seen: list[int] = []
    model.wtet.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))

    def run():
        model.zero_grad()
        seen.clear()
        losses = Objective(model)(tokens, mask)
        losses.mean().backward()
        return losses.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}

    whole, gradients = run()
    assert seen == [5]
    monkeypatch.setattr(objectives, "TOKENS_AT_ONCE", at_once)
    parts, gradients_in_parts = run()
    assert max(seen) == max(1, at_once // 16)
    assert sum(seen) == 2 * 5  # each part's logits are made again for the backward pass
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients_in_parts, gradients)
    with torch.inference_mode():
        torch.testing.assert_close(Objective(model)(tokens, mask), whole)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@torch.no_grad()
def test_the_loss_of_an_image_does_not_depend_on_the_others(objective):
    model, tokens, mask = inputs(objective)
    together = Objective(model)(tokens, mask)
    for b in range(len(tokens)):
        alone = Objective(model)(tokens[b : b + 1], None if mask is None else mask[b : b + 1])
        torch.testing.assert_close(alone[0], together[b])


@torch.no_grad()
@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_with_logits_in_bfloat16_the_softmax_is_taken_in_float32(cast):
    model, tokens, _ = inputs("ar")
    model.wtet.weight.mul_(20)  # such logits that bfloat16 steps of the loss would be seen
    model = model.bfloat16() if cast == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        found = Objective(model).token_losses(tokens)
        logits = model(tokens)
    assert (found.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    expected = F.cross_entropy(logits.double().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_belongs_to_bert():
    model, tokens, _ = inputs("ar")
    with pytest.raises(ValueError, match="a mask belongs to the BERT objective"):
        Objective(model)(tokens, torch.ones_like(tokens, dtype=torch.bool))


# Masks.


def loader(batch_size: int = 4, seed: int = 5, n: int = 30, side: int = 6) -> TokenLoader:
    return TokenLoader(np.zeros((n, side * side), np.uint16), side, batch_size, seed=seed)


def assert_share(count: int, n: int, prob: float) -> None:
    """`count` of `n` draws are true with probability `prob`: within 5 standard deviations, a false alarm in 1.7
    million (were the draws not the same every time)."""
    assert abs(count - n * prob) < 5 * math.sqrt(n * prob * (1 - prob))


@pytest.mark.parametrize("prob", [0.02, 0.15, 0.5, 0.9])
def test_each_pixel_is_masked_with_the_probability_and_independently(prob):
    for masks in (loader(batch_size=1000).mask(7, prob), fixed_mask(np.arange(1000), 36, prob, seed=5)):
        assert masks.shape == (1000, 36)
        assert_share(int(masks.sum()), masks.size, prob)
        for position in range(36):  # with 36 looks a false alarm in 48,000
            assert_share(int(masks[:, position].sum()), 1000, prob)
        neighbours = masks[:, 1:] & masks[:, :-1]
        pairs = neighbours[:, ::2]  # those that share no pixel
        assert_share(int(pairs.sum()), pairs.size, prob**2)
        images = masks[1:] & masks[:-1]
        assert_share(int(images[::2].sum()), images[::2].size, prob**2)


def test_a_mask_depends_on_seed_step_and_place_alone():
    first, again = loader(), loader()
    forwards = [first.mask(s) for s in range(8)]
    for step in (6, 0, 3, 3):
        np.testing.assert_array_equal(again.mask(step), forwards[step])
    for i, one in enumerate(forwards):
        assert not any(np.array_equal(one, other) for other in forwards[:i])
    assert not np.array_equal(loader(seed=6).mask(0), forwards[0])
    # Not on the data, nor on the batch size: the stream of places is one.
    np.testing.assert_array_equal(loader(n=9).mask(2), forwards[2])
    larger = [loader(batch_size=16).mask(step) for step in range(2)]
    np.testing.assert_array_equal(np.concatenate(larger), np.concatenate(forwards))


@pytest.mark.parametrize("side", [2, 3, 6])
def test_the_parts_of_a_batch_make_up_the_whole(side):
    whole = loader(batch_size=9, side=side).mask(3)
    for cuts in ([0, 9], [0, 4, 9], [0, 1, 2, 8, 9]):
        parts = [loader(batch_size=9, side=side).mask(3, part=slice(a, b)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_masks_of_the_evaluation_depend_on_row_seed_and_draw_alone():
    whole = fixed_mask(np.arange(20), 36, seed=5)
    np.testing.assert_array_equal(fixed_mask(np.array([7, 3, 19]), 36, seed=5), whole[[7, 3, 19]])
    assert fixed_mask(np.array([], np.int64), 36).shape == (0, 36)
    for other in (fixed_mask(np.arange(20), 36, seed=6), fixed_mask(np.arange(20), 36, seed=5, draw=1)):
        assert not np.array_equal(other, whole)
    # They are other draws than those of training, whose first places have the same numbers.
    assert not np.array_equal(loader(batch_size=20).mask(0), whole)
