"""igpt plan: the report, its last sentence, and the command that it ends with."""

from __future__ import annotations

import json
import shlex

import pytest

from igpt_cli.cli.reference import commands
from igpt_cli.planning.gpus import GPUS

#: Arguments, and parts of what the report ends with.
CASES = [
    ([], "igpt-s at 32x32 fits one h200: micro-batch 128, no accumulation."),
    (["igpt-s", "--gpus", "8"], "fits each of 8 h200 without sharding: micro-batch 16, no accumulation."),
    (
        ["igpt-l", "--gpus", "8", "--shard", "full"],
        "fits one h200 without sharding; 8 with --shard full: micro-batch 16",
    ),
    (
        ["igpt-xl", "-r", "64"],
        "only if its activations are computed again, a third more arithmetic; 2 with --shard full:",
    ),
    (["igpt-xl", "-r", "64", "--gpu", "h100"], "does not fit one h100 without sharding; 2 with --shard full:"),
    (["igpt-xl", "-r", "64", "--gpus", "8", "--gpu", "h100"], "does not fit one h100 without sharding; 8 with --shard"),
    (["igpt-xl", "-r", "64", "--gpus", "8", "--shard", "none"], "fits each of 8 h200 without sharding only if"),
    (["igpt-xl", "-r", "64", "--gpus", "2", "--gpu", "rtx4090"], "not fit 2 rtx4090 even with --shard full; 8 with"),
    (["igpt-xl", "-r", "64", "-b", "2", "--gpu", "l4"], "nor any number of them with 2 images in a step."),
    (["igpt-m", "--objective", "bert", "--epochs", "2.5", "--optimizer", "muon"], "igpt-m at 32x32 fits one h200"),
]


@pytest.mark.parametrize(("args", "said"), CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_the_report(args, said, igpt):
    done = igpt("plan", *args)
    assert (done.code, done.stderr) == (0, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    report, _, end = done.stdout.rpartition("\n\n")
    found = json.loads(igpt("plan", *args, "--json").stdout)
    sentence, _, command = end.partition(".\n")
    assert said in " ".join(f"{sentence}.".split())
    assert found["conclusion"] == " ".join(f"{sentence}.".split())
    assert shlex.split(command.replace("\\\n", "")) == shlex.split(found["command"] or "")
    assert f"{found['parameters']:,} parameters" in report


@pytest.mark.parametrize("args", [args for args, _ in CASES[:-2]] + [CASES[-1][0]], ids=" ".join)
def test_the_command_is_one_that_pretrain_takes(args, igpt):
    found = json.loads(igpt("plan", *args, "--json").stdout)
    words = shlex.split(found["command"])
    known = {o for p in commands()["igpt pretrain"].params for o in p.opts}
    given = words[words.index("pretrain") + 1 :]
    assert {w for w in given if w.startswith("-")} <= known
    assert given[0] == f"data/tokens-{found['resolution']}.h5"
    assert given[given.index("-m") + 1] == found["model"]
    processes = 1
    for option in ("--nnodes", "--nproc-per-node"):
        processes *= int(words[words.index(option) + 1]) if option in words else 1
    layouts = [c["layout"] for c in found["columns"]]
    (started,) = [c for c in layouts if c["gpus"] == processes and (c["shard"] == "full") == ("full" in given)]
    assert started["fits"]


def test_settings_are_passed_on(igpt):
    args = ["igpt-s", "-b", "64", "--epochs", "2", "--objective", "bert", "--optimizer", "muon"]
    found = json.loads(igpt("plan", *args, "--json").stdout)
    assert found["command"] == (
        "igpt pretrain data/tokens-32.h5 -m igpt-s --objective bert --batch-size 64 --epochs 2 --optimizer muon"
    )
    assert found["steps"] == 2 * (1_281_167 // 64)
    few = json.loads(igpt("plan", "igpt-s", "--epochs", "2", "--images", "1280", "--json").stdout)
    assert few["steps"] == 20


def test_json_has_every_number_with_its_unit(igpt):
    found = json.loads(igpt("plan", "igpt-s", "--gpus", "2", "--price-per-gpu-hour", "3", "--json").stdout)
    assert found["flops_per_token"] == 530_205_696
    assert found["gpu_memory_bytes"] == 141 * 10**9
    assert found["gpu_peak_flops_per_second"] == 989e12
    chosen = found["chosen"]
    assert chosen["days"] == pytest.approx(chosen["gpu_days"] / 2)
    assert chosen["cost"] == pytest.approx(chosen["gpu_days"] * 24 * 3)
    parts = ("weights", "gradients", "optimizer", "gathered", "activations")
    assert chosen["layout"]["total_bytes"] == sum(chosen["layout"][f"{p}_bytes"] for p in parts)
    assert [c["layout"]["shard"] for c in found["columns"]] == ["none", "full"]
    rows = igpt("plan", "igpt-s", "--price-per-gpu-hour", "3").stdout.splitlines()
    assert "cost at 3 an hour 146" in [" ".join(r.split()) for r in rows]  # 2.0332 days * 24 * 3
    assert "days at 40% of the peak 2.03" in [" ".join(r.split()) for r in rows]


def test_a_rate_that_is_not_published_is_said(igpt):
    assert "learning rate 0.003\n" in igpt("plan", "igpt-s").stdout
    assert "learning rate 0.003 (none is published for this; the nearest)" in igpt("plan", "igpt-s", "-r", "48").stdout


def test_the_help_names_every_gpu(igpt):
    shown = " ".join(igpt("plan", "--help").stdout.split())
    assert all(name in shown for name in GPUS)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["igpt-z"], 1, "error: there is no model 'igpt-z'; did you mean igpt-"),
        (["--gpu", "h20"], 1, "error: there is no GPU 'h20'; did you mean h200? known: b200, h200, "),
        (["--gpus", "0"], 1, "gpus is 0, expected more than 0"),
        (["--gpus", "7"], 1, "a batch of 128 images does not divide among 7 GPUs; use 4 GPUs, or a batch of 133"),
        (["--steps", "5", "--epochs", "1"], 1, "steps and epochs are both given"),
        (["--mfu", "40"], 1, "mfu is 40.0, expected a fraction of the peak"),
        (["--images", "5"], 2, "--epochs"),
        (["-r", "0"], 2, "--resolution"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_cannot_be_planned(args, code, said, igpt):
    done = igpt("plan", *args)
    assert (done.code, done.stdout) == (code, "")
    assert said in done.stderr
