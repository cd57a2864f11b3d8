"""Checkpoints: which are kept, what they hold, and that nothing is lost when a disk, a gradient or a file goes bad."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import ROOT, TOY, assert_same_run, hidden_files, records, stop_at, write_tokens

from igpt_cli.errors import InputError, Interrupted, MismatchError, NonFiniteError, OutputError
from igpt_cli.model_dir import METRICS, MetricsWriter, load_model, read_config, read_weights
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training import checkpoint
from igpt_cli.training.checkpoint import CheckpointWriter, best_checkpoint, checkpoints
from igpt_cli.training.objectives import Objective
from igpt_cli.training.pretrain import Pretraining
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings

RECIPE = PretrainSettings(
    n_layer=2, n_embd=16, steps=24, batch_size=6, learning_rate=0.01, warmup_steps=2, optimizer="adamw"
)
EXECUTION = Execution(precision="float32", eval_every=10, save_every=7)


@pytest.fixture
def tokens(tmp_path):
    return open_tokens(write_tokens(tmp_path / "toy.h5"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Whatever happens to a run: no thread of ours goes on, and signals do what they did."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith(("checkpoint", "batches"))] == []
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def wait_for_checkpoint(run: Path, step: int) -> None:
    while step not in checkpoints(run):
        time.sleep(0.001)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# Which are written, and what they are


def test_the_last_checkpoints_and_the_best_are_kept_each_a_model_of_its_own(tokens, tmp_path, monkeypatch):
    losses = iter([2.0, 1.5, 1.7, 1.6, 1.9, 1.8])
    monkeypatch.setattr(Pretraining, "validate", lambda self, objective, give_up: {"val_loss": next(losses)})
    execution = replace(EXECUTION, eval_every=4, save_every=7, keep=2)
    run = pretrain(tokens, tmp_path / "run", RECIPE, execution, device="cpu").run
    assert checkpoints(run) == [8, 21, 24]  # the best by validation, and of 7, 14, 21, 24 the last two
    assert best_checkpoint(run) == "step-8"
    assert hidden_files(run) == []
    assert weights(run) == weights(run / "checkpoints" / "step-24") != weights(run / "checkpoints" / "step-21")
    for step in (8, 21, 24):
        folder = run / "checkpoints" / f"step-{step}"
        assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "palette.npz", "state"}
        loaded = load_model(folder)
        assert loaded.palette.sha256 == tokens.palette.sha256
        assert loaded.config["progress"]["step"] == step
        assert loaded.config["progress"]["best"] == ({"step": 8, "val_loss": 1.5} if step > 4 else None)
    assert load_model(run / "checkpoints" / "best").path == run / "checkpoints" / "step-8"
    # A folder that is moved away is whole.
    moved = shutil.copytree(run / "checkpoints" / "step-21", tmp_path / "moved")
    assert torch.equal(load_model(moved).model.wpe, load_model(run / "checkpoints" / "step-21").model.wpe)


@pytest.mark.parametrize(("save_every", "expected"), [("5s", [5, 10, 15, 20]), ("12s", [12]), (7, [7, 14, 21])])
def test_checkpoints_come_by_steps_or_by_time(tokens, tmp_path, monkeypatch, save_every, expected):
    now, saved, real, save = [0.0], [], Objective.forward, CheckpointWriter.save

    def forward(self, *batch):
        now[0] += self.training  # a step takes a second
        return real(self, *batch)

    def note(self, step, *args):
        saved.append(step)
        save(self, step, *args)

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(CheckpointWriter, "save", note)
    monkeypatch.setattr("igpt_cli.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    pretrain(tokens, tmp_path / "run", RECIPE, Execution(save_every=save_every, eval_every=100), device="cpu")
    assert saved == [*expected, 24]


def test_a_checkpoint_is_written_while_training_goes_on(tokens, tmp_path, monkeypatch):
    went_on, real = threading.Event(), checkpoint.dcp.save

    def save(*args, **kwargs):
        assert went_on.wait(20), "training waited for the checkpoint"
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    execution = replace(EXECUTION, keep=9, eval_every=100)
    told = {"device": "cpu", "on_record": lambda r: went_on.set() if r["step"] == 13 else None}
    run = pretrain(tokens, tmp_path / "run", RECIPE, execution, **told).run
    assert checkpoints(run) == [7, 14, 21, 24]
    # What it holds is the state of its own step all the same.
    with pytest.raises(Interrupted):
        pretrain(tokens, tmp_path / "seven", RECIPE, execution, device="cpu", on_record=stop_at(7))
    assert weights(run / "checkpoints" / "step-7") == weights(tmp_path / "seven")


def test_a_kill_before_a_checkpoint_is_published_is_made_up_for(tokens, tmp_path, monkeypatch):
    """It has its name, but the run's weights, `best` and the ones too many are as they were before it."""
    whole = pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run
    publish = CheckpointWriter._publish

    def killed(self, folder, config):
        if folder.name == "step-24":
            raise ZeroDivisionError
        publish(self, folder, config)

    with monkeypatch.context() as patched, pytest.raises(OutputError):
        patched.setattr(CheckpointWriter, "_publish", killed)
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")
    run = tmp_path / "run"
    assert (weights(run) == weights(whole), len(checkpoints(run))) == (False, 3)
    for unfinished in ("run/.model.1-a.part.safetensors", "run/checkpoints/.best.1-a.part"):
        (tmp_path / unfinished).touch()
    (run / "checkpoints" / ".step-9.partial" / "state").mkdir(parents=True)
    assert resume(tokens, run, device="cpu").status == "done"
    assert_same_run(run, whole)
    assert (checkpoints(run), best_checkpoint(run)) == (checkpoints(whole), best_checkpoint(whole))
    assert hidden_files(run) == []


