"""The cost of training: FLOPs against torch's counter, memory against what autograd keeps, and plans by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt_cli.errors import InputError
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.planning import cost
from igpt_cli.planning.cost import (
    activation_bytes,
    block_bytes_per_token,
    flops_per_token,
    largest_micro_batch,
    state_bytes,
    state_parts,
)
from igpt_cli.planning.gpus import GPUS, find_gpu, peak_flops
from igpt_cli.planning.plan import ENOUGH_TOKENS, lay_out, plan
from igpt_cli.training import objectives
from igpt_cli.training.memory import checkpoint_activations, compile_blocks
from igpt_cli.training.objectives import Objective
from igpt_cli.training.optim import make_optimizers

PRECISIONS = ("float32", "bfloat16")


def sizes(n_layer=3, n_embd=32, n_head=4, resolution=8, n_vocab=16, objective="ar"):
    return model_config(
        "igpt-s",
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        resolution=resolution,
        n_vocab=n_vocab,
        objective=objective,
    )


def training(config, images, precision, recompute=False):
    """An objective, and a function that computes the mean loss of a batch as training does."""
    torch.manual_seed(0)
    objective = Objective(build_model(config))
    if recompute:
        checkpoint_activations(objective.model)
    tokens = torch.randint(config["n_vocab"], (images, config["resolution"] ** 2))
    mask = torch.rand(tokens.shape) < 0.15 if config["objective"] == "bert" else None

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return objective(tokens, mask).mean()

    return objective, loss


# FLOPs.


def test_flops_by_hand():
    """igpt-s at 32x32. One block: 12 * 512^2 = 3,145,728 in matrices and 2 * 512 gains; 24 of them, the last gain (512)
    and the head (512 * 512) make 75,784,704 parameters that multiply. 6 * 75,784,704 = 454,708,224. Attention:
    12 * 24 * 512 * 1024 = 150,994,944 both ways, half of it causal.
    """
    assert flops_per_token(model_config("igpt-s")) == 454_708_224 + 75_497_472 == 530_205_696
    assert flops_per_token(model_config("igpt-s", objective="bert")) == 454_708_224 + 150_994_944


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("n_layer", "n_embd", "resolution"), [(2, 16, 4), (3, 32, 6)])
def test_flops_are_those_of_torchs_counter(objective, n_layer, n_embd, resolution):
    """The counter sees matrix products alone, so gains do not count there; and it computes attention both ways."""
    config = sizes(n_layer, n_embd, 2, resolution, objective=objective)
    _, loss = training(config, 3, "float32")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    tokens = 3 * resolution**2
    gains = 6 * (2 * n_layer + 1) * n_embd
    not_causal = 12 * n_layer * n_embd * resolution**2 // 2 if objective == "ar" else 0
    assert counter.get_total_flops() == tokens * (flops_per_token(config) - gains + not_causal)


# Memory: weights, gradients, optimizer.


def test_state_by_hand():
    """igpt-xl at 64x64 has 6,810,875,904 parameters: 4 bytes each of weights and of gradients, 8 of Adam's moments. A
    block has 12 * 3072^2 + 2 * 3072 = 113,252,352; outside the blocks lie 15,734,784. Two blocks whole and these, 4 + 4
    bytes each, are 8 * (226,504,704 + 15,734,784) = 1,937,915,904.
    """
    config = model_config("igpt-xl", resolution=64)
    assert state_parts(config) == {
        "weights": 27_243_503_616,
        "gradients": 27_243_503_616,
        "optimizer": 54_487_007_232,
        "gathered": 0,
    }
    assert state_parts(config, shards=8) == {
        "weights": 3_405_437_952,
        "gradients": 3_405_437_952,
        "optimizer": 6_810_875_904,
        "gathered": 1_937_915_904,
    }
    assert state_bytes(config) == 16 * 6_810_875_904


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_state_is_what_the_optimizers_keep(optimizer):
    config = sizes()
    objective, loss = training(config, 2, "float32")
    made = make_optimizers(objective.model, optimizer, 0.001, (0.9, 0.95))
    loss().backward()
    for o in made:
        o.step()
    kept = [t for o in made for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    parts = state_parts(config, optimizer)
    assert sum(t.nbytes for t in kept) == parts["optimizer"]
    assert sum(p.grad.nbytes for p in objective.parameters()) == parts["gradients"] == parts["weights"]


def test_state_of_an_unknown_optimizer():
    with pytest.raises(InputError, match="optimizer is 'lion', expected one of adamw, muon, sgd"):
        state_bytes(sizes(), "lion")


# Memory: activations.


def kept_by_autograd(loss, objective) -> int:
    """Bytes of the distinct storages that autograd saves for the backward pass, but for the parameters' own."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t  # held, so that its place is not taken by another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_embd", "n_head", "resolution"), [(32, 4, 8), (48, 2, 6)])
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_block_keeps_what_autograd_saves(precision, n_embd, n_head, resolution, objective):
    """What one more block adds. Autocast's copies of its matrices are counted apart."""
    kept, images = [], 3
    for n_layer in (2, 3):
        config = sizes(n_layer, n_embd, n_head, resolution, objective=objective)
        objective_module, loss = training(config, images, precision)
        kept.append(kept_by_autograd(loss, objective_module))
    copies = 2 * 12 * n_embd**2 if precision == "bfloat16" else 0
    measured = (kept[1] - kept[0] - copies) / (images * resolution**2)
    assert block_bytes_per_token(config, precision, fused_norm=False) == pytest.approx(measured, rel=0.02)


