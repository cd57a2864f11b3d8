"""igpt probe --dense: the linear probe of every pixel, called by the command `probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from igpt_cli.cli.output import Voice, bars, result, result_json, table


def only_dense(others: dict[str, bool]) -> None:
    """
    Raises:
        BadParameter: an option is given that has no meaning here.
    """
    if given := [name for name, is_given in others.items() if is_given]:
        raise typer.BadParameter(f"--dense probes the pixels of its own images: leave out {', '.join(given)}")


def probe_dense(root: Path, run: Any, out: Path | None, json: bool, voice: Voice, **settings: Any) -> None:
    """Probe the images and masks in `root`, and show what is found; settings as for `probing.dense.dense_probe`."""
    from igpt_cli.probing.dense import dense_probe
    from igpt_cli.probing.probe import write_result

    found = dense_probe(run, root, **settings, stage=voice.progress)
    if out is not None:
        write_result(found, out)
    floor = found["commonest"]
    voice.say(
        f"{found['model']} layer {found['layer']}: mean IoU {found['mean_iou']:.1f}%, {found['pixel_accuracy']:.1f}% "
        f"of the pixels of {found['n_test']:,} test images (always the commonest class: {floor['mean_iou']:.1f}%, "
        f"{floor['pixel_accuracy']:.1f}%), trained on {found['n_train']:,} images"
    )
    if json:
        result_json(found)
    else:
        result(_table(found))


def _table(found: dict[str, Any]) -> str:
    """One row a layer; the chosen layer is marked."""
    drawn = bars([row["mean_iou"] for row in found["layers"]], 100.0)
    cells = [
        [
            str(row["layer"]) + (" *" if row["layer"] == found["layer"] else ""),
            f"{row['mean_iou']:.1f}",
            f"{row['pixel_accuracy']:.1f}",
            f"{row['val_mean_iou']:.1f}",
            f"{row['grid']}x{row['grid']}",
            bar,
        ]
        for row, bar in zip(found["layers"], drawn, strict=True)
    ]
    return table(cells, ["layer", "mean IoU %", "pixels %", "held out IoU %", "grid", ""])