def test_a_checkpoint_that_is_validated_later_is_not_written_again(tokens, tmp_path, monkeypatch):
    """It never is without its name, so that it cannot be lost then."""
    whole = pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Pretraining, "validate", lambda self, objective, give_up: None)  # a signal came
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")
    folder = tmp_path / "run" / "checkpoints" / "step-10"
    was = (folder / "model.safetensors").stat().st_ino
    assert best_checkpoint(tmp_path / "run") is None
    with pytest.raises(Interrupted):
        resume(tokens, tmp_path / "run", {"keep": 9}, device="cpu", on_record=stop_at(11))
    assert (folder / "model.safetensors").stat().st_ino == was
    assert best_checkpoint(tmp_path / "run") == "step-10"
    assert read_config(folder)["progress"]["best"]["step"] == 10
    resume(tokens, tmp_path / "run", device="cpu")
    assert_same_run(tmp_path / "run", whole)


# Resuming what is not the same, or not whole


@pytest.fixture
def stopped(tokens, tmp_path):
    """A run with checkpoints of steps 7, 10 (the best) and 14."""
    with pytest.raises(Interrupted):
        pretrain(tokens, tmp_path / "run", RECIPE, replace(EXECUTION, keep=3), device="cpu", on_record=stop_at(14))
    assert checkpoints(tmp_path / "run") == [7, 10, 14]
    return tmp_path / "run"


def test_resuming_says_everything_that_differs_with_both_values(stopped, tmp_path, igpt):
    other = write_tokens(tmp_path / "other.h5", resolution=5, n_vocab=9, seed=6)
    options = ("--lr", 0.02, "-b", 8, "--seed", 3, "--n-embd", 32, "--objective", "bert", "--clip", 1)
    done = igpt("pretrain", other, "--resume", stopped, *options, "--device", "cpu")
    config, now = read_config(stopped)["data"], open_tokens(other)
    differences = [
        "objective was ar and is now bert",
        "n_embd was 16 and is now 32",
        "batch_size was 6 and is now 8",
        "learning_rate was 0.01 and is now 0.02",
        "clip was None and is now 1.0",
        "seed was 0 and is now 3",
        f"the resolution was 6 and is now 5 ({other})",
        f"the number of colours was 8 and is now 9 ({other})",
        f"the palette was {config['palette_sha256'][:12]} and is now {now.palette.sha256[:12]} ({other})",
        f"the split 'train' was {config['tokens_sha256'][:12]} and is now {now.split('train').sha256[:12]} ({other})",
    ]
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: {stopped} continues as it started, but {'; '.join(differences)}; resume it with the settings and the "
        f"token file that it had ({tmp_path / 'toy.h5'}), or start a new run with --config {stopped / 'config.json'}"
    )


