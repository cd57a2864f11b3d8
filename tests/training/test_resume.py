"""A run that is stopped, killed or interrupted and then resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_runs import (
    TOY,
    assert_same_run,
    hidden_files,
    records,
    start,
    stop_at,
    wait_for_steps,
    write_tokens,
)

from igpt_cli.errors import FormatError, InputError, Interrupted
from igpt_cli.model_dir import load_model, read_config, read_metrics, write_config
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.checkpoint import checkpoints
from igpt_cli.training.objectives import Objective
from igpt_cli.training.pretrain import Pretraining
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings

RECIPE = PretrainSettings(
    n_layer=2, n_embd=16, steps=24, batch_size=6, learning_rate=0.01, optimizer="adamw", augment="crop-flip", clip=1.0
)
EXECUTION = Execution(precision="float32", accumulate=2, eval_every=5)


@pytest.fixture
def tokens(tmp_path):
    return open_tokens(write_tokens(tmp_path / "toy.h5"))


def stopped(tokens, run, recipe, execution, *steps, number=signal.SIGTERM):
    """Begin a run, or go on with it, until a signal comes after each of these steps in turn."""
    for i, step in enumerate(steps):
        told = {"device": "cpu", "on_record": stop_at(step, number=number)}
        with pytest.raises(
            Interrupted, match=r"interrupted after step \d+, which is saved; resume with: igpt pretrain"
        ):
            if i:
                resume(tokens, run, **told)
            else:
                pretrain(tokens, run, recipe, execution, **told)
        assert checkpoints(run)[-1] >= step
        assert read_config(run)["result"]["status"] == "interrupted"


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_run_that_never_stopped(tokens, tmp_path, objective, optimizer):
    recipe = replace(RECIPE, objective=objective, optimizer=optimizer)
    pretrain(tokens, tmp_path / "whole", recipe, EXECUTION, device="cpu")
    stopped(tokens, tmp_path / "parts", recipe, EXECUTION, 1, 9, 11, 17)  # in epochs 1, 2 and 3 of 7 steps
    torch.manual_seed(3)  # whatever the random state of the process is
    done = resume(tokens, tmp_path / "parts", device="cpu")
    assert (done.status, done.steps) == ("done", 24)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [r["step"] for r in records(tmp_path / "parts") if "loss" in r] == list(range(1, 25))


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(tokens, tmp_path):
    """What was recorded after that checkpoint is recorded anew."""
    recipe, execution = replace(RECIPE, optimizer="muon"), replace(EXECUTION, save_every=4)
    pretrain(tokens, tmp_path / "whole", recipe, execution, device="cpu")

    def crash(record):
        if record["step"] == 15:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain(tokens, tmp_path / "parts", recipe, execution, device="cpu", on_record=crash)
    assert read_config(tmp_path / "parts")["result"]["status"] == "failed"
    assert max(r["step"] for r in read_metrics(tmp_path / "parts")) == 15
    first = []
    resume(tokens, tmp_path / "parts", device="cpu", on_record=lambda r: first.append(r["step"]))
    assert first[0] == 13
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_signal_during_validation_is_honoured_at_once_and_loses_nothing(tokens, tmp_path, monkeypatch):
    execution, asked, real = replace(EXECUTION, micro_batch=1, accumulate=None), [], Pretraining.validate
    pretrain(tokens, tmp_path / "whole", RECIPE, execution, device="cpu")

    def validate(self, objective, give_up):
        def asks():
            asked.append(None)
            if len(asked) == signal_at:
                signal.raise_signal(signal.SIGUSR1)
            return give_up()

        return real(self, objective, asks)

    monkeypatch.setattr(Pretraining, "validate", validate)
    n_val = 5
    signal_at = n_val + 2  # the second image of the second validation, after step 10
    with pytest.raises(Interrupted, match="interrupted after step 10, which is saved"):
        pretrain(tokens, tmp_path / "parts", RECIPE, execution, device="cpu")
    assert len(asked) == n_val + 2
    assert [r["step"] for r in records(tmp_path / "parts") if "val_loss" in r] == [5]
    signal_at = len(asked) + 3 * n_val + 4  # that validation is made up for; now in the last one, after step 24
    with pytest.raises(Interrupted, match="interrupted after step 24, which is saved"):
        resume(tokens, tmp_path / "parts", device="cpu")
    assert [r["step"] for r in records(tmp_path / "parts") if "val_loss" in r] == [5, 10, 15, 20]
    done = resume(tokens, tmp_path / "parts", device="cpu")
    assert (done.status, done.val_loss) == ("done", pytest.approx(records(tmp_path / "whole")[-1]["val_loss"]))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert checkpoints(tmp_path / "parts") == checkpoints(tmp_path / "whole")


def test_a_time_limit_ends_a_run_where_its_schedule_stands(tokens, tmp_path):
    pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu")
    done = pretrain(tokens, tmp_path / "parts", RECIPE, replace(EXECUTION, time_limit=1e-6), device="cpu")
    assert (done.status, done.steps) == ("time limit", 1)
    assert read_config(tmp_path / "parts")["result"]["status"] == "time limit"
    again = resume(tokens, tmp_path / "parts", {"time_limit": 1e-6}, device="cpu")
    assert (again.status, again.steps) == ("time limit", 2)
    done = resume(tokens, tmp_path / "parts", device="cpu")  # the limit was that process's
    assert done.status == "done"
    of_steps = [[r for r in records(tmp_path / name) if "loss" in r] for name in ("whole", "parts")]
    assert of_steps[0] == of_steps[1]


def test_a_budget_is_shared_by_all_processes_of_a_run(tokens, tmp_path, monkeypatch):
    now, real = [1000.0], Objective.forward

    def forward(self, *batch):
        now[0] += 0.5 * self.training  # so a step takes a second, as it has two parts
        return real(self, *batch)

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr("igpt_cli.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    recipe = replace(RECIPE, steps=None, budget=100, warmup_steps=2)
    stopped(tokens, tmp_path / "run", recipe, replace(EXECUTION, eval_every=1000), 10, 20)
    now[0] += 500  # until it is resumed
    done = resume(tokens, tmp_path / "run", device="cpu")
    assert (done.status, done.seconds, done.steps) == ("done", 100, 100)
    rates = [r["lr"] for r in records(tmp_path / "run") if "loss" in r]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.01 * RECIPE.learning_rate


def test_a_complete_run_has_nothing_left_to_do(tokens, tmp_path):
    done = pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "config.json"}
    again = resume(tokens, tmp_path / "run", device="cpu")
    assert replace(again, seconds=0) == replace(done, seconds=0)
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_without_its_settings_is_refused(tokens, tmp_path):
    stopped(tokens, tmp_path / "run", RECIPE, EXECUTION, 3)
    for folder in (tmp_path / "run", *(tmp_path / "run/checkpoints").glob("step-*")):
        write_config(folder, {k: v for k, v in read_config(folder).items() if k != "training"})
    with pytest.raises(
        FormatError, match="run/config.json has no object 'training'; expected the config.json of a run"
    ):
        resume(tokens, tmp_path / "run", device="cpu")


def test_recomputed_or_compiled_steps_are_the_same_and_exchange_checkpoints(tokens, tmp_path, monkeypatch):
    from safetensors import safe_open

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="eager"))
    ways = [{}, {"compile": True}, {"recompute": True}, {"compile": True, "recompute": True}]
    expected = None
    for i, way in enumerate(ways):
        run, execution = tmp_path / str(i), replace(EXECUTION, **way)
        stopped(tokens, run, RECIPE, execution, 8)
        resume(tokens, run, ways[i - 1] or {"compile": False, "recompute": False}, device="cpu")
        losses = [r["loss"] for r in records(run) if "loss" in r]
        assert losses == pytest.approx(expected or losses, rel=1e-5)
        expected = losses
        for file in run.rglob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                assert set(weights.keys()) == set(load_model(run).model.state_dict())
        assert len(list(run.rglob("*.safetensors"))) >= 2


@pytest.mark.slow
def test_a_compiled_and_an_eager_run_exchange_checkpoints(tokens, tmp_path):
    """As above, by the compiler that makes code."""
    pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu")
    stopped(tokens, tmp_path / "run", RECIPE, replace(EXECUTION, compile=True), 4, 9)
    stopped(tokens, tmp_path / "eager", RECIPE, EXECUTION, 9)
    for run, way in (("run", False), ("eager", True)):
        resume(tokens, tmp_path / run, {"compile": way}, device="cpu")
        losses = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in (run, "whole")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert set(load_model(tmp_path / run).model.state_dict()) == set(
            load_model(tmp_path / "whole").model.state_dict()
        )


# Real processes


def kill_again_and_again(folder, tokens, recipe, kills, seed, *options):
    """Kill `igpt pretrain` so many times, at moments drawn from `seed`; how often a checkpoint was being written."""
    draw, run, unfinished = random.Random(seed), folder / "killed", 0
    args = ("pretrain", "toy.h5", *options, "-o", "killed")
    for _ in range(kills):
        process = start(*args, cwd=folder)
        try:
            # From the first step on in one case of four; or else when it has gone on for a while.
            steps = wait_for_steps(process, run, (checkpoints(run) or [0])[-1])
            if checkpoints(run) or draw.random() < 0.75:
                wait_for_steps(process, run, steps + draw.randint(0, 30))
                while not checkpoints(run):
                    time.sleep(0.001)
            time.sleep(draw.random() * 0.05)
        finally:
            process.kill()  # SIGKILL
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        unfinished += bool(hidden_files(run))
        if checkpoints(run):
            args = ("pretrain", "--resume", "killed", "--device", "cpu")
            load_model(run / "checkpoints" / f"step-{checkpoints(run)[-1]}")
        else:
            with pytest.raises(InputError, match="killed has no checkpoint .*cannot be resumed; start a new run"):
                resume(open_tokens(tokens), run, device="cpu")
            args = (*args, "--force")
    return unfinished


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_moments_loses_nothing(tmp_path, kills):
    file = write_tokens(tmp_path / "toy.h5")
    steps = 80 * kills
    options = (*TOY, "--steps", steps, "--save-every", 1, "--eval-every", 7, "--augment", "crop-flip", "-q")
    recipe = replace(RECIPE, model="igpt-tiny", steps=steps, optimizer=None, clip=None)
    hits = kill_again_and_again(tmp_path, file, recipe, kills, 11, *options)
    assert hits or kills < 10
    tokens, execution = open_tokens(file), Execution(precision="float32", eval_every=7)
    assert resume(tokens, tmp_path / "killed", device="cpu").status == "done"
    pretrain(tokens, tmp_path / "whole", recipe, execution, device="cpu")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert hidden_files(tmp_path / "killed") == []
    best = min((r for r in records(tmp_path / "killed") if "val_loss" in r), key=lambda r: r["val_loss"])
    assert (tmp_path / "killed" / "checkpoints" / "best").read_text() == f"step-{best['step']}\n"
    assert checkpoints(tmp_path / "killed") == sorted({best["step"], steps - 1, steps})


def test_signals_to_a_process_save_and_end_it(tmp_path):
    write_tokens(tmp_path / "toy.h5")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    options = (*TOY, "--steps", 4000, "--optimizer", "adamw", "--eval-every", 100)
    processes = {n: start("pretrain", "toy.h5", *options, "-o", n.name, cwd=tmp_path) for n in numbers}
    try:
        for number, process in processes.items():
            wait_for_steps(process, tmp_path / number.name, 20)
            process.send_signal(number)
        for number, process in processes.items():
            stdout, stderr = process.communicate(timeout=30)
            last = checkpoints(tmp_path / number.name)[-1]
            assert (process.returncode, stdout) == (130, "")
            assert stderr.splitlines()[-1] == (
                f"interrupted after step {last:,}, which is saved; resume with: igpt pretrain --resume {number.name}"
            )
            assert records(tmp_path / number.name)[-1]["step"] == last
            assert hidden_files(tmp_path / number.name) == []
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    tokens, runs = open_tokens(tmp_path / "toy.h5"), [tmp_path / n.name for n in numbers]
    end = max(checkpoints(run)[-1] for run in runs) + 10
    for run in runs:
        with pytest.raises(Interrupted):
            resume(tokens, run, device="cpu", on_record=stop_at(end))
    kept = [[r for r in records(run) if r["step"] <= end] for run in runs]
    assert kept[0] == kept[1] == kept[2]
