"""Many ranks: the same optimisation as one, checkpoints for any number, and an end that all of them share.

One torchrun with two ranks does everything that can be done from Python (`two_ranks`); the others are what a user types.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_runs import TOY, hidden_files, records, start, stop_at, wait_for_steps, write_tokens

from igpt_cli.errors import InputError, Interrupted
from igpt_cli.model_dir import load_model, read_config
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.checkpoint import best_checkpoint, checkpoints
from igpt_cli.training.distributed import Ranks, init_distributed
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings

RECIPE = PretrainSettings(
    n_layer=2, n_embd=16, steps=18, batch_size=6, learning_rate=0.003, optimizer="adamw", augment="crop-flip", clip=1.0
)
EXECUTION = Execution(precision="float32", accumulate=3, eval_every=7, save_every=5)
WAYS = [(objective, shard) for objective in ("ar", "bert") for shard in ("none", "full")]

DRIVER = """
import json, os, shutil, sys
from types import SimpleNamespace
from training_runs import stop_at
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training import checkpoint
from igpt_cli.training.distributed import init_distributed
from igpt_cli.training.objectives import Objective
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings

usage, forward = shutil.disk_usage, Objective.forward

def full(path):
    return SimpleNamespace(free=10**12 if not checkpoint.checkpoints(path) else 5000)

def not_a_number(self, *batch):
    not_a_number.calls += self.training
    return forward(self, *batch) * (float("nan") if self.training and not_a_number.calls == 16 else 1.0)

ends = []
with init_distributed("cpu") as (ranks, device):
    def act(run, recipe=None, execution=None, stop_at_step=None, **kwargs):
        mine = ranks.rank == 1  # what goes wrong goes wrong on one rank
        told = {"device": device, "ranks": ranks}
        if stop_at_step and mine:
            told["on_record"] = stop_at(stop_at_step)
        if kwargs.get("disk_full") and ranks.first:
            shutil.disk_usage = full
        if kwargs.get("not_a_number") and mine:
            not_a_number.calls = 0
            Objective.forward = not_a_number
        if kwargs.get("fails"):
            return ranks.broadcast_from_rank0(lambda: 1 / 0)
        tokens = open_tokens("toy.h5")
        if recipe:
            return pretrain(tokens, run, PretrainSettings(**recipe), Execution(**execution), **told).status
        return resume(tokens, run, execution, **told).status

    for job in json.loads(open("jobs.json").read()):
        try:
            ends.append(act(**job))
        except BaseException as e:
            ends.append([type(e).__name__, str(e)])
        shutil.disk_usage, Objective.forward = usage, forward
with open(f"ends-{ranks.rank}.json", "w") as file:
    file.write(json.dumps(ends))
# After jobs that failed on purpose, threads of theirs may still wait for the other rank.
os._exit(0)
"""


def steps(run: Path) -> np.ndarray:
    """(N, 4): step, loss, gradient norm, learning rate of every step of a run."""
    return np.array([(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(run) if "loss" in r])


def validations(run: Path) -> np.ndarray:
    """(N, 2): step and loss of every validation of a run."""
    return np.array([(r["step"], r["val_loss"]) for r in records(run) if "val_loss" in r])


def assert_equal_to_rounding(run: Path, other: Path) -> None:
    np.testing.assert_allclose(steps(run), steps(other), rtol=1e-5)
    np.testing.assert_allclose(validations(run), validations(other), rtol=1e-6)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what two ranks did, and how each of their jobs ended, by name, for each rank."""
    folder = tmp_path_factory.mktemp("two-ranks")
    tokens = open_tokens(write_tokens(folder / "toy.h5"))
    for run, step in (("chain", 4), ("broken", 4)):  # begun on one rank
        with pytest.raises(Interrupted):
            pretrain(tokens, folder / run, RECIPE, EXECUTION, device="cpu", on_record=stop_at(step))
    index = folder / "broken" / "checkpoints" / f"step-{checkpoints(folder / 'broken')[-1]}" / "state" / ".metadata"
    index.write_bytes(index.read_bytes()[:100])

    def job(run, shard="none", then=None, recipe=RECIPE, **changes):
        return {
            "run": run,
            "recipe": {**asdict(recipe), **(then or {})},
            "execution": {**asdict(replace(EXECUTION, **changes)), "shard": shard},
        }

    jobs = {
        f"{objective}-{shard}": job(f"{objective}-{shard}", shard, {"objective": objective})
        for objective, shard in WAYS
    }
    jobs |= {
        f"muon-{shard}": job(f"muon-{shard}", shard, {"optimizer": "muon", "steps": 4}) for shard in ("none", "full")
    }
    jobs |= {
        "chain-none": {"run": "chain", "stop_at_step": 8},
        "chain-full": {"run": "chain", "execution": {"shard": "full"}, "stop_at_step": 12},
        "stopped-full": {**job("stopped-full", "full"), "stop_at_step": 9},
        "resumed-full": {"run": "stopped-full"},
        "disk": {**job("disk"), "disk_full": True},
        "disk-full": {**job("disk-full", "full"), "disk_full": True},
        "nan": {**job("nan"), "not_a_number": True},
        "nan-full": {**job("nan-full", "full"), "not_a_number": True},
        "broken": {"run": "broken"},
        "odd": job("odd", then={"batch_size": 7}, accumulate=None),
        "there": job("nan"),
        "fails": {"run": "", "fails": True},
    }  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    (folder / "driver.py").write_text(DRIVER)
    process = start(cwd=folder, ranks=2, script=folder / "driver.py")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (0, ""), stderr
    assert "Warning" not in stderr
    both = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, {name: ends for name, *ends in zip(jobs, *both)}