def test_block_by_hand():
    """igpt-s in bfloat16 on a GPU, for each unit of width D = 512: 8 bytes of the float32 stream at the two norms, and
    in bfloat16 4 of their outputs, 6 of query, key, value, 2 of attention's output, 16 of c_fc's output and its
    sigmoid, 8 of their product: 44 * 512 = 22,528. Besides 8 for two norms and 4 for each of 8 heads: 22,568.
    """
    config = model_config("igpt-s")
    assert block_bytes_per_token(config) == 22_568
    assert block_bytes_per_token(config, "float32", fused_norm=False) == 88 * 512 + 40


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "units"), [("float32", 64), ("bfloat16", 34)])
def test_compiled_blocks_keep_less(precision, units):
    """The figures that `block_bytes_per_token` states beside its own."""
    kept = []
    for n_layer in (2, 3):
        torch._dynamo.reset()
        config = sizes(n_layer, 32, 4, 8)
        objective, loss = training(config, 2, precision)
        compile_blocks(objective)
        try:
            kept.append(kept_by_autograd(loss, objective))
        except torch._inductor.exc.InductorError as e:
            pytest.skip(f"torch.compile needs a C++ compiler: {e}")
    copies = 2 * 12 * 32**2 if precision == "bfloat16" else 0
    per_token = (kept[1] - kept[0] - copies) / (2 * 64)
    assert per_token <= units * 32 + 40
    assert per_token < block_bytes_per_token(config, precision, fused_norm=False)


def peak_bytes(config, images, precision, recompute) -> int:
    """The most memory that a forward and a backward pass really take, as torch's tracker sees every allocation, with
    gradients there already, as in all but a step's first micro-batch.
    """
    tracking = pytest.importorskip("torch.distributed._tools.mem_tracker")
    objective, loss = training(config, images, precision, recompute)
    (optimizer,) = make_optimizers(objective.model, "adamw", 0.001, (0.9, 0.95))
    loss().backward()
    optimizer.step()
    tracker = tracking.MemTracker()
    tracker.track_external(objective, optimizer, *[p.grad for p in objective.parameters()])
    with tracker:
        loss().backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [sizes(4, 32, 2, 16), sizes(8, 64, 4, 8, 512, objective="bert")])
