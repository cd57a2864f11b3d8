"""How well the class head of a fine-tuned model classifies the images of any split."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from igpt_cli.device import autocast
from igpt_cli.model_dir import ModelDir
from igpt_cli.statistics import vote, wilson
from igpt_cli.tokens.loader import MASK_PROB, fixed_mask
from igpt_cli.tokens.store import TokenSplit


@torch.inference_mode()
def head_accuracy(
    run: ModelDir, split: TokenSplit, rows: np.ndarray, *, batch_size: int, precision: str = "float32"
) -> dict[str, Any] | None:
    """Accuracy in percent with its 95% Wilson interval, on the labelled images among some rows of a split.

    BERT sees each image under as many masks as when it was tested, which vote, drawn by the seed of its run.

    Args:
        run: a loaded model; it computes on the device where it is.
        rows: (n,) int64.

    Returns:
        accuracy, interval, n_labelled. None without a class head, or one that was never trained (it is zero then);
        without labels; and where the classes are others than those it has learnt.
    """
    model: Any = run.model.eval()
    labels = np.asarray(split.labels, np.int64)[rows]
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    head = getattr(model, "wclf", None)
    learnt = run.config.get("data", {}).get("classes")
    if head is None or not head.weight.any() or not len(rows) or split.file.classes != learnt:
        return None
    training, device = run.config.get("training", {}), head.weight.device
    n_masks = training.get("bert_masks") if run.config["model"]["objective"] == "bert" else 0
    correct = 0
    for start in range(0, len(rows), batch_size):
        here = rows[start : start + batch_size]
        tokens = torch.from_numpy(np.asarray(split.tokens[here], np.int64)).to(device)
        predicted = []
        for draw in range(n_masks or 1):
            mask = None
            if n_masks:
                prob, seed = training.get("mask_prob") or MASK_PROB, training.get("seed", 0)
                mask = torch.from_numpy(fixed_mask(here, tokens.shape[1], prob, seed, draw)).to(device)
            with autocast(precision, device):
                _, classes = model.hidden_and_classes(tokens, mask)
            predicted.append(classes.argmax(1).cpu().numpy())
        chosen = vote(np.stack(predicted), here, training.get("seed", 0))
        correct += int((chosen == labels[start : start + batch_size]).sum())
    n = len(rows)
    return {"accuracy": 100 * correct / n, "interval": wilson(correct, n), "n_labelled": n}
