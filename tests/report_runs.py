"""Toy runs for the tests of the report: two models of the same images, whose names hold everything that is markup."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from evaluation.test_pixels import make_run

from igpt_cli.model_dir import METRICS
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.writer import TokenWriter

CLASSES = ["<script>document.title='no'</script>", '"><img src=x onerror=alert(1)>', "a</style>&amp;\u202eb"]
NASTY = "b<script>'&\""
IMAGES = "no<i>.h5"


def make_runs(folder: Path) -> None:
    """In `folder`: the token file IMAGES, the runs "a", with two checkpoints' worth of metrics, and NASTY, a BERT model."""
    palette = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32), np.arange(8) * 100)
    rng = np.random.default_rng(5)
    with TokenWriter(folder / IMAGES, palette, 4, classes=CLASSES, source="toy") as writer:
        for split in ("train", "test"):
            labels = np.arange(60) % 3
            tokens = np.repeat(rng.integers(4, size=(60, 2)) + 2 * labels[:, None], 8, axis=1)
            writer.append(split, tokens, labels, [f"{split}/{i}.png" for i in range(60)])
    data = {"path": str(folder / IMAGES), "source": "<u>toy</u>", "n_train": 60, "tokens_sha256": "0" * 64}
    data["from_run"] = "../where-it-lay.h5"
    for name, objective, steps in (("a", "ar", 400), (NASTY, "bert", 100)):
        result = {"status": "done", "steps": steps, "tokens_seen": 64 * steps, "val_loss": 1.25, "seconds": 7.5}
        make_run(
            folder / name,
            palette,
            objective,
            training={"augment": "none", "batch_size": 4, "learning_rate": 0.01, "optimizer": "adamw", "seed": 0},
            data=data,
            machine={"device": "cpu", "precision": "float32"},
            result=result,
            command="igpt pretrain '</script><script>alert(1)</script>'",
        )
        records = [{"step": n, "loss": 1 + 1 / n} for n in range(1, steps + 1)]
        records += [{"step": n, "val_loss": 1.2 + 1 / n} for n in (steps // 2, steps)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / METRICS).write_text(lines, encoding="utf-8")
