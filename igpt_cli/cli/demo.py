"""igpt demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from igpt_cli.cli.options import Device, Folder, Force, Json, Quiet, Seed
from igpt_cli.cli.output import Voice, interval, result, result_json, table
from igpt_cli.cli.training_display import TrainingDisplay


def demo(
    out: Folder = Path("igpt-demo"),
    seconds: Annotated[float, Option(min=1, help="Seconds of pretraining.")] = 60.0,
    recompute: Annotated[
        bool,
        Option("--recompute", help="Probe the shipped model here, on some of the images: three minutes more."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on the embedded emoji in minutes: palette, tokens, pretraining, completions, probe.

    \b
    Examples:
      igpt demo
      igpt demo -o try --seconds 300 --recompute

    Writes a folder with pictures of every step and a summary.json, and prints what was measured.
    """
    voice = Voice(quiet)
    from igpt_cli.report.demo import demo as run_demo

    with TrainingDisplay(voice) as display:
        how: dict[str, Any] = {
            "seconds": seconds,
            "recompute": recompute,
            "seed": seed,
            "device": device,
            "force": force,
        }
        found = run_demo(out, voice, **how, on_start=display.start, on_record=display.record)
    if json:
        result_json(found)
        return
    result(_table(found))
    for line in _meaning(found, out):
        voice.say(line)


def _table(found: dict[str, Any]) -> str:
    probed = found["probe"]
    shown = {"shipped igpt-tiny": probed, **probed["floors"]}
    rows = [[k, r.get("layer", ""), f"{r['accuracy']:.1f}", interval(r["interval"])] for k, r in shown.items()]
    rows.append(["always the most frequent group", "", f"{probed['chance']:.1f}", ""])
    return table(rows, ["features", "layer", "accuracy %", "95%"])


def _meaning(found: dict[str, Any], out: Path) -> list[str]:
    """What the measured numbers say, and no more."""
    probed, training = found["probe"], found["pretraining"]
    shipped = probed["training"]
    hours = f", trained for {shipped['seconds'] / 3600:.1f} hours," if "seconds" in shipped else ""
    at_random, here = training["uniform_loss"], training["val_loss"]
    against = [_compare(probed, name, row) for name, row in probed["floors"].items()]
    return [
        "",
        f"1. In {found['seconds']['pretraining']:.0f} s a network here learned to guess the next pixel of emoji: its "
        f"loss on other images went from {at_random:.2f} (a random guess) to {here:.2f}; the shipped model{hours} is "
        f"at {shipped['val_loss']:.2f}.",
        f"2. From upper halves that it had never seen, the shipped model drew lower ones: see {out}/4-completions.png.",
        f"3. Nobody gave it the names of the groups (animals, food, flags, ...), and yet a linear classifier on its "
        f"layer {probed['layer']} names the right one of nine for {probed['accuracy']:.0f}% of new emoji; that is "
        f"{', '.join(against)}.",
        "",
        f"Whole demo: {found['seconds']['total']:.0f} s. Pictures: {out}/1-palette.png to 5-layers.png; numbers: "
        f"{out}/summary.json",
        "Next, the same by hand: igpt palette fit, then igpt tokenize, igpt pretrain, igpt probe --layer 20",
    ]


def _compare(probed: dict[str, Any], name: str, floor: dict[str, Any]) -> str:
    """How the shipped model's accuracy compares with another's, by their 95% intervals.

    >>> a, b = {"accuracy": 60.0, "interval": [53.0, 66.0]}, {"accuracy": 20.0, "interval": [15.0, 26.0]}
    >>> _compare(a, "raw pixels", b), _compare(b, "raw pixels", a)
    ('better than raw pixels (20%)', 'worse than raw pixels (60%)')
    """
    if probed["interval"][0] > floor["interval"][1]:
        how = "better than"
    elif probed["interval"][1] < floor["interval"][0]:
        how = "worse than"
    else:
        how = "not clearly different from"
    return f"{how} {name} ({floor['accuracy']:.0f}%)"