def test_another_palette_alone_is_noticed(stopped, tmp_path):
    shaded = open_tokens(write_tokens(tmp_path / "shaded.h5", shade=1))
    with pytest.raises(
        MismatchError, match=r"started, but the palette was [0-9a-f]{12} and is now [0-9a-f]{12} \(\S+\);"
    ):
        resume(shaded, stopped, device="cpu")


def test_how_a_run_is_carried_out_may_change(stopped, tokens, igpt):
    options = ("--micro-batch", 2, "--eval-every", 3, "--save-every", "1m", "--keep", 1, "--time-limit", "1h")
    done = igpt("pretrain", "--resume", stopped, *options, "--device", "cpu", "--precision", "float32", "--recompute")
    assert (done.code, done.stdout) == (0, f"{stopped}\n")
    config = read_config(stopped)
    assert (config["machine"]["micro_batch"], config["machine"]["accumulate"]) == (2, 3)
    assert (config["execution"]["save_every"], config["execution"]["keep"]) == ("1m", 1)
    assert [r["step"] for r in records(stopped) if "val_loss" in r] == [10, 15, 18, 21, 24]
    whole = pretrain(tokens, stopped.parent / "whole", RECIPE, EXECUTION, device="cpu").run
    losses = [[r["loss"] for r in records(run) if "loss" in r] for run in (stopped, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_held_out_images_stay_the_same_on_another_device(tokens, tmp_path, monkeypatch):
    """On a CPU fewer are looked at by default; not when a run began elsewhere."""
    with pytest.raises(Interrupted):
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu", on_record=stop_at(8))
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["training"]["val_images"] = None  # as a GPU leaves it
    file.write_text(json.dumps(config))
    monkeypatch.setattr("igpt_cli.training.pretrain.CPU_VAL_IMAGES", 2)
    resume(tokens, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run)


def test_weights_alone_cannot_be_resumed(stopped, tokens, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(stopped, alone, ignore=shutil.ignore_patterns("checkpoints"))
    for run in (alone, "builtin:igpt-tiny"):
        with pytest.raises(InputError, match="has weights but no training state .*, so it cannot be resumed; start a"):
            resume(tokens, run, device="cpu")
    for run in (stopped / "checkpoints" / "best", stopped / "checkpoints" / "step-14"):
        with pytest.raises(InputError, match=r"step-1\d is a checkpoint of a run; resume the run"):
            resume(tokens, run, device="cpu")
    shutil.rmtree(stopped / "checkpoints" / "step-14" / "state")
    with pytest.raises(
        InputError,
        match=r"step-14 has weights but no training state \(state/\); remove .*/step-14 to resume from step 10",
    ):
        resume(tokens, stopped, device="cpu")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garble(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(b ^ 255 for b in content[middle : middle + 64])
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "broken"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", empty),
        ("model.safetensors", Path.unlink),
        ("config.json", cut),
        ("config.json", Path.unlink),
        ("state/__0_0.distcp", cut),
        ("state/__0_0.distcp", empty),
        ("state/__0_0.distcp", garble),
        ("state/__0_0.distcp", Path.unlink),
        ("state/.metadata", cut),
        ("state/.metadata", empty),
        ("state/.metadata", Path.unlink),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_serves(stopped, tokens, igpt, file, broken):
    folder = stopped / "checkpoints" / "step-14"
    broken(folder / file)
    done = igpt("pretrain", "--resume", stopped, "--device", "cpu")
    assert (done.code, done.stdout) == (1, "")
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(folder / Path(file).parts[0]) in told or f"{folder} is not a model directory" in told
    assert told.endswith(f"; remove {folder} to resume from step 10")
    assert "Traceback" not in done.stderr
    shutil.rmtree(folder)
    assert resume(tokens, stopped, device="cpu").status == "done"
    whole = pretrain(tokens, stopped.parent / "whole", RECIPE, EXECUTION, device="cpu").run
    assert_same_run(stopped, whole)


# A disk that is full


def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_needed(tokens, tmp_path, monkeypatch):
    whole = pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run

    def usage(path):
        return SimpleNamespace(free=5_000 if checkpoints(tmp_path / "run") else 10**12)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    with pytest.raises(OutputError) as told:
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")
    n = sum(p.numel() for p in load_model(whole).model.parameters())
    assert str(told.value).startswith(
        f"cannot save step 10 in {tmp_path / 'run'}: the disk is too full; {12 * n / 1e6:.2f} MB are needed, 0.01 MB are "
        f"free; make room; the checkpoint of step 7 is kept; resume with: igpt pretrain --resume {tmp_path / 'run'}"
    )
    assert (checkpoints(tmp_path / "run"), hidden_files(tmp_path / "run")) == ([7], [])
    assert read_config(tmp_path / "run")["result"]["status"].startswith("failed: cannot save step 10")
    monkeypatch.undo()
    resume(tokens, tmp_path / "run", device="cpu")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
@pytest.mark.parametrize("limit", [20_000, 35_000])  # bytes: less than the weights, or than the state
def test_a_write_that_the_system_refuses_keeps_the_old_checkpoint(tokens, tmp_path, limit):
    import resource

    whole = pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lower(record):
        if record["step"] == 8:
            wait_for_checkpoint(tmp_path / "run", 7)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))

    try:
        with pytest.raises(
            OutputError, match=r"cannot save step 10 in \S+: .*File too large.*; the checkpoint of step 7"
        ):
            pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu", on_record=lower)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (checkpoints(tmp_path / "run"), hidden_files(tmp_path / "run")) == ([7], [])
    resume(tokens, tmp_path / "run", device="cpu")
    assert_same_run(tmp_path / "run", whole)


def test_without_any_checkpoint_there_is_nothing_to_resume(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(
        OutputError, match="cannot save step 7 .*; there is no earlier checkpoint; start again, with --f"
    ):
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")


def test_metrics_that_cannot_be_written_stop_the_run(tokens, tmp_path, monkeypatch):
    """When even config.json cannot be written any more, the first error is the one that is shown."""
    real = MetricsWriter.write

    def write(self, record):
        if record["step"] == 9:
            monkeypatch.setattr("igpt_cli.training.run.write_config", full)
            full()
        real(self, record)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsWriter, "write", write)
    with pytest.raises(
        OutputError, match=f"cannot write .*/{METRICS}: No space left on device; make room; the checkpoint of step 7"
    ):
        pretrain(tokens, tmp_path / "run", RECIPE, EXECUTION, device="cpu")
    monkeypatch.undo()
    resume(tokens, tmp_path / "run", device="cpu")
    assert_same_run(tmp_path / "run", pretrain(tokens, tmp_path / "whole", RECIPE, EXECUTION, device="cpu").run)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [160, 240, 320, 420])
def test_on_a_disk_that_is_really_full_a_run_ends_with_one_message(tmp_path, kilobytes):
    """A small disk in memory; disk_usage lies, so that writing itself fails, here and there."""
    (tmp_path / "lie.py").write_text(
        "import shutil\nfrom types import SimpleNamespace\n"
        "shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)\n"
        "from igpt_cli.__main__ import main\nmain()\n"
    )
    write_tokens(tmp_path / "toy.h5")
    (tmp_path / "disk").mkdir()
    options = [*TOY, "--steps", 60, "--save-every", 5, "--keep", 3, "--eval-every", 1000, "-o", "disk/run"]
    script = (
        f'mount -t tmpfs -o size={kilobytes}k tmpfs disk || exit 77; "$0" lie.py pretrain toy.h5 "$@"; code=$?; '
        "ls -A disk/run disk/run/checkpoints; exit $code"
    )
    command = ["unshare", "-rm", "bash", "-c", script, sys.executable, *map(str, options)]
    try:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a disk in memory cannot be mounted")
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert "No space left on device" in told
    assert "make room; " in told
    assert "Traceback" not in done.stderr
    assert "part" not in done.stdout


# A gradient that is not finite


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [1, 2, 9, 11])
def test_a_gradient_that_is_not_finite_leaves_the_weights_before_it(
    tokens, tmp_path, monkeypatch, igpt, optimizer, bad
):
    recipe, real, steps = replace(RECIPE, optimizer=optimizer), Objective.forward, []

    def forward(self, *batch):
        losses = real(self, *batch)
        if self.training:
            steps.append(None)
        return losses * (float("nan") if self.training and len(steps) == bad else 1.0)

    monkeypatch.setattr(Objective, "forward", forward)
    with pytest.raises(NonFiniteError) as told:
        pretrain(tokens, tmp_path / "run", recipe, EXECUTION, device="cpu")
    monkeypatch.undo()
    whole = pretrain(tokens, tmp_path / "whole", recipe, replace(EXECUTION, save_every=1, keep=24), device="cpu").run
    rate = {1: "0.005", 2: "0.01"}.get(bad) or f"{records(whole)[bad - 1 + (bad > 10)]['lr']:.3g}"
    assert str(told.value).startswith(
        f"the gradient became nan at step {bad} (loss nan, learning rate {rate}, not clipped); the weights of step "
        f"{bad - 1} are kept; "
    )
    assert read_config(tmp_path / "run")["result"]["status"].startswith("failed: the gradient became nan")
    assert checkpoints(tmp_path / "run")[-1] == bad - 1
    if bad == 9:  # the run can be read
        assert igpt("probe", tmp_path / "run", tmp_path / "toy.h5", "--layer", 1, "--device", "cpu", "-q").code == 0
    if bad > 1:
        assert weights(tmp_path / "run") == weights(whole / "checkpoints" / f"step-{bad - 1}")
        assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == list(range(1, bad))
        resume(tokens, tmp_path / "run", device="cpu")  # the state of the optimizer is that of the step before, too
        assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learning_rate_far_too_high_ends_with_a_message_and_a_run_that_can_be_read(
    tmp_path, monkeypatch, igpt, optimizer
):
    monkeypatch.chdir(tmp_path)
    write_tokens(Path("toy.h5"))
    options = (*TOY, "--steps", 50, "--lr", 1e30, "--warmup-steps", 0, "--optimizer", optimizer)
    done = igpt("pretrain", "toy.h5", *options, "-o", "run")
    told = done.stderr.splitlines()[-1]
    assert (done.code, done.stdout) == (1, "")
    assert told.startswith("error: the gradient became ")
    assert " (loss " in told
    assert "learning rate 9.99e+29" in told
    kept = checkpoints(Path("run"))[-1]
    assert f"the weights of step {kept} are kept" in told
    assert np.isfinite(load_model("run").model.wpe.detach().numpy()).all()


# Weights and state


def test_weights_are_safetensors_and_the_state_is_apart(stopped):
    folder = stopped / "checkpoints" / "step-14"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        ".metadata", "__0_0.distcp", "config.json", "model.safetensors", "palette.npz"
    ]  # fmt: skip
    model = load_model(folder).model
    shutil.rmtree(folder / "state")  # reading weights never looks at it
    again = read_weights(folder, model)
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
