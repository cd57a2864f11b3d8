"""How drawing is timed: the same model in both, the same number of pixels, what cannot be measured said."""

from __future__ import annotations

import sys

import pytest
import torch
from oracles import require_imagegpt

from igpt_cli.bench.sample import IgptSampler, SamplingSpeed, TransformersSampler, bench_sample, random_model
from igpt_cli.bench.transformers_peer import SAMPLERS, build_sampler, generate
from igpt_cli.errors import InputError
from igpt_cli.models.registry import model_config
from igpt_cli.planning.cost import parameters

TOY = {"n_layer": 2, "n_embd": 16, "n_head": 2}
CPU = torch.device("cpu")
QUICK = {"sizes": TOY, "resolution": 4, "n_vocab": 11, "device": "cpu", "batch_size": 3, "repeats": 3}


def row(**changes) -> SamplingSpeed:
    plain = {
        "model": "igpt-tiny", "implementation": "igpt", **TOY, "resolution": 4, "parameters": 1, "batch_size": 3,
        "pixels": 16, "precision": "float32", "device": "cpu", "repeats": 3,
    }  # fmt: skip
    return SamplingSpeed(**{**plain, **changes})


def toy_sampler(kind=IgptSampler, device=CPU, greedy=False, **changes):
    return kind(row(**changes), model_config("igpt-tiny", resolution=4, n_vocab=11, **TOY), device, greedy)


