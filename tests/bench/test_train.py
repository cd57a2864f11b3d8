"""How training is timed: the engine's own step, whole; another implementation of the same arithmetic; what does not fit."""

from __future__ import annotations

import sys

import pytest
import torch
from models.test_igpt import as_transformers, small, tokens_for

from igpt_cli.bench import benchmarked
from igpt_cli.bench.benchmarked import BenchmarkedModel, TrainingSpeed
from igpt_cli.bench.machine import machine
from igpt_cli.bench.train import bench_train
from igpt_cli.bench.transformers_peer import PEERS, Peer, build_peer
from igpt_cli.errors import IgptError, InputError
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.planning.cost import flops_per_token, parameters
from igpt_cli.training.objectives import Objective

TOY = {"n_layer": 2, "n_embd": 16, "n_head": 2}
QUICK = {"sizes": TOY, "resolution": 4, "device": "cpu", "precision": "float32", "steps": 1, "repeats": 3, "warmup": 1}


def row(**changes) -> TrainingSpeed:
    plain = {
        "model": "igpt-tiny", "implementation": "igpt", **TOY, "resolution": 4, "parameters": 1, "batch_size": 4,
        "micro_batch": 4, "precision": "float32", "compile": False, "recompute": False, "attention": "auto",
        "optimizer": "adamw",
    }  # fmt: skip
    return TrainingSpeed(**{**plain, **changes})


def toy_model(device="cpu", **changes) -> tuple[BenchmarkedModel, list[str]]:
    said: list[str] = []
    config = model_config("igpt-tiny", resolution=4, **TOY)
    return BenchmarkedModel(row(**changes), config, torch.device(device), said.append), said


def test_a_row_for_igpt_and_one_for_each_peer():
    pytest.importorskip("transformers")
    done = []
    against = ["transformers", "transformers-as-is"]
    ours, same, as_is = bench_train(against=against, **QUICK, progress=lambda *n: done.append(n))
    assert [r.implementation for r in (ours, same, as_is)] == ["igpt", *against]
    assert done == [(i, 9) for i in range(1, 10)]
    for r in (ours, same, as_is):
        assert (r.n_layer, r.n_embd, r.n_head, r.resolution, r.batch_size, r.micro_batch) == (2, 16, 2, 4, 4, 4)
        assert (r.steps, r.repeats, r.optimizer, r.failed, r.mfu) == (1, 3, "adamw", None, None)
        assert 0 < r.fastest_ms <= r.ms_per_step <= r.slowest_ms
        assert r.tokens_per_second == pytest.approx(4 * 16 / (r.ms_per_step / 1000), rel=0.01)
        assert r.first_step_seconds > 0
    assert ours.ratio is None
    assert same.ratio == pytest.approx(ours.tokens_per_second / same.tokens_per_second, rel=0.01)
    assert ours.memory > 10**8  # of the process, so of the first alone
    assert same.memory is None
    assert ours.parameters == parameters(model_config("igpt-tiny", resolution=4, **TOY))


def test_the_number_of_steps_follows_from_their_time(monkeypatch):
    monkeypatch.setattr("igpt_cli.bench.train.TIMING_SECONDS", 1000.0)
    (ours,) = bench_train(**{**QUICK, "steps": None, "repeats": 1})
    assert ours.steps == 50  # of toy steps, never more


def test_on_a_cpu_implementations_take_turns(monkeypatch):
    pytest.importorskip("transformers")
    order, plain = [], BenchmarkedModel.time
    monkeypatch.setattr(
        BenchmarkedModel, "time", lambda self, n: order.append(self.row.implementation[:2]) or plain(self, n)
    )
    bench_train(against=["transformers"], **QUICK)
    assert order[-6:] == ["ig", "tr"] * 3


def test_what_is_timed_are_whole_steps():
    """Weights after three of them equal those of plain PyTorch on the same images."""
    c, _ = toy_model()
    c._build()
    model = c.train_step.model
    start = {k: v.clone() for k, v in model.state_dict().items()}
    c.time(3)
    batches = [c.train_step.batches.take(step)[0] for step in range(3)]
    c.release()
    again = Objective(build_model(c.config))
    again.model.load_state_dict(start)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0)
    for tokens in batches:
        optimizer.zero_grad()
        again(tokens).mean().backward()
        optimizer.step()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert any(not torch.equal(start[k], v) for k, v in model.state_dict().items())


def test_micro_batches_add_up_to_the_step():
    weights = []
    for micro_batch in (4, 1):
        c, _ = toy_model(micro_batch=micro_batch)
        c._build()
        c.time(2)
        weights.append({k: v.clone() for k, v in c.train_step.model.state_dict().items()})
        c.release()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_without_an_optimizer_weights_stay_and_gradients_go():
    c, _ = toy_model(optimizer=None)
    c._build()
    start = {k: v.clone() for k, v in c.train_step.model.state_dict().items()}
    c.time(2)
    assert all(torch.equal(start[k], v) for k, v in c.train_step.model.state_dict().items())
    assert all(p.grad is None for p in c.train_step.model.parameters())
    c.release()
    (ours,) = bench_train(**QUICK, update=False)
    assert ours.optimizer is None
    assert ours.ms_per_step > 0


def test_a_peer_computes_our_loss():
    pytest.importorskip("transformers")
    model = small()
    tokens = tokens_for(model)
    ours = Objective(model)(tokens)
    theirs = Peer(as_transformers(model), sos=model.config.n_vocab)(tokens)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_our_shapes(name):
    pytest.importorskip("transformers")
    config = model_config("igpt-tiny", resolution=4, n_vocab=11, **TOY)
    peer, attention = build_peer(config, name)
    assert attention in ("flash_attention_2", "sdpa", "eager")
    theirs = peer.model.config
    assert (theirs.n_layer, theirs.n_embd, theirs.n_head, theirs.n_positions, theirs.vocab_size) == (2, 16, 2, 16, 12)
    biases = sum(p.numel() for n, p in peer.named_parameters() if n.endswith(".bias"))
    assert sum(p.numel() for p in peer.parameters()) - biases == parameters(config)
    if name != "transformers-compiled":
        tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))
        peer.train()
        assert torch.equal(peer(tokens), peer(tokens)) != PEERS[name].dropout


