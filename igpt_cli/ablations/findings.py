"""What an ablation's numbers show, and how they differ from the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from igpt_cli.ablations.catalogue import Ablation
from igpt_cli.images.records import brief

KINDS = ("global", "windows")


def findings(document: Mapping[str, Any]) -> list[str]:
    """One sentence for each row that is set against another, or for the cost of attention: what was measured."""
    if "cost" in document:
        return _costs(document["cost"])
    rows = {row["arm"] or row["label"]: row for row in document["rows"]}
    out = [
        comparison(row, rows[row["against"]])
        for row in rows.values()
        if row["against"] and row["accuracy"] is not None and rows[row["against"]]["accuracy"] is not None
    ]
    chance = document["chance"]
    if poor := [row["label"] for row in rows.values() if row["accuracy"] is not None and row["interval"][0] <= chance]:
        out.append(f"Not told apart from naming the commonest class, {chance:.1f}%: {brief(poor, len(poor))}.")
    return out


def comparison(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Whether the 95% intervals of two accuracies lie apart."""
    numbers = f"{row['accuracy']:.1f}% against {other['accuracy']:.1f}%"
    if row["interval"][0] > other["interval"][1]:
        return f"{row['label']} did better than {other['label']}: {numbers}."
    if row["interval"][1] < other["interval"][0]:
        return f"{row['label']} did worse than {other['label']}: {numbers}."
    return f"{row['label']} and {other['label']} cannot be told apart on {row['n_test']:,} test images: {numbers}."


def _costs(cost: Sequence[Mapping[str, Any]]) -> list[str]:
    timed = [row for row in cost if row["seconds"]["global"] and row["seconds"]["windows"]]
    out = []
    if len(timed) > 1:
        first, last = timed[0], timed[-1]
        more, longer = ({k: last[what][k] / first[what][k] for k in KINDS} for what in ("multiply_adds", "seconds"))
        out.append(
            f"From {first['resolution']} to {last['resolution']} pixels, {last['patches'] / first['patches']:.0f} "
            f"times as many patches: attention of all patches takes {more['global']:.0f} times the multiply-adds and "
            f"{longer['global']:.0f} times the time, in windows {more['windows']:.0f} and {longer['windows']:.0f}."
        )
    for row in timed[-1:]:
        work, time = row["multiply_adds"], row["seconds"]
        out.append(
            f"At {row['resolution']} pixels all patches take {work['global'] / work['windows']:.1f} times the "
            f"multiply-adds of windows, and {time['global'] / time['windows']:.1f} times the time"
            + (f"; {time['global'] / time['swin']:.1f} times that of Swin's layer." if time["swin"] else ".")
        )
    faster = [row["resolution"] for row in timed if row["seconds"]["windows"] < row["seconds"]["global"]]
    if timed and len(faster) < len(timed):
        slower = [row["resolution"] for row in timed if row["resolution"] not in faster]
        out.append(f"At {brief(slower)} pixels windows were not faster here.")
    if short := [row["resolution"] for row in cost if row["seconds"]["global"] is None]:
        out.append(f"At {brief(short)} pixels attention of all patches needs more memory than there is.")
    return out


def differences(ablation: Ablation, document: Mapping[str, Any]) -> list[str]:
    """In what the numbers differ from the paper's: of what they are, what was trained on what, and tested on what."""
    out = [f"the paper: {ablation.published}"]
    if "cost" in document:
        machine = document["machine"]
        on_cpu = machine["device"] == "cpu"
        time = ", processor time of all threads together" if on_cpu else ""
        out.append(f"here: {machine['device_name']}, {document['precision']}{time}")
        return out + list(ablation.differs)
    runs, rows = document["arms"], document["rows"]
    if runs:
        models = brief(unlike(f"{a['model']} of {a['parameters']:,} parameters" for a in runs), 6)
        side = runs[0]["resolution"]
        out.append(f"here: {models}, {side}x{side} pixels; images: {runs[0]['source']}")
        seen = sorted({a["images_seen"] for a in runs})
        span = f"{seen[0]:,}" if len(seen) == 1 else f"{seen[0]:,} to {seen[-1]:,}"
        most = max(a["n_train"] for a in runs)
        out.append(
            f"trained on {most:,} images, of which each run saw {span} ({seen[-1] / most:.2g} epochs), "
            f"{brief(unlike(describe(a) for a in runs))}"
        )
    else:
        out.append(f"here: the run {document['settings']['run']}")
    tests = brief([f"{n:,}" for n in sorted({row["n_test"] for row in rows if row["n_test"]})])
    out.append(
        f"one run of each with seed {document['settings']['seed']}, tested on {tests} images; the intervals tell of "
        f"the choice of these, not of how much runs differ by their seeds"
    )
    return out + list(ablation.differs)


def describe(run: Mapping[str, Any]) -> str:
    """Recipe and augmentation of a run in words."""
    return (
        f"recipe {run['recipe']}, augmentation {run['augment']}" if run["recipe"] else f"augmentation {run['augment']}"
    )


def unlike(texts: Iterable[str]) -> list[str]:
    """Each once, in their order."""
    return list(dict.fromkeys(texts))
