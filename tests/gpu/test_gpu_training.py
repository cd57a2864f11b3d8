"""What makes training fast on a GPU changes nothing but the speed: precision, compiled blocks, kernels, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_cli.bench.benchmarked import BenchmarkedModel, TrainingSpeed
from igpt_cli.bench.train import bench_train
from igpt_cli.device import autocast
from igpt_cli.models.igpt import IGPT, IGPTConfig
from igpt_cli.models.registry import model_config
from igpt_cli.training.memory import checkpoint_activations, compile_blocks
from igpt_cli.training.objectives import Objective
from igpt_cli.training.optim import make_optimizers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def made(objective="ar", n_layer=4) -> Objective:
    """A model whose every parameter, the head included, is random."""
    torch.manual_seed(0)
    model = IGPT(IGPTConfig(n_layer, 2, 128, resolution=16, objective=objective))
    with torch.no_grad():
        model.wtet.weight.normal_(std=0.05)
    return Objective(model).to(CUDA)


def images(n=8) -> torch.Tensor:
    return torch.randint(512, (n, 256), generator=torch.Generator().manual_seed(1)).to(CUDA)


def step(objective: Objective, precision: str, mask=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one batch."""
    objective.zero_grad(set_to_none=True)
    with autocast(precision, CUDA):
        loss = objective(images(), mask).mean()
    loss.backward()
    assert loss.dtype == torch.float32
    return loss.item(), {k: p.grad.clone() for k, p in objective.model.named_parameters()}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """The error's norm, tensor by tensor, against the tensor's."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.float32
        error = (found[name] - value).norm() / value.norm()
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_bfloat16_compiled_is_close_to_float32(objective):
    plain = made(objective)
    mask = torch.rand(8, 256, generator=torch.Generator().manual_seed(2)).to(CUDA) < 0.15
    mask = mask if objective == "bert" else None
    expected, gradients = step(plain, "float32", mask)
    compiled = made(objective)
    compile_blocks(compiled)
    found, rounded = step(compiled, "bfloat16", mask)
    assert found == pytest.approx(expected, abs=0.02)
    assert_close(rounded, gradients, 0.05)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_compiled_and_eager_gradients_agree(precision, tolerance):
    expected, gradients = step(made(n_layer=12), precision)
    compiled = made(n_layer=12)
    compile_blocks(compiled)
    torch._dynamo.utils.counters.clear()
    found, again = step(compiled, precision)
    assert found == pytest.approx(expected, abs=tolerance)
    assert_close(again, gradients, tolerance)
    # Twelve blocks share one compiled code, the loss has another.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_activations_give_the_same_gradients(compiled):
    kept, again = made(), made()
    checkpoint_activations(again.model)
    if compiled:
        compile_blocks(kept)
        compile_blocks(again)
    expected, gradients = step(kept, "bfloat16")
    found, recomputed = step(again, "bfloat16")
    assert found == pytest.approx(expected, abs=1e-6)
    assert_close(recomputed, gradients, 1e-3)


def test_fused_adamw_is_adamw():
    """Five steps with the same gradients."""
    fused, plain = made(), None
    plain = copy.deepcopy(fused)
    (ours,) = make_optimizers(fused.model, "adamw", 0.003, (0.9, 0.95), weight_decay=0.1)
    assert all(group["fused"] for group in ours.param_groups)
    where = {id(p): q for p, q in zip(fused.model.parameters(), plain.model.parameters())}
    groups = [{**group, "params": [where[id(p)] for p in group["params"]]} for group in ours.param_groups]
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
    theirs = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), fused=False, foreach=False)
    generator = torch.Generator(CUDA).manual_seed(0)
    for _ in range(5):
        for p, q in zip(fused.model.parameters(), plain.model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator, device=CUDA)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for (name, p), q in zip(fused.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_in_a_step_waits_for_the_gpu(recompute, compiled):
    """Two micro-batches, each with its logits made in two parts."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    row = TrainingSpeed(
        model="igpt-xs", implementation="igpt", **sizes, resolution=32, parameters=1, batch_size=64, micro_batch=32,
        precision="bfloat16", compile=compiled, recompute=recompute, attention="auto", optimizer="adamw",
    )  # fmt: skip
    c = BenchmarkedModel(row, model_config("igpt-xs", **sizes), CUDA, print)
    c.prepare(2, alone=False)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            c.loop.take_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        c.release()


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("n_embd", "n_head"), [(64, 1), (256, 8), (512, 8), (1024, 8), (1536, 16)])
def test_flash_attention_takes_the_presets_heads(n_embd, n_head, objective):
    """tiny, xs, s, m, l. No other kernel is allowed here, so that anything it cannot do raises."""
    model = IGPT(IGPTConfig(1, n_head, n_embd, resolution=32, objective=objective)).to(CUDA)
    tokens = torch.randint(512, (2, 1024), device=CUDA)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), autocast("bfloat16", CUDA):
        Objective(model)(tokens, tokens < 100 if objective == "bert" else None).mean().backward()
    assert torch.isfinite(model.h[0].attn.c_attn.weight.grad).all()


@pytest.mark.parametrize(("precision", "size"), [("bfloat16", 2), ("float32", 4)])
def test_attention_keeps_no_square_matrix(precision, size):
    """16 images of 8 heads would have 1024 x 1024 numbers each, more than everything else together."""
    attention = IGPT(IGPTConfig(1, 8, 256, resolution=32)).to(CUDA).h[0].attn
    x = torch.randn(16, 1024, 256, device=CUDA, requires_grad=True)
    assert peak(lambda: run(attention, x, precision)) < 0.75 * 16 * 8 * 1024**2 * size


def run(module: nn.Module, x: torch.Tensor, precision: str) -> None:
    with autocast(precision, CUDA):
        module(x).float().sum().backward()


class Given(nn.Module):
    """A model whose last hidden states are given."""

    def __init__(self, hidden: torch.Tensor, n_vocab: int):
        super().__init__()
        self.given, self.wtet = nn.Parameter(hidden), nn.Linear(hidden.shape[-1], n_vocab, bias=False, device=CUDA)

    def hidden(self, tokens, mask=None):
        return self.given


@pytest.mark.parametrize("compiled", [False, True])
def test_the_memory_of_the_loss_does_not_grow_with_the_batch(compiled):
    """The logits of 64 images more would be 134 MB in float32; their hidden states' gradients are 17 MB."""

    def needed(n: int) -> int:
        objective = Objective(Given(torch.randn(n, 1024, 64, device=CUDA), 512))
        if compiled:
            objective.head_loss = torch.compile(objective.head_loss)
        tokens = torch.randint(512, (n, 1024), device=CUDA)

        def once():
            objective.zero_grad(set_to_none=True)
            with autocast("bfloat16", CUDA):
                loss = objective(tokens).mean()
            loss.backward()

        once()
        objective.zero_grad(set_to_none=True)
        return peak(once)

    assert needed(96) - needed(32) < 67e6


def peak(function) -> int:
    """Bytes at most in use while it runs, beyond those in use before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does():
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4e9 / total))
    said: list[str] = []
    try:
        (row,) = bench_train(
            "igpt-xs", batch_size=64, micro_batch=64, compile=False, recompute=False, steps=1, repeats=1, warmup=0,
            device="cuda", precision="bfloat16", on_event=said.append,
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said[0] == "igpt-xs, igpt: 64 images at a time do not fit in memory, trying 32"
    assert row.micro_batch < 32
    assert row.memory < 4e9
    assert row.tokens_per_second > 0