def test_a_peer_may_be_measured_in_float32_beside_bfloat16():
    pytest.importorskip("transformers")
    ours, same, plain = bench_train(
        against=["transformers", "transformers-float32"], **{**QUICK, "precision": "bfloat16"}
    )
    assert (ours.precision, same.precision, plain.precision) == ("bfloat16", "bfloat16", "float32")


@pytest.mark.parametrize("name", ["igpt", "transformers"])
def test_all_of_it_is_built_on_the_device(name):
    if name != "igpt":
        pytest.importorskip("transformers")
    c, _ = toy_model("meta", implementation=name)
    module, _, optimizers = c._igpt() if name == "igpt" else c._peer()
    assert {p.device.type for p in [*module.parameters(), *module.buffers()]} == {"meta"}
    of_optimizers = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert of_optimizers == {id(p) for p in module.parameters()}
    assert module(torch.zeros(2, 16, dtype=torch.int64, device="meta")).shape == (2,)


def too_much(monkeypatch, limit: int) -> None:
    """Let more than `limit` images at a time not fit."""

    def take(self, steps):
        if self.row.micro_batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return 0.5 * steps

    monkeypatch.setattr(BenchmarkedModel, "_build", lambda self: None)
    monkeypatch.setattr(BenchmarkedModel, "time", take)


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch):
    too_much(monkeypatch, 3)
    c, said = toy_model("meta", batch_size=24, micro_batch=24)
    c.prepare(1, alone=False)
    assert (c.row.micro_batch, c.row.failed) == (3, None)
    assert [s.split(": ")[1] for s in said] == [
        "24 images at a time do not fit in memory, trying 12",
        "12 images at a time do not fit in memory, trying 6",
        "6 images at a time do not fit in memory, trying 3",
    ]


def test_a_model_that_does_not_fit_is_a_row_that_says_so(monkeypatch):
    too_much(monkeypatch, 0)
    c, said = toy_model("meta", batch_size=2, micro_batch=2)
    c.prepare(1, alone=False)
    assert c.measured().failed == "out of memory with one image at a time"
    assert c.measured().tokens_per_second is None
    assert said[-1] == "igpt-tiny, igpt: out of memory with one image at a time"


def test_other_failures_are_not_taken_for_short_memory(monkeypatch):
    def broken(self):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(BenchmarkedModel, "_build", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        toy_model("meta")[0].prepare(1, alone=False)


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    def broken(self):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler found\nand a long story")

    monkeypatch.setattr(BenchmarkedModel, "_build", broken)
    with pytest.raises(IgptError, match="use --no-compile. It says: no C\\+\\+ compiler found$"):
        toy_model()[0].prepare(1, alone=True)


def test_mfu_is_of_the_peak_of_the_gpu(monkeypatch):
    """A step of 4 images of 16 tokens in 10 ms, by hand."""
    monkeypatch.setattr(benchmarked.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    c, _ = toy_model("cuda")
    c.timings = [0.03, 0.01, 0.009]
    found = c.measured()
    assert (found.ms_per_step, found.fastest_ms, found.slowest_ms, found.tokens_per_second) == (10, 9, 30, 6400)
    # 2 blocks of 12 * 16^2 + 2 * 16, a last gain of 16, a head of 512 * 16; attention 12 * 2 * 16 * 16 / 2.
    assert flops_per_token(c.config) == 6 * (2 * (12 * 256 + 32) + 16 + 8192) + 3072
    c.timings = [1e-9]
    assert c.measured().mfu == pytest.approx(64e9 * flops_per_token(c.config) / 989e12, rel=1e-3)
    monkeypatch.setattr(benchmarked.torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert c.measured().mfu is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0, "repeats": 0, "warmup": -1}, "batch_size is 0, .*; repeats is 0, .*; warmup is -1"),
        ({"attention": "fast"}, "attention is 'fast', expected one of auto, flash, cudnn, efficient, math"),
        ({"attention": "cudnn"}, "attention 'cudnn' cannot be used on cpu for these shapes in float32; choose another"),
        (
            {"optimizer": "lion", "against": ["jax"]},
            "optimizer is 'lion', .*; against is 'jax', expected one of transf",
        ),
        ({"optimizer": "muon", "against": ["transformers"]}, "measured with AdamW; leave out the optimizer 'muon'"),
        ({"model": "igpt-xx"}, "there is no model 'igpt-xx'"),
        ({"sizes": {"n_embd": 15, "n_head": 2}}, "n_embd 15 does not divide into n_head 2 heads"),
        ({"batch_size": 6, "micro_batch": 4}, "micro_batch 4 does not divide the 6 images"),
    ],
)
def test_what_cannot_be_measured_is_said(changes, message):
    if "transformers" in changes.get("against", []):
        pytest.importorskip("transformers")
    with pytest.raises(InputError, match=message):
        bench_train(**{**QUICK, **changes})


def test_transformers_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^to measure against transformers.*pip install 'igpt-cli\[test\]'$"):
        bench_train(**QUICK, against=["transformers"])


def test_the_machine_is_named():
    found = machine("cpu")
    assert (found["device"], found["peak_flops"]) == ("cpu", None)
    assert found["threads"] == torch.get_num_threads()
    assert found["device_name"]
    assert found["versions"]["torch"] == torch.__version__