@pytest.fixture(scope="module")
def alone(two_ranks):
    """The same runs by one process: {objective: run}."""
    folder, _ = two_ranks
    tokens, runs = open_tokens(folder / "toy.h5"), {}
    for objective in ("ar", "bert"):
        recipe = replace(RECIPE, objective=objective)
        runs[objective] = pretrain(tokens, folder / f"alone-{objective}", recipe, EXECUTION, device="cpu").run
    return runs


@pytest.mark.parametrize(("objective", "shard"), WAYS)
def test_two_ranks_do_what_one_does(two_ranks, alone, objective, shard):
    folder, ends = two_ranks
    run = folder / f"{objective}-{shard}"
    assert ends[run.name] == ["done", "done"]
    assert_equal_to_rounding(run, alone[objective])
    machine = read_config(run)["machine"]
    assert (machine["ranks"], machine["shard"], machine["micro_batch"], machine["accumulate"]) == (2, shard, 1, 3)
    assert (checkpoints(run), best_checkpoint(run)) == (
        checkpoints(alone[objective]),
        best_checkpoint(alone[objective]),
    )
    assert hidden_files(run) == []
    for file in run.rglob("*.safetensors"):
        weights = load_file(file)
        assert weights.keys() == load_model(alone[objective]).model.state_dict().keys()
    np.testing.assert_allclose(
        load_model(run).model.wpe.detach(), load_model(alone[objective]).model.wpe.detach(), atol=1e-4
    )


def test_muon_on_two_ranks(two_ranks):
    """It computes in bfloat16, so rounding shows sooner."""
    folder, ends = two_ranks
    assert ends["muon-none"] == ends["muon-full"] == ["done", "done"]
    recipe = replace(RECIPE, optimizer="muon", steps=4)
    run = pretrain(open_tokens(folder / "toy.h5"), folder / "muon-alone", recipe, EXECUTION, device="cpu").run
    for shard in ("none", "full"):
        np.testing.assert_allclose(steps(folder / f"muon-{shard}")[:, 1], steps(run)[:, 1], rtol=1e-3)


def test_a_run_goes_from_one_rank_to_two_and_back_replicated_and_sharded(two_ranks, alone):
    folder, ends = two_ranks
    for name in ("chain-none", "chain-full"):
        assert [kind for kind, _ in ends[name]] == ["Interrupted", "Interrupted"]
    machine = read_config(folder / "chain")["machine"]
    assert (machine["ranks"], machine["shard"]) == (2, "full")
    chained = checkpoints(folder / "chain")
    assert 12 <= chained[-1] < 18
    assert resume(open_tokens(folder / "toy.h5"), folder / "chain", device="cpu").status == "done"
    assert read_config(folder / "chain")["machine"]["ranks"] == 1
    assert_equal_to_rounding(folder / "chain", alone["ar"])


