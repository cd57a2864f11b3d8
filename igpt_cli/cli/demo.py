"""igpt demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Quiet, Seed
from igpt_cli.cli.output import TrainingDisplay, Voice, result, result_json, table


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")] = Path("igpt-demo"),
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Seconds of pretraining.")] = 60.0,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Walk the whole road on the embedded images, in minutes on a CPU: palette, tokens, pretraining, probe.

    \b
    Examples:
      igpt demo
      igpt demo -o try --seconds 300

    Writes a folder with pictures of every step and a summary.json, and prints what was measured.
    """
    voice = Voice(quiet)
    from igpt_cli.report.demo import demo as run_demo

    with TrainingDisplay(voice) as display:
        found = run_demo(
            out,
            voice,
            seconds=seconds,
            seed=seed,
            device=device,
            force=force,
            on_start=display.start,
            on_record=display.record,
        )
    if json:
        result_json(found)
        return
    result(_table(found))
    for line in _meaning(found, out):
        voice.say(line)


def _table(found: dict[str, Any]) -> str:
    probes = found["probe"]
    rows = [["most frequent class", "", f"{probes['chance']:.1f}", ""]]
    for name, key in (
        ("raw pixels", "raw_pixels"),
        ("untrained network", "untrained"),
        ("trained here", "trained_here"),
        ("shipped igpt-tiny", "shipped"),
    ):
        row = probes[key]
        low, high = row["interval"]
        rows.append([name, str(row.get("layer", "")), f"{row['accuracy']:.1f}", f"{low:.1f}-{high:.1f}"])
    return table(rows, ["features", "layer", "accuracy %", "95%"])


def _meaning(found: dict[str, Any], out: Path) -> list[str]:
    """What the measured numbers say, and no more."""
    p, training = found["probe"], found["pretraining"]
    shipped = p["shipped"]
    lines = [
        "",
        f"The loss on held-out images {'fell' if training['val_loss'] < training['uniform_loss'] else 'did not fall'}: "
        f"{training['uniform_loss']:.3f} nats per token untrained (a uniform guess among the colours), "
        f"{training['val_loss']:.3f} after {training['steps']:,} steps.",
        f"The shipped model was trained on the same kind of images for {shipped['training']['steps']:,} steps; its "
        f"held-out loss is {shipped['training']['val_loss']:.3f}.",
    ]
    for name, key in (("the untrained network", "untrained"), ("raw pixels", "raw_pixels")):
        lines.append(_compare("The shipped model's features", shipped, name, p[key]))
    lines.append(_compare("The features trained here", p["trained_here"], "the untrained network", p["untrained"]))
    lines += [
        f"Whole demo: {found['seconds']['total']:.0f} s. Pictures: {out}/1-palette.png, 2-quantized.png, 3-loss.png, "
        f"4-layers.png; numbers: {out}/summary.json",
        "Next, the same by hand: igpt palette fit, then igpt tokenize, igpt pretrain, igpt probe --layer 20",
    ]
    return lines


def _compare(subject: str, a: dict[str, Any], other: str, b: dict[str, Any]) -> str:
    said = f"{a['accuracy']:.1f}% against {b['accuracy']:.1f}%"
    if a["interval"][0] > b["interval"][1]:
        return f"{subject} classify better than {other}: {said}."
    if a["interval"][1] < b["interval"][0]:
        return f"{subject} classify worse than {other}: {said}."
    return f"{subject} and {other} cannot be told apart with so few test images: {said}."
