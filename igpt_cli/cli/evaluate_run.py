"""Run igpt evaluate for pixels, a class head, or two tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_cli.cli.evaluate_text import cosine_table, explain_head, explain_pixels, head_table, pixel_table
from igpt_cli.cli.output import Voice

if TYPE_CHECKING:
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
    return found.to_dict(), cosine_table(found)


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
    """How well a model predicts pixels, with the files asked for: the JSON document, and the table."""
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