def test_a_signal_to_one_rank_stops_all_and_the_sharded_run_goes_on(two_ranks):
    folder, ends = two_ranks
    for kind, told in ends["stopped-full"]:
        assert kind == "Interrupted"
        assert re.search(r"interrupted after step 1?\d, which is saved; resume with", told)
    assert ends["resumed-full"] == ["done", "done"]
    # On the same number of ranks, bit for bit.
    np.testing.assert_array_equal(steps(folder / "stopped-full"), steps(folder / "ar-full"))
    assert (folder / "stopped-full/model.safetensors").read_bytes() == (
        folder / "ar-full/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("run", ["disk", "disk-full"])
def test_a_full_disk_ends_all_ranks_with_one_message(two_ranks, run):
    folder, ends = two_ranks
    first, second = ends[run]
    assert first[0] == "OutputError"
    assert first[1].startswith(
        f"cannot save step 7 in {run}: the disk is too full; 0.08 MB are needed, 0.01 MB are free;"
    )
    assert second[0] == "ElsewhereError"  # nothing is shown
    assert (checkpoints(folder / run), hidden_files(folder / run)) == ([5], [])


@pytest.mark.parametrize(("run", "shard"), [("nan", "none"), ("nan-full", "full")])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(two_ranks, run, shard):
    folder, ends = two_ranks
    assert [kind for kind, _ in ends[run]] == ["NonFiniteError", "NonFiniteError"]
    assert "the gradient became nan at step 6 " in ends[run][0][1]  # in the sixteenth of three parts a step
    assert checkpoints(folder / run) == [5]
    np.testing.assert_array_equal(steps(folder / run), steps(folder / f"ar-{shard}")[:5])


def test_what_fails_on_rank_0_is_its_to_say(two_ranks):
    _, ends = two_ranks
    assert ends["broken"][0][0] == "FormatError"
    assert "state cannot be read" in ends["broken"][0][1]
    assert ends["there"][0] == [
        "OutputError",
        "nan exists already; resume it with --resume nan, choose another --out, or overwrite it with --force",
    ]
    assert ends["fails"][0] == ["ZeroDivisionError", "division by zero"]
    for name in ("broken", "there", "fails"):
        assert ends[name][1][0] == "ElsewhereError"


def test_a_batch_that_does_not_divide_is_refused(two_ranks):
    folder, ends = two_ranks
    assert ends["odd"][0] == [
        "InputError",
        "a batch of 7 images does not divide among 2 ranks; use --batch-size 8 or 6",
    ]
    assert not (folder / "odd").exists()


def test_alone_there_is_nobody_to_ask():
    ranks = Ranks()
    assert (ranks.all_reduce_max([1.0, 2.0]), ranks.broadcast_from_rank0(lambda: 3), ranks.shard(7)) == (
        [1.0, 2.0],
        3,
        slice(0, 7),
    )
    with init_distributed("cpu") as (found, device):
        assert (found, device) == (ranks, "cpu")


def test_a_device_that_cannot_be_shared_is_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29577")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="each rank has a device of its own; use --device cuda or cpu, not cuda:1"):
        with init_distributed("cuda:1"):
            pass


# As it is typed

OPTIONS = (*TOY, "--optimizer", "adamw", "--accumulate", 3)


def ours(stderr: str) -> list[str]:
    """The lines of stderr that torchrun did not write."""
    lines = stderr.partition("Traceback (most recent call last)")[0].splitlines()
    return [line for line in lines if not re.match(r"[WE]\d{4} .*torch/distributed/elastic", line)]


def test_torchrun_is_stopped_by_sigterm_and_goes_on(tmp_path):
    write_tokens(tmp_path / "toy.h5")
    process = start(
        "pretrain", "toy.h5", *OPTIONS, "--steps", 3000, "--eval-every", 1000, "-o", "run", cwd=tmp_path, ranks=2
    )
    wait_for_steps(process, tmp_path / "run", 10)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    last = checkpoints(tmp_path / "run")[-1]
    told = f"interrupted after step {last:,}, which is saved; resume with: igpt pretrain --resume run"
    assert stdout == ""
    lines = ours(stderr)
    assert f"rank 0: {told}" in lines
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "igpt-tiny", "42 training and 5 held-out images; 6 images, 3 times 1 x 36 = 216 tokens a step; adamw, learning rate 0.01 after 7 steps of warm-up; ends after 3,000 steps", "validates every 1,000 steps, saves every 15m", "pretraining"
    ]  # fmt: skip
    assert read_config(tmp_path / "run")["result"]["status"] == "interrupted"
    process = start("pretrain", "--resume", "run", "--device", "cpu", "--time-limit", 1, cwd=tmp_path, ranks=2)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "run\n"), stderr
    assert "Warning" not in stderr
    assert f"resuming from step {last:,}" in stderr
    assert "rank 1" not in stderr
    assert [line for line in stderr.splitlines() if line.startswith("the time limit ended it")] == [
        "the time limit ended it; resume it with: igpt pretrain --resume run"
    ]
    assert read_config(tmp_path / "run")["result"]["steps"] > last


