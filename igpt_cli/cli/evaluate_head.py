"""igpt evaluate of a model of RGB images: its class head, and both tokens of a distilled one."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from igpt_cli.cli.output import Voice, result, result_json, table

if TYPE_CHECKING:
    from igpt_cli.evaluation.classes import HeadResult
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.tokens.store import TokenFile, TokenSplit


def only_of_classes(options: dict[str, bool], name: str) -> None:
    """
    Raises:
        InputError: one of the options given is about the loss of pixels, which a model of RGB images does not predict.
    """
    from igpt_cli.errors import InputError

    if given := [option for option, is_given in options.items() if is_given]:
        raise InputError(
            f"{', '.join(given)}: about the loss of pixels, and {name} is a model of RGB images, which predicts classes"
        )


def show_head(
    model: ModelDir,
    file: TokenFile,
    source: str,
    split: str,
    limit: int | None,
    head: str | None,
    class_order: str | None,
    batch_size: int | None,
    precision: str,
    out: Path | None,
    json: bool,
    voice: Voice,
) -> None:
    """Print, or write, how well a model's class head classifies a split."""
    from dataclasses import replace

    from igpt_cli.evaluation.classes import evaluate_head
    from igpt_cli.evaluation.pixels import evenly_spaced
    from igpt_cli.files import replacing

    with voice.progress("classifying") as progress:
        found = evaluate_head(
            model,
            file,
            split,
            rows=evenly_spaced(len(file.split(split)), limit),
            head=head or "both",
            class_order=class_order,
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
    found = replace(found, tokens=source)
    if out is not None:
        with replacing(out) as part:
            part.write_text(dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    _explain(found, voice)
    if json:
        result_json(found.to_dict())
    else:
        result(_table(found))


def show_tokens_cosine(
    model: ModelDir,
    part: TokenSplit,
    limit: int | None,
    batch_size: int | None,
    precision: str,
    out: Path | None,
    figure: Path | None,
    json: bool,
    voice: Voice,
) -> None:
    """Print, write or draw how alike both tokens of a distilled model are at each layer."""
    from igpt_cli.evaluation.pixels import evenly_spaced
    from igpt_cli.files import replacing
    from igpt_cli.probing.token_cosine import token_cosine

    with voice.progress("comparing tokens") as progress:
        rows = evenly_spaced(len(part), limit)
        found = token_cosine(model, part, rows, batch_size=batch_size or 16, precision=precision, progress=progress)
    if figure is not None:
        from igpt_cli.report.figures import cosine_curve

        cosine_curve(found, figure)
        voice.say(f"drawn: {figure}")
    if out is not None:
        with replacing(out) as new:
            new.write_text(dumps(found, indent=2) + "\n", encoding="utf-8")
    if json:
        result_json(found)
    else:
        result("\n".join(["layer  cosine", *(f"{r['layer']:<5}  {r['cosine']:.3f}" for r in found["layers"])]))


def _table(found: HeadResult) -> str:
    low, high = found.interval
    top_5 = [] if found.top_5_accuracy is None else [("top 5 %", f"{found.top_5_accuracy:.2f}")]
    columns = [
        ("model", found.model),
        *([] if found.head is None else [("head", found.head)]),
        ("images", found.n_images),
        ("accuracy %", f"{found.accuracy:.2f}"),
        ("95%", f"{low:.1f}-{high:.1f}"),
        *top_5,
        ("log loss", f"{found.log_loss:.4f}"),
        ("commonest %", f"{found.chance:.1f}"),
    ]
    return table([[value for _, value in columns]], [name for name, _ in columns])


def _explain(found: HeadResult, voice: Voice) -> None:
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
