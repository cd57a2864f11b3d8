"""Run and print igpt evaluate for pixels, a class head, or two tokens."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_cli.cli.output import Voice, interval, table

if TYPE_CHECKING:
    from igpt_cli.evaluation.classes import HeadResult
    from igpt_cli.evaluation.pixels import Evaluation
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.tokens.store import TokenFile, TokenSplit


def evaluate_cosine(
    model: ModelDir, part: TokenSplit, limit: int | None, figure: Path | None, how: dict[str, Any], voice: Voice
) -> tuple[dict[str, Any], str]:
    """How alike both tokens of a distilled model are at each layer: the JSON document, and the table."""
    from igpt_cli.probing.token_cosine import token_cosine
    from igpt_cli.statistics import evenly_spaced

    how["batch_size"] = how["batch_size"] or 16
    with voice.progress("comparing tokens") as progress:
        found = token_cosine(model, part, evenly_spaced(len(part), limit), **how, progress=progress)
    if figure is not None:
        from igpt_cli.report.figures import cosine_curve

        cosine_curve(found, figure)
        voice.say(f"drawn: {figure}")
    text = "\n".join(["layer  cosine", *(f"{layer:<5}  {x:.3f}" for layer, x in enumerate(found.cosines))])
    return found.to_dict(), text


def evaluate_classes(
    model: ModelDir, part: TokenSplit, source: str, limit: int | None, how: dict[str, Any], voice: Voice
) -> tuple[dict[str, Any], str]:
    """How well the class head of a model of RGB images classifies: the JSON document, and the table."""
    from igpt_cli.evaluation.classes import evaluate_head
    from igpt_cli.statistics import evenly_spaced

    with voice.progress("classifying") as progress:
        rows = evenly_spaced(len(part), limit)
        found = replace(evaluate_head(model, part.file, part.name, rows=rows, **how, progress=progress), tokens=source)
    explain_head(found, voice)
    return found.to_dict(), head_table(found)


def evaluate_pixels(
    model: ModelDir,
    part: TokenSplit,
    source: str,
    outputs: tuple[Path | None, Path | None, Path | None, int],
    how: dict[str, Any],
    voice: Voice,
) -> tuple[dict[str, Any], str]:
    """How well a model predicts pixels, with the requested files: the JSON document, and the table."""
    from igpt_cli.evaluation.pixels import evaluate as library
    from igpt_cli.evaluation.pixels import write_per_image
    from igpt_cli.report.maps import position_map as draw

    per_image, position_map, map_path, map_images = outputs
    with voice.progress("evaluating") as progress:
        found = replace(library(model, part.file, part.name, **how, progress=progress), tokens=source)
    mapped = {} if map_path is None else _map(model, part, found, map_path, map_images, how["batch_size"], voice)
    if per_image is not None:
        write_per_image(found, part, per_image)
        voice.say(f"written: {per_image}")
    if position_map is not None:
        draw(found.by_position, position_map, _title(found, part.file, found.n_images))
        voice.say(f"drawn: {position_map}")
    explain_pixels(found, voice)
    return found.to_dict() | mapped, pixel_table(found)


def _map(
    run: ModelDir, split: TokenSplit, found: Evaluation, path: Path, n: int, batch_size: int | None, voice: Voice
) -> dict[str, Any]:
    """Draw or write the loss of every pixel of some images; what the JSON document says of it."""
    from igpt_cli.evaluation.pixel_map import map_pixels
    from igpt_cli.report.maps import write_map

    with voice.progress("mapping") as progress:
        mapped = map_pixels(run, split, found, n, batch_size, progress)
    if len(mapped.rows) < found.n_images:
        voice.say(f"map: {len(mapped.rows):,} of {found.n_images:,} images, evenly spaced")
    write_map(mapped, split, path, _title(found, split.file, len(mapped.rows)))
    voice.say(f"{'written' if path.suffix.lower() == '.npz' else 'drawn'}: {path}")
    return {"map": {"path": str(path), **mapped.to_dict()}}


def _title(found: Evaluation, file: TokenFile, n: int) -> str:
    """Of a picture: "igpt-tiny on 8 images (cifar.h5, test)"; an only split is not worth a word."""
    from igpt_cli.cli.resolve import name_of
    from igpt_cli.images.records import count

    split = f", {found.split}" if len(file.splits) > 1 else ""
    return f"{found.model} on {count(n, 'image')} ({name_of(found.tokens)}{split})"


def pixel_table(found: Evaluation) -> str:
    """The model, then what it is to be measured by."""
    rows = [(found.model, found.nats_per_token, found.standard_error)]
    baselines = {"bigram (left)": found.bigram, "unigram": found.unigram, "uniform": found.uniform}
    rows += [(name, nats, None) for name, nats in baselines.items() if nats is not None]
    cells = [
        [name, f"{nats:.4f}", "" if error is None else f"{error:.4f}", f"{nats / log(2):.4f}", f"{nats / log(8):.4f}"]
        for name, nats, error in rows
    ]
    return table(cells, ["", "nats/token", "standard error", "bits/token", "bits/sub-pixel"])


def explain_pixels(found: Evaluation, voice: Voice) -> None:
    """On stderr: on what the loss was measured, and what it cannot be compared with."""
    from igpt_cli.images.records import count

    hidden = "" if found.mask_prob is None else f", pixels hidden with probability {found.mask_prob:g}"
    voice.say(
        f"{found.model}, {found.objective}, on {count(found.n_images, 'image')} of the split {found.split}{hidden}: "
        f"{found.n_tokens:,} tokens in {found.seconds:.1f} s"
    )
    if found.accuracy is not None and found.interval is not None:
        low, high = found.interval
        voice.say(
            f"its class head names {found.accuracy:.2f}% of {count(found.n_labelled or 0, 'image')} with a label "
            f"(95%: {low:.1f} to {high:.1f}), log loss {found.log_loss:.4f} nats"
        )
    if found.seen_in_training:
        voice.say("note: the model was trained on these images")
    if found.baselines_fitted_on == found.split:
        voice.say(f"note: the baselines were counted on the split {found.split} itself, which flatters them")
    else:
        voice.say(f"the baselines were counted on the split {found.baselines_fitted_on}")
    voice.say(
        "note: bits per sub-pixel are bits per token / 3, of the quantised image; they are not comparable with the "
        "bits/dim of 8-bit images"
    )


def head_table(found: HeadResult) -> str:
    """A class head's result, in one row."""
    top_5 = [] if found.top_5_accuracy is None else [("top 5 %", f"{found.top_5_accuracy:.2f}")]
    columns = [
        ("model", found.model),
        *([] if found.head is None else [("head", found.head)]),
        ("images", found.n_images),
        ("accuracy %", f"{found.accuracy:.2f}"),
        ("95%", interval(found.interval)),
        *top_5,
        ("log loss", f"{found.log_loss:.4f}"),
        ("commonest %", f"{found.chance:.1f}"),
    ]
    return table([[value for _, value in columns]], [name for name, _ in columns])


def explain_head(found: HeadResult, voice: Voice) -> None:
    """On stderr: how the classes were matched, and what flatters the figures."""
    voice.say(
        f"{found.model} on {found.n_images:,} labelled images of the split {found.split}: {found.n_classes:,} classes, "
        f"{found.images_per_second:,.0f} images/s, {found.seconds:.1f} s in all"
    )
    if found.other_order_accuracy is not None:
        numbers = {"by order of value": "by value (0, 1, 2, 10)", "by order of text": "as text (0, 1, 10, 2)"}
        order, other = numbers.pop(found.matched), next(iter(numbers.values()))
        voice.say(
            f"note: the model does not name its classes, and numbers have two orders; sorted {order} they fit the "
            f"images better, sorted {other} accuracy is {found.other_order_accuracy:.2f}%; --class-order chooses"
        )
    if found.matched.startswith("by order") and found.other_order_accuracy is None:
        voice.say(
            "note: the model does not name its classes; they were taken in the order of the images' class folders"
        )
    if found.seen_in_training:
        voice.say("note: the model was trained on these images")
