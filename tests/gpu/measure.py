"""Everything here that wants a GPU, in one command of under ten minutes:

    IGPT_CIFAR10=cifar10-jpeg.tar.gz python3 tests/gpu/measure.py OUT

1. the tests marked gpu;
2. the model that ships with igpt, trained anew on the embedded images: OUT/igpt-tiny replaces data/models/igpt-tiny
   where its held-out loss is lower;
3. minGPT's public setting (12 layers, width 256, 8 heads) on CIFAR-10, with its loss, layer curve and palette.

Runs from the source tree, without installation. Each step is an igpt command, printed before it runs; the times, the
machine and all results go to OUT/measured.json.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_SECONDS, CIFAR_SECONDS = 130, 240


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found: dict = {"machine": machine(), "steps": []}

    def step(*command: str, cwd: Path = out) -> str:
        print("$", shlex.join(command), flush=True)
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=cwd, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        seconds = round(time.monotonic() - started, 1)
        found["steps"].append({"command": shlex.join(command), "seconds": seconds, "code": done.returncode})
        (out / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"  {seconds} s, exit {done.returncode}", flush=True)
        return done.stdout

    def igpt(*arguments: str) -> str:
        return step(sys.executable, "-m", "igpt_cli", *arguments)

    found["gpu_tests"] = step(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", cwd=ROOT)[-2000:]

    igpt("palette", "fit", "-o", "embedded.npz")
    igpt("tokenize", "-p", "embedded.npz", "-o", "embedded.h5")
    igpt(
        "pretrain",
        "embedded.h5",
        "-b",
        "64",
        "--time-limit",
        str(TINY_SECONDS),
        "--val-images",
        "1000",
        "-o",
        "igpt-tiny",
    )
    found["tiny"] = probed(igpt("probe", "igpt-tiny", "embedded.h5", "--json", "--figure", "tiny-layers.png"))

    archive = os.environ.get("IGPT_CIFAR10")
    if archive:
        archive = str(Path(archive).resolve())
        igpt("palette", "fit", archive, "-o", "cifar10.npz")
        igpt("tokenize", archive, "-p", "cifar10.npz", "-o", "cifar10.h5")
        igpt(
            "pretrain", "cifar10.h5", "-m", "igpt-xs", "--n-layer", "12", "-b", "64", "--augment", "flip",
            "--time-limit", str(CIFAR_SECONDS), "--val-images", "2000", "-o", "cifar10-mingpt",
        )  # fmt: skip
        found["cifar10"] = probed(
            igpt("probe", "cifar10-mingpt", "cifar10.h5", "--train-images", "10000", "--test-images", "10000", "--json",
                 "--figure", "cifar10-layers.png")
        )  # fmt: skip
    for run in ("igpt-tiny", "cifar10-mingpt"):
        if (out / run / "config.json").exists():
            found[f"{run} result"] = json.loads((out / run / "config.json").read_text())["result"]
    (out / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "steps"}, indent=2))


def probed(text: str) -> dict:
    """The headline of a probe's JSON, and accuracy by layer."""
    if not text.strip():
        return {"failed": True}
    document = json.loads(text)
    short = {k: document[k] for k in ("accuracy", "interval", "layer", "n_train", "n_test", "chance", "seconds")}
    floors = {name: row["accuracy"] for name, row in document["floors"].items()}
    return {**short, "floors": floors, "by_layer": [row["accuracy"] for row in document["layers"]]}


def machine() -> dict:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
