"""Make a model that ships with igpt from a run: float16 weights, the palette, the settings and its loss curve.

    python data/models/ship.py runs/tiny igpt-tiny

The folder data/models/<name> holds what `builtin:<name>` loads. Of the metrics every tenth step and each validation
stay. Where a run was initialised from another, as when training goes over several sessions, name all, first to last:
their steps, tokens and seconds are added up in `result`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
#: float16 keeps eleven bits of a weight, bfloat16 eight; these weights are far from float16's limits.
DTYPE = torch.float16


def ship(runs: list[Path], name: str) -> None:
    """Write data/models/`name` from the last of the runs."""
    out = HERE / name
    out.mkdir(exist_ok=True)
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    config, result = configs[-1], {}
    for key in ("steps", "tokens_seen", "seconds"):
        result[key] = sum(c["result"][key] for c in configs)
    config["result"] = {**config["result"], **result, "run": name}
    config["sessions"] = [c["command"] for c in configs]
    for key in ("from_run", "absolute"):  # where the data lay
        config["data"].pop(key, None)
    config["data"]["source"] = Path(config["data"]["source"]).name
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = load_file(runs[-1] / "model.safetensors")
    assert all(w.abs().max() < torch.finfo(DTYPE).max for w in weights.values())
    save_file({k: w.to(DTYPE) for k, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
    shutil.copy(runs[-1] / "palette.npz", out / "palette.npz")
    offset, lines = 0, []
    for run, c in zip(runs, configs):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "val_loss" in record or record["step"] % 10 == 0 or record["step"] + offset == 1:
                lines.append(json.dumps({**record, "step": record["step"] + offset}))
        offset += c["result"]["steps"]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    ship([Path(run) for run in sys.argv[1:-1]], sys.argv[-1])
