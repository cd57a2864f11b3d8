"""Test accuracy of a run's own class head, to compare with a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_cli.errors import InputError, MismatchError
from igpt_cli.model_dir import read_config
from igpt_cli.tokens.store import TokenFile
from igpt_cli.workspace import resolve_run


def tested_head(run: Path | str, tokens: TokenFile) -> dict[str, Any]:
    """The test accuracy that a run's config.json records for its class head; nothing is computed.

    Returns:
        run; kind: "fine-tuned", "from scratch" or "trained"; accuracy, interval (test, percent), n_test; val_accuracy
        (percent, at the checkpoint that was used); labels_per_class (None: all).

    Raises:
        InputError: the run has no class head, or it was not tested.
        MismatchError: it learnt from other images than the split "train" of the token file.
    """
    config = read_config(Path(run))
    result, training, data = (config.get(part) or {} for part in ("result", "training", "data"))
    if config["model"].get("n_classes") is None or result.get("accuracy") is None:
        why = "has no class head" if config["model"].get("n_classes") is None else "has not tested its class head"
        raise InputError(f"{run} {why}; name a run of igpt finetune or igpt train that has come to its end")
    if data.get("tokens_sha256") != tokens.split("train").sha256:
        raise MismatchError(
            f"{run} learnt from other images ({data.get('path')}) than the probe ({tokens.path}); its accuracy cannot "
            f"be compared with the probe's"
        )
    kind = "trained"
    if "finetuned_from" in config:
        kind = "from scratch" if training.get("from_scratch") else "fine-tuned"
    fields = {k: result.get(k) for k in ("accuracy", "interval", "n_test", "val_accuracy")}
    return {"run": str(run), "kind": kind, **fields, "labels_per_class": training.get("labels_per_class")}


def tested_heads(run: Path | str, others: Sequence[str], tokens: TokenFile) -> list[dict[str, Any]]:
    """`tested_head` of the run that is probed, if it has one that can stand beside the probe, and of other runs."""
    try:
        own = [tested_head(run, tokens)]
    except (InputError, MismatchError):
        own = []
    return own + [tested_head(resolve_run(name), tokens) for name in others]
