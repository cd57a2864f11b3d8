"""The colours for igpt palette fit and count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from igpt_cli.cli.output import BadImages, Voice
from igpt_cli.cli.resolve import images_or_default
from igpt_cli.errors import InputError

if TYPE_CHECKING:
    from igpt_cli.palette.histogram import ColourCounts


def counts_of(
    sources: list[str] | None, null: bool, column: str | None, preprocess: tuple, how: dict[str, Any], voice: Voice
) -> tuple[ColourCounts, int]:
    """The colours of what was named: counts are read and merged, images are counted; and how many cannot be read."""
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.palette.count import count_colours, selected_split
    from igpt_cli.palette.formats import names_in
    from igpt_cli.palette.histogram import is_counts, read_counts

    bad = BadImages(voice)
    files = [s for s in sources or [] if is_counts(s)]
    images = [s for s in sources or [] if s not in files]
    if palettes := [s for s in images if "centers" in names_in(s)]:
        raise InputError(f"{palettes[0]} is a palette; images or colour counts are needed to fit one")
    total = read_counts(files)
    if images or not files:
        source = images_or_default(images, null, voice, column, how["strict"])
        for note in source.notes:
            voice.say(note)
        if how["split"] is None and len(source.counts) > 1:
            voice.default("split", selected_split(source, None))
        with voice.progress("counting colours") as progress:
            total.merge(count_colours(source, Preprocess(*preprocess), **how, progress=progress, on_bad=bad))
    return total, bad.n


def say_left_out(voice: Voice, bad: int) -> None:
    """How many images could not be read."""
    if bad:
        voice.say(f"{bad:,} images could not be read and were left out; --strict stops at one")