def test_a_rank_that_fails_is_shown_and_ends_all(tmp_path):
    (tmp_path / "fails.py").write_text(
        "import os\n"
        "from igpt_cli.__main__ import main\n"
        "from igpt_cli.errors import InputError\n"
        "from igpt_cli.training.pretrain import Pretraining\n"
        "batch = Pretraining.batch\n"
        "def fail(self, step):\n"
        "    if step == 25 and os.environ['RANK'] == '1':\n"
        "        raise InputError('the data of rank 1 is bad')\n"
        "    return batch(self, step)\n"
        "Pretraining.batch = fail\n"
        "main()\n"
    )
    write_tokens(tmp_path / "toy.h5")
    args = ("pretrain", "toy.h5", *OPTIONS, "--steps", 60, "--save-every", 20, "--eval-every", 100, "-o", "run")
    process = start(*args, cwd=tmp_path, ranks=2, script=tmp_path / "fails.py")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert [line for line in ours(stderr) if "error:" in line and "connection to another rank" not in line] == [
        "rank 1: error: the data of rank 1 is bad"
    ]
    cause = stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in cause
    assert "InputError: the data of rank 1 is bad" in cause
    assert "internal" not in stderr
    assert checkpoints(tmp_path / "run") == [20]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number"), [("agent", signal.SIGINT), (0, signal.SIGUSR1), (1, signal.SIGTERM)])
def test_any_signal_to_the_agent_or_to_one_rank_saves(tmp_path, target, number):
    write_tokens(tmp_path / "toy.h5")
    process = start(
        "pretrain", "toy.h5", *OPTIONS, "--steps", 3000, "--eval-every", 1000, "-o", "run", cwd=tmp_path, ranks=2
    )
    wait_for_steps(process, tmp_path / "run", 10)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(process.pid if target == "agent" else int(found[target]), number)
    stdout, stderr = process.communicate(timeout=30)
    last = checkpoints(tmp_path / "run")[-1]
    assert f"rank 0: interrupted after step {last:,}, which is saved; resume with: igpt pretrain --resume run" in ours(
        stderr
    )
    assert (stdout, hidden_files(tmp_path / "run")) == ("", [])
    assert records(tmp_path / "run")[-1]["step"] == last


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path):
    write_tokens(tmp_path / "toy.h5")
    args = ("pretrain", "toy.h5", *OPTIONS, "--steps", 300, "--save-every", 5, "--eval-every", 100, "-o", "run")
    for rank in (0, 1):
        process = start(*args, cwd=tmp_path, ranks=2)
        wait_for_steps(process, tmp_path / "run", (checkpoints(tmp_path / "run") or [0])[-1] + 20)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(found[rank]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "internal" not in stderr
        args = ("pretrain", "--resume", "run", "--device", "cpu")
    tokens = open_tokens(tmp_path / "toy.h5")
    assert resume(tokens, tmp_path / "run", device="cpu").status == "done"
    recipe = replace(RECIPE, steps=300, learning_rate=0.01, augment="none", clip=None)
    pretrain(tokens, tmp_path / "whole", recipe, replace(EXECUTION, eval_every=100), device="cpu")
    np.testing.assert_allclose(steps(tmp_path / "run")[:, 1], steps(tmp_path / "whole")[:, 1], rtol=5e-3)
    assert hidden_files(tmp_path / "run") == []
