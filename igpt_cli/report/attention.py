"""Pictures of attention: maps by pixel, in images, and distance by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_cli.errors import InputError
from igpt_cli.images.records import count
from igpt_cli.model_dir import ModelDir
from igpt_cli.model_input import inputs_of
from igpt_cli.probing.attention import Looks, attention_distance, attention_maps
from igpt_cli.report.figures import BLUE, GREY, ORANGE, STYLE, fitting, new_figure, save, sheet, wrapped
from igpt_cli.tokens.sheet import caption_of
from igpt_cli.tokens.store import TokenSplit

#: {layer: (centres, covariances)} of Gaussian heads.
Gaussians = Mapping[int, tuple[np.ndarray, np.ndarray]]

#: Of heads, in turn; the first nine can be distinguished on paper, too.
COLOURS = ("#1f5fa8", "#d9730d", "#15803d", "#b91c1c", "#7c3aed", "#92400e", "#db2777", "#0e7490", "#4d7c0f")
#: A sheet of maps has at most so many.
MOST_MAPS = 1024
#: In dots: around a sheet, between maps, the text above all and a further line of its note, the text to the left of a
#: line or above a map.
MARGIN, BETWEEN, HEAD, NOTE, LEFT, ABOVE = 24, 6, 72, 20, 58, 18
#: The colour of places that cannot be seen.
PALE = (0.9, 0.9, 0.9)
#: Maps of a line, where a sheet shows one head and its layers follow one another.
ACROSS = 8


def gaussian_figure(gaussians: Gaussians, path: Path | str, title: str = "", most: int = 16) -> None:
    """Where the heads of each layer look around the query, a panel a layer: the ellipses that hold half (solid) and
    nine tenths (dotted) of a head's attention, its number in the middle; the query is the black square.

    Args:
        gaussians: {layer: (centres (H, 2), covariances (H, 2, 2))}, key minus query, rows and columns, in places.
        most: panels show at most so many places to each side; centres further out are named below.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Ellipse, Rectangle

    away = np.concatenate([np.abs(centres).max(axis=1) for centres, _ in gaussians.values()])
    reach = max(4, int(np.ceil(away[away <= most - 1].max(initial=0) + 1))) + 0.5
    columns = min(3, len(gaussians))
    lines = -(-len(gaussians) // columns)
    with plt.rc_context(STYLE):
        figure, _ = new_figure(2.6 * columns + 0.3, 2.8 * lines + 0.75)
        figure.clear()
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (layer, (centres, covariances)) in zip(panels, gaussians.items()):
            axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, color="black", zorder=1))
            outside = []
            for head, (centre, covariance) in enumerate(zip(centres, covariances)):
                colour = COLOURS[head % len(COLOURS)]
                row, column = centre
                if max(abs(row), abs(column)) > reach:
                    outside.append(f"{head} at {row:.0f},{column:.0f}")
                values, vectors = np.linalg.eigh(covariance)
                angle = np.degrees(np.arctan2(vectors[0, 1], vectors[1, 1]))  # of the longer axis; x is the column
                for share, line in ((0.5, "-"), (0.9, ":")):
                    # A round Gaussian of two dimensions holds 1 - exp(-r^2 / 2) within r deviations.
                    short, long = 2 * np.sqrt(-2 * np.log(1 - share) * values)
                    ring = Ellipse((column, row), long, short, angle=angle, fill=False, ec=colour, ls=line, lw=1.3)
                    axes.add_patch(ring)
                text = {"ha": "center", "va": "center", "fontsize": 7, "fontweight": "bold", "zorder": 5}
                white = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": colour, "lw": 0.8, "alpha": 0.9}
                axes.text(column, row, str(head), color=colour, clip_on=True, bbox=white, **text)
            axes.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", title=f"layer {layer}")
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color("#d1d5db")
            ticks = np.arange(-int(reach), int(reach) + 1)
            axes.set_xticks(ticks[ticks % max(2, int(reach) // 2) == 0])
            axes.set_yticks(axes.get_xticks())
            axes.set_xticks(ticks - 0.5, minor=True)
            axes.set_yticks(ticks - 0.5, minor=True)
            axes.grid(False, which="major")
            axes.grid(True, which="minor", linewidth=0.4)
            axes.tick_params(which="both", length=0, labelsize=7, labelcolor=GREY)
            if outside:
                axes.set_xlabel("further out: " + fitting("; ".join(outside), 6, 110), fontsize=6, color=GREY)
        for axes in panels[len(gaussians) :]:
            axes.set_axis_off()
        note = ("rows and columns from the query (black)", "solid: 50% of a head's attention, dotted: 90%")
        figure.suptitle(fitting(title, 10.5, 72 * (2.6 * columns + 0.2)), fontsize=10.5, parse_math=False)
        figure.supxlabel(("\n" if columns == 1 else "; ").join(note), fontsize=7, color=GREY)
    save(figure, Path(path))


def map_figure(
    looks: Mapping[int, Looks],
    images: np.ndarray,
    path: Path | str,
    heads: Sequence[int],
    pixel: tuple[int, int],
    captions: Sequence[str],
    title: str = "",
    note: str = "",
) -> None:
    """What one pixel looks at: for each image a line a layer and a column a head, over the image in grey.

    One head alone has its layers side by side. The colours of each map go from 0 to its own highest probability. The
    pixel's place is framed in red. Places that no head of a layer gives anything, such as those after a pixel in raster
    order or outside a window, are pale.

    Args:
        looks: {layer: Looks} of the images.
        images: (I, R, R, 3) uint8.
        heads: which heads are shown.
        pixel: (row, column), the query.
        captions: I texts.
        title, note: above; the title is one line, the note as many as it takes.

    Raises:
        InputError: more maps than a sheet holds.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    count = len(images) * len(looks) * len(heads)
    if count > MOST_MAPS:
        raise InputError(
            f"{count:,} maps: {len(images)} images, {len(looks)} layers, {len(heads)} heads; a picture holds "
            f"{MOST_MAPS:,}. Choose with --layer, --head and -n"
        )
    R, one = images.shape[1], len(heads) == 1
    across, down = (min(ACROSS, len(looks)), -(-len(looks) // ACROSS)) if one else (len(heads), len(looks))
    side = next(side for most, side in ((4, 160), (9, 112), (16, 88), (MOST_MAPS, 64)) if across <= most)
    line = side + BETWEEN + (ABOVE if one else 0)
    block = max(down * line, side) + 34
    start = MARGIN + side + (24 if one else LEFT + 14)  # of the first map
    W = max(start + across * (side + BETWEEN) + MARGIN, 460)
    dot = 72 / STYLE["figure.dpi"]
    notes = wrapped(note, 8, (W - 2 * MARGIN) * dot)
    words = HEAD + NOTE * (len(notes) - 1)  # the height of the text above all
    H = words + ABOVE + len(images) * block
    figure, axes = sheet(W, H)
    text = {"parse_math": False, "verticalalignment": "baseline", "fontsize": 7.5}
    axes.text(MARGIN, 30, fitting(title, 10.5, (W - 2 * MARGIN) * dot), **(text | {"fontsize": 10.5}))
    for i, one_line in enumerate(notes):
        axes.text(MARGIN, 54 + NOTE * i, one_line, color=GREY, **(text | {"fontsize": 8}))

    def frame(x: float, y: float, query: tuple[int, int], n: int) -> None:
        step = side / n
        place = (x + query[1] * step, y + query[0] * step)
        axes.add_patch(Rectangle(place, step, step, fill=False, ec="#ef4444", lw=1.2, zorder=3))

    def show(image: np.ndarray, x: float, y: float) -> None:
        axes.imshow(image, extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto")

    for i, image in enumerate(images):
        top = words + ABOVE + i * block
        show(image, MARGIN, top)
        frame(MARGIN, top, pixel, R)
        axes.text(MARGIN, top + side + 17, fitting(captions[i], 7.5, side * dot), **text)
        grey = np.repeat(image.mean(-1, keepdims=True) / 255, 3, -1)
        for k, (layer, look) in enumerate(looks.items()):
            n, places = look.maps.shape[-1], np.arange(R) * look.maps.shape[-1] // R
            unseen = (look.maps == 0).all((0, 1))  # (n, n): a mask gives exactly 0
            for j, head in enumerate(heads):
                row, column = divmod(k, ACROSS) if one else (k, j)
                x, y = start + column * (side + BETWEEN), top + row * line
                if one:
                    axes.text(x + side / 2, y - 6, f"layer {layer}", ha="center", **text)
                elif k == 0 and i == 0:
                    axes.text(x + side / 2, y - 6, f"head {head}", ha="center", **text)
                if not one and j == 0:
                    axes.text(x - 10, y + side / 2 + 4, f"layer {layer}", ha="right", **text)
                values = look.maps[i, head]
                heat = colormaps["viridis"](values / max(values.max(), 1e-30))[..., :3]
                heat[unseen] = PALE
                show(0.75 * heat[places][:, places] + 0.25 * grey, x, y)
                frame(x, y, look.query, n)
    axes.set(xlim=(0, W), ylim=(H, 0))
    save(figure, Path(path))


def distance_figure(distances: Mapping[int, np.ndarray], path: Path | str, title: str = "") -> None:
    """How far each head looks by layer, in pixels, and the mean of each layer's heads.

    Args:
        distances: {layer: (H,) pixels}.
    """
    figure, axes = new_figure()
    for i, (layer, values) in enumerate(distances.items()):
        label = "a head" if i == 0 else None
        axes.plot(np.full(len(values), layer), values, "o", color=BLUE, alpha=0.55, markersize=4, mew=0, label=label)
    means = [values.mean() for values in distances.values()]
    axes.plot(list(distances), means, "-", color=ORANGE, linewidth=1.5, label="mean of a layer")
    axes.set(xlabel="layer", ylabel="mean attention distance (pixels)")
    axes.set_title(fitting(title, 10.8, 400), parse_math=False)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    save(figure, Path(path))


def gaussians_of(run: ModelDir, layers: Sequence[int]) -> Gaussians:
    """{layer: (centres, covariances)} of a model whose heads are Gaussians; of any other, nothing."""
    model: Any = run.model
    found = model.gaussians() if hasattr(model, "gaussians") else {}
    return {k: (found[k][0].cpu().numpy(), found[k][1].cpu().numpy()) for k in layers if k in found}


def draw_gaussians(run: ModelDir, gaussians: Gaussians, path: Path) -> dict[str, Any]:
    """Draw what `gaussians_of` gives; what the JSON document of `igpt attention` says of it."""
    gaussian_figure(gaussians, path, f"{run.name}: where each head looks")
    layers = [{"layer": k, "centres": c.tolist(), "covariances": s.tolist()} for k, (c, s) in gaussians.items()]
    return {"layers": layers}


def draw_maps(
    run: ModelDir,
    split: TokenSplit,
    rows: np.ndarray,
    layers: Sequence[int],
    path: Path,
    *,
    heads: Sequence[int] | None = None,
    pixel: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw what one pixel of some images looks at (`attention_maps`); what the JSON document says of it.

    Args:
        rows: (n,) the images' rows in the split.
        heads: which are drawn; None for all.
        pixel: (row, column); None for the middle.

    Raises:
        InputError: the model has no such head.
    """
    (values, decode), R = inputs_of(run, split), run.config["model"]["resolution"]
    looks = attention_maps(run, values[rows], layers, pixel=pixel, decode=decode, progress=progress)
    known = min(look.maps.shape[1] for look in looks.values())
    heads = list(range(known)) if heads is None else heads
    if heads[-1] >= known:
        raise InputError(f"head {heads[-1]} requested; {run.name} has the heads 0 to {known - 1}")
    pixel = pixel or (R // 2, R // 2)
    title = f"{run.name}: what pixel {pixel[0]},{pixel[1]} looks at" + ("" if known == 1 else " in each head")
    note = "colours from 0 to each map's own highest probability; pale: cannot be seen; the red frame is the query"
    captions = [caption_of(split, row) for row in rows]
    map_figure(looks, split.images(rows), path, heads, pixel, captions, title, note)
    found = [
        {
            "layer": layer,
            "query": list(look.query),
            "highest": look.maps[:, heads].max((2, 3)).round(6).tolist(),
            "elsewhere": look.elsewhere[:, heads].round(6).tolist(),
        }
        for layer, look in looks.items()
    ]
    return {"pixel": list(pixel), "rows": rows.tolist(), "layers": found}


def draw_distances(
    run: ModelDir,
    split: TokenSplit,
    rows: np.ndarray,
    layers: Sequence[int],
    path: Path,
    images: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw how far heads look (`attention_distance`) in some `images`; what the JSON document says of it."""
    values, decode = inputs_of(run, split)
    found = attention_distance(run, values[rows], layers, decode=decode, progress=progress)
    distance_figure(found, path, f"{run.name} on {count(len(rows), 'image')} ({images})")
    by_layer = [{"layer": k, "mean": round(float(d.mean()), 4), "heads": d.round(4).tolist()} for k, d in found.items()]
    return {"rows": rows.tolist(), "layers": by_layer}
