"""Toy runs for the tests of training: token files, what two runs must share, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from igpt_cli.model_dir import read_metrics
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.writer import TokenWriter

ROOT = Path(__file__).parent.parent
#: What differs between two runs of the same recipe.
TIMES = ("seconds", "tokens_per_second", "mfu", "memory", "val_seconds")
#: The options of a toy run, as typed.
TOY = ("--n-layer", 2, "--n-embd", 16, "--batch-size", 6, "--lr", 0.01, "--device", "cpu", "--precision", "float32")


def write_tokens(path: Path, n: int = 47, resolution: int = 6, n_vocab: int = 8, seed: int = 5, shade: int = 0) -> Path:
    """A token file of n training and 8 test images, whose pixels rise from dark to light."""
    centers = np.linspace(10, 240, n_vocab)[:, None].repeat(3, 1) + shade
    rng = np.random.default_rng(seed)
    with TokenWriter(path, Palette(centers.astype(np.float32)), resolution, classes=("a", "b"), source="toy") as writer:
        for split, count in (("train", n), ("test", 8)):
            tokens = np.sort(rng.integers(n_vocab, size=(count, resolution**2)), axis=1)
            writer.append(split, tokens, np.arange(count) % 2, [f"{split}/{i}" for i in range(count)])
    return path


def records(run: Path) -> list[dict]:
    """Every record of a run's metrics.jsonl, without what the clock put into it."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)]


def assert_same_run(run: Path, other: Path) -> None:
    """Both runs are the same bit for bit: every record, and the weights."""
    assert records(run) == records(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def hidden_files(run: Path) -> list[str]:
    """What is unfinished in a run's folder."""
    return [str(p.relative_to(run)) for p in run.rglob(".*") if p.name != ".metadata"]


def stop_at(*steps: int, number: int = signal.SIGTERM):
    """An on_record that sends this process a signal when one of these steps is recorded."""

    def on_record(record: dict) -> None:
        if "loss" in record and record["step"] in steps:
            os.kill(os.getpid(), number)

    return on_record


def start(*args: object, cwd: Path, ranks: int = 1, script: Path | None = None) -> subprocess.Popen:
    """`python -m igpt_cli ARGS`, or `python SCRIPT ARGS`, as a process of its own; with ranks > 1 under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = [str(script)] if script else ["-m", "igpt_cli"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, *torchrun, *program, *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen, run: Path, more_than: int = 0, seconds: float = 60) -> int:
    """Wait until a run has recorded more steps than so many; how many it has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and (n := (run / "metrics.jsonl").read_text().count('"loss"')) > more_than:
            return n
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stderr.read()}")
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no step in {seconds} s: {process.communicate()[1]}")