def test_the_peak_is_what_a_step_takes(precision, recompute, config):
    formula = activation_bytes(config, 8, precision, recompute, fused_norm=False)
    measured = peak_bytes(config, 8, precision, recompute)
    assert formula == pytest.approx(measured - state_bytes(config), rel=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_is_made_of_a_part_of_the_tokens_at_a_time(precision, monkeypatch):
    """With a large palette the logits are most of the peak, unless they are made in parts."""
    assert cost.LOGITS_AT_ONCE == objectives.TOKENS_AT_ONCE
    config, whole = sizes(2, 16, 2, 8, n_vocab=512), 16 * 64
    for module, name in ((cost, "LOGITS_AT_ONCE"), (objectives, "TOKENS_AT_ONCE")):
        monkeypatch.setattr(module, name, whole // 4)
    formula = activation_bytes(config, 16, precision, True, fused_norm=False)
    assert formula == pytest.approx(peak_bytes(config, 16, precision, True) - state_bytes(config), rel=0.11)
    monkeypatch.setattr(cost, "LOGITS_AT_ONCE", whole)
    assert activation_bytes(config, 16, precision, True, fused_norm=False) > 1.5 * formula


def test_recomputing_keeps_a_blocks_input_alone():
    few, many = (sizes(n, 32, 4, 8) for n in (10, 11))
    kept = [activation_bytes(c, 4, "float32", True) for c in (few, many)]
    assert kept[1] - kept[0] == 4 * 64 * 4 * 32  # images, tokens, bytes, width


@given(
    st.integers(1, 96),
    st.floats(0, 4e8),
    st.sampled_from(PRECISIONS),
    st.booleans(),
    st.sampled_from(["adamw", "muon"]),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_micro_batch_fits_and_the_next_does_not(batch, free, precision, recompute, optimizer, shards):
    config = sizes(4, 64, 4, 8)
    found = largest_micro_batch(config, free, batch, precision, recompute, optimizer, shards)

    def fits(n):
        return state_bytes(config, optimizer, shards) + activation_bytes(config, n, precision, recompute) <= free

    assert found == max([n for n in range(1, batch + 1) if batch % n == 0 and fits(n)], default=0)


# GPUs.


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_peaks_by_what_torch_calls_a_device(device, tflops):
    assert peak_flops(device) == (tflops and tflops * 1e12)


def test_gpus_are_known_by_name():
    devices = [d for g in GPUS.values() for d in g.devices]
    assert len(devices) == len(set(devices))
    assert find_gpu("h200").memory_bytes == 141e9
    with pytest.raises(InputError, match=r"there is no GPU 'H200'; did you mean h200 or .*\? known: b200, "):
        find_gpu("H200")


# Plans.


def test_a_plan_by_hand():
    """igpt-s: 530,205,696 FLOPs * 1024 tokens * 128 images * 1,000,000 steps = 6.9495e19; 40% of 989 TFLOP/s do
    3.956e14 a second: 175,670 s = 2.0332 days. The 128 images have 131,072 tokens: 24 blocks of 22,568 bytes each take
    70,992,789,504; 24 * 12 * 512^2 + 512^2 weights copied in bfloat16 take 151,519,232; within the last block's backward
    pass 24 bytes for each unit of width take 1,610,612,736.
    """
    found = plan()
    assert (found.model, found.gpu, found.gpus, found.batch_size, found.steps) == ("igpt-s", "h200", 1, 128, 1_000_000)
    assert found.flops_total == 530_205_696 * 1024 * 128 * 1_000_000
    assert (found.tokens_per_step, found.tokens_total) == (131_072, 131_072_000_000)
    assert (found.learning_rate, found.learning_rate_published) == (0.003, True)
    chosen = found.chosen.layout
    assert chosen.activations_bytes == 70_992_789_504 + 151_519_232 + 1_610_612_736
    assert chosen.total_bytes == chosen.activations_bytes + 16 * 76_571_648
    assert (chosen.micro_batch, chosen.accumulate, chosen.recompute, chosen.shard) == (128, 1, False, "none")
    assert found.chosen.days == pytest.approx(2.0332, abs=1e-4)
    assert (found.fewest_gpus, found.fewest_gpus_keeping) == (1, 1)


def test_xl_at_64_needs_sharding():
    """Its weights, gradients and moments take 109 GB: more than an H100 has, and more than leaves an H200 room for one
    image's activations of 60 * 4096 * 44 * 3072 = 33 GB; two of them hold it.
    """
    one = plan("igpt-xl", 64, gpu="h100")
    assert not one.chosen.layout.fits
    assert one.chosen.days is None
    assert one.fewest_gpus > 1
    sharded = one.columns[-1].layout
    assert (sharded.shard, sharded.gpus, sharded.fits) == ("full", one.fewest_gpus, True)
    assert plan("igpt-xl", 64).fewest_gpus_keeping == 2
    eight = plan("igpt-xl", 64, gpus=8)
    assert (eight.chosen.layout.shard, eight.chosen.layout.recompute) == ("full", False)
    assert not plan("igpt-xl", 64, gpus=8, gpu="h100", shard="none").chosen.layout.fits
    assert plan("igpt-xl", 64, gpus=2, gpu="rtx4090").chosen.days is None


@given(
    st.sampled_from(["igpt-tiny", "igpt-s", "igpt-l", "igpt-xl"]),
    st.sampled_from([32, 48, 64]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(list(GPUS)),
    st.sampled_from(["ar", "bert"]),
)
@settings(max_examples=40, deadline=None)
def test_laws_of_plans(model, resolution, gpus, gpu, objective):
    found = plan(model, resolution, gpus, gpu, objective=objective)
    for column in [found.chosen, *found.columns]:
        layout = column.layout
        parts = [v for k, v in asdict(layout).items() if k.endswith("_bytes") and k != "total_bytes"]
        assert layout.total_bytes == sum(parts)
        assert layout.fits == (layout.total_bytes <= found.gpu_usable_bytes)
        assert layout.micro_batch * layout.accumulate * layout.gpus == found.batch_size
        assert (column.days is None) == (not layout.fits)
        if layout.fits:
            again = 4 / 3 if layout.recompute else 1
            seconds = found.flops_total * again / (found.mfu * found.gpu_peak_flops_per_second)
            assert column.gpu_days == pytest.approx(seconds / 86_400)
            assert column.days * layout.gpus == pytest.approx(column.gpu_days)
    if found.chosen.layout.fits and gpus == 1:
        assert found.fewest_gpus == 1
    if found.fewest_gpus_keeping is not None:
        assert found.fewest_gpus <= found.fewest_gpus_keeping


def test_layouts_are_tried_from_the_fastest_on():
    """Between what one image needs with everything kept, and with the model sharded or activations recomputed."""
    config = sizes(12, 64, 4, 64)
    state, keep, again = state_bytes(config), *(activation_bytes(config, 1, "bfloat16", r) for r in (False, True))
    sharded = state_bytes(config, shards=4)
    assert sharded + again < state + again < sharded + keep < state + keep
    kinds = [(f.shard, f.recompute) for f in (lay_out(config, n, 4, 4) for n in (state + keep, sharded + keep))]
    assert kinds == [("none", False), ("full", False)]
    assert lay_out(config, sharded + keep, 4, 4, shard="none").recompute
    found = lay_out(config, state + again, 4, 4)
    assert (found.shard, found.recompute, found.fits) == ("none", True, True)
    assert lay_out(config, sharded + again, 4, 4).shard == "full"
    assert not lay_out(config, sharded + again - 1, 4, 4).fits
    assert not lay_out(config, state + again, 4, 4, recompute=False).fits


def test_few_tokens_at_a_time_are_avoided():
    """At 8x8 pixels, one image without recomputing is worse than many with it."""
    config = sizes(12, 64, 4, 8)
    memory = state_bytes(config) + activation_bytes(config, 1, "bfloat16", False)
    found = lay_out(config, memory, 64)
    assert found.recompute
    assert found.micro_batch > 1
    assert ENOUGH_TOKENS > 64
    kept = lay_out(config, memory, 64, recompute=False)
    assert (kept.fits, kept.micro_batch, kept.recompute) == (True, 1, False)


def test_settings_take_the_presets_place():
    found = plan("igpt-l", 48, 2, batch_size=64, steps=10, optimizer="muon", mfu=0.5, price_per_gpu_hour=2.5)
    assert (found.batch_size, found.steps, found.learning_rate) == (64, 10, 0.01)
    assert found.chosen.layout.optimizer_bytes == 8 * found.parameters - 4 * 48 * 12 * 1536**2
    assert found.chosen.cost == pytest.approx(found.chosen.gpu_days * 24 * 2.5)
    assert plan(epochs=2, images=1000, batch_size=100).steps == 20
    assert plan(epochs=90).steps == 90 * 10_009  # one epoch of ImageNet in batches of 128
    assert plan("igpt-tiny").optimizer == "muon"
    assert not plan("igpt-s", 48).learning_rate_published


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "igpt-huge"}, "there is no model 'igpt-huge'"),
        ({"gpu": "v100"}, "there is no GPU 'v100'"),
        ({"objective": "mlm"}, "objective is 'mlm'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"shard": "half"}, "shard is 'half', expected one of auto, none, full"),
        ({"gpus": 3}, "a batch of 128 images does not divide among 3 GPUs; use 2 GPUs, or a batch of 129"),
        ({"gpus": 0, "steps": -1, "mfu": 1.5}, "steps is -1, .*; gpus is 0, .*; mfu is 1.5, expected a fraction"),
        ({"steps": 5, "epochs": 1}, "steps and epochs are both given"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"price_per_gpu_hour": -1}, "price_per_gpu_hour is -1"),
    ],
)
def test_what_cannot_be_planned(arguments, said):
    with pytest.raises(InputError, match=said):
        plan(**arguments)