def loud(model):
    """So that the likeliest colour is another at every place."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return model


@pytest.mark.parametrize("pixels", [1, 7, 16])
def test_both_draw_the_same_pixels_of_the_same_model(monkeypatch, pixels):
    """The likeliest colours, by igpt's decoder and by transformers' generate."""
    require_imagegpt()
    real = random_model
    monkeypatch.setattr("igpt_cli.bench.sample.random_model", lambda *where: loud(real(*where)))
    drawn = []
    for kind in (IgptSampler, TransformersSampler):
        drawer = toy_sampler(kind, greedy=True, pixels=pixels)
        drawer.prepare()
        drawn.append(drawer.draw())
    ours, theirs = drawn
    assert ours.shape == (3, pixels)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, ours[:1].expand(3, -1))
    assert pixels == 1 or len(ours[0].unique()) > 2


def test_transformers_draws_from_all_colours_at_temperature_one():
    """The first pixel of 20,000 images: each of 60 colours within 5 standard deviations of its probability."""
    require_imagegpt()
    config = model_config("igpt-tiny", resolution=4, n_vocab=60, **TOY)
    model = loud(random_model(config, CPU))
    peer = build_sampler(config, model.state_dict(), "float32", CPU)
    torch.manual_seed(3)
    n = 20_000
    counts = generate(peer, n, 1).flatten().bincount(minlength=60)
    with torch.no_grad():
        p = model(torch.zeros(1, 16, dtype=torch.int64))[0, 0].double().softmax(-1)
    assert p.max() > 2 / 60  # it is not the uniform distribution that agrees
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_every_drawing_is_another_and_drawn_from_all_colours():
    drawer = toy_sampler()
    drawer.prepare()
    first, second = drawer.draw(), drawer.draw()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert 0 <= first.min() <= first.max() < 11


def test_a_row_for_igpt_and_one_for_each_peer():
    pytest.importorskip("transformers")
    done = []
    found = bench_sample(against=list(SAMPLERS), **QUICK, precision="bfloat16", progress=lambda *n: done.append(n))
    assert [(r.implementation, r.precision) for r in found] == [
        ("igpt", "bfloat16"),
        ("transformers", "bfloat16"),
        ("transformers-float32", "float32"),
    ]
    assert done == [(i, 9) for i in range(1, 10)]
    for r in found:
        assert (r.n_layer, r.n_embd, r.n_head, r.resolution, r.batch_size, r.pixels) == (2, 16, 2, 4, 3, 16)
        assert (r.repeats, r.device, r.memory, r.failed) == (3, "cpu", None, None)
        assert r.parameters == parameters(model_config("igpt-tiny", resolution=4, n_vocab=11, **TOY))
        assert 0 < r.fastest_ms <= r.ms_per_step <= r.slowest_ms
        assert r.images_per_second == pytest.approx(3 / (16 * r.ms_per_step / 1000), rel=0.01)
        assert r.first_seconds > 0
    assert found[0].ratio is None
    assert found[1].ratio == pytest.approx(found[1].ms_per_step / found[0].ms_per_step, rel=0.01)


def test_the_median_of_whole_drawings_counts():
    drawer = toy_sampler(pixels=8)
    assert drawer.measured() == drawer.row
    drawer.timings = [0.003, 0.001, 0.0015]
    found = drawer.measured()
    assert (found.ms_per_step, found.fastest_ms, found.slowest_ms) == (1.5, 1, 3)
    assert found.images_per_second is None  # half of an image is no image
    whole = toy_sampler(pixels=16)
    whole.timings = [0.0015]
    assert whole.measured().images_per_second == pytest.approx(3 / (16 * 0.0015), abs=1e-3)


def test_on_a_cpu_implementations_take_turns(monkeypatch):
    pytest.importorskip("transformers")
    order = []
    for kind in (IgptSampler, TransformersSampler):
        monkeypatch.setattr(kind, "draw", lambda self, plain=kind.draw: order.append(self.row.pixels) or plain(self))
        monkeypatch.setattr(kind, "forget", lambda self: None)
    names = []
    monkeypatch.setattr(
        "igpt_cli.bench.sample.Sampler.take_timing",
        lambda self, plain=IgptSampler.take_timing: names.append(self.row.implementation) or plain(self),
    )
    bench_sample(against=["transformers"], **QUICK, pixels=5)
    assert names == ["igpt", "transformers"] * 3
    assert order == [5] * 6


def test_what_drew_other_pixels_is_not_timed(monkeypatch):
    monkeypatch.setattr(IgptSampler, "draw", lambda self: torch.zeros(3, 15))
    with pytest.raises(RuntimeError, match="igpt drew 3x15 pixels, not 3x16$"):
        toy_sampler().prepare()


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    pytest.importorskip("transformers")

    def much(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(TransformersSampler, "load", lambda self: None)
    monkeypatch.setattr(TransformersSampler, "draw", much)
    said = []
    with pytest.raises(torch.OutOfMemoryError):  # on a CPU, that is no measurement
        bench_sample(against=["transformers"], **QUICK)
    monkeypatch.setattr("igpt_cli.bench.sample.choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(IgptSampler, "draw", lambda self: torch.zeros(3, 16))
    ours, theirs = bench_sample(against=["transformers"], **QUICK, on_event=said.append)
    assert ours.ms_per_step > 0
    assert (theirs.failed, theirs.ms_per_step, theirs.ratio) == ("out of memory with 3 images at a time", None, None)
    assert said == ["igpt-tiny, transformers: out of memory with 3 images at a time"]


def test_other_failures_are_not_taken_for_short_memory(monkeypatch):
    def broken(self):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(IgptSampler, "load", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        toy_sampler(device=torch.device("meta")).prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0, "pixels": 0, "repeats": 0}, "batch_size is 0, .*; pixels is 0, .*; repeats is 0, expected"),
        ({"pixels": 17}, "pixels is 17, an image has 16"),
        ({"against": ["jax"]}, "against is 'jax', expected one of transformers, transformers-float32"),
        ({"sizes": {**TOY, "objective": "bert"}}, "a BERT model does not draw pixel by pixel.*expected objective ar"),
        ({"model": "igpt-xx"}, "there is no model 'igpt-xx'"),
        ({"sizes": {"n_embd": 15, "n_head": 2}}, "n_embd 15 does not divide into n_head 2 heads"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_what_cannot_be_measured_is_said(changes, message):
    with pytest.raises(InputError, match=message):
        bench_sample(**{**QUICK, **changes})


def test_transformers_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^to measure against transformers.*pip install 'igpt-cli\[test\]'$"):
        bench_sample(**QUICK, against=["transformers"])
    assert len(bench_sample(**QUICK, pixels=1)) == 1  # ours needs none of it
