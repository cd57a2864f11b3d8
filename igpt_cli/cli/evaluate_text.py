"""Text output of igpt evaluate."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

from igpt_cli.cli.output import Voice, table

if TYPE_CHECKING:
    from igpt_cli.evaluation.classes import HeadResult
    from igpt_cli.evaluation.pixels import Evaluation
    from igpt_cli.probing.token_cosine import TokenCosine


def pixel_table(found: Evaluation) -> str:
    """The model, then what it is to be measured by."""
    rows = [(found.model, found.nats_per_token, found.standard_error)]
    rows += [(name, nats, None) for name, nats in _baselines(found).items()]
    cells = [
        [name, f"{nats:.4f}", "" if error is None else f"{error:.4f}", f"{nats / log(2):.4f}", f"{nats / log(8):.4f}"]
        for name, nats, error in rows
    ]
    return table(cells, ["", "nats/token", "standard error", "bits/token", "bits/sub-pixel"])


def _baselines(found: Evaluation) -> dict[str, float]:
    named = {"bigram (left)": found.bigram, "unigram": found.unigram, "uniform": found.uniform}
    return {name: nats for name, nats in named.items() if nats is not None}


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


def cosine_table(found: TokenCosine) -> str:
    """One row a layer."""
    return "\n".join(["layer  cosine", *(f"{layer:<5}  {x:.3f}" for layer, x in enumerate(found.cosines))])
