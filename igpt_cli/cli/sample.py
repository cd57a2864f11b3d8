"""igpt sample"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from igpt_cli.cli.options import Device, Force, Json, Out, Quiet, Run, Seed
from igpt_cli.cli.output import Voice, result, result_json

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.sampling.draw import Chances
    from igpt_cli.sampling.generate import Drawn

#: A grid of more images than this shows none of them well.
MOST_SHOWN = 400
#: Training images beside each sample.
NEAREST = 3

Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0,
        help="Logits are divided by it: 1 draws from the model's own probabilities, lower ones favour likely colours, "
        "0 takes the likeliest.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=1, metavar="K", help="Draw only from the K likeliest colours. Default: from all."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Draw only from the likeliest colours that together have probability P. Default: from all.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds", min=1, metavar="N", help="BERT: fill the image in N rounds, the surest pixels first.  [default: 32]"
    ),
]
Gif = Annotated[Path | None, typer.Option("--gif", metavar="GIF", help="Show how the images are filled.")]
Npz = Annotated[Path | None, typer.Option("--npz", metavar="NPZ", help="Write tokens and images as NumPy arrays.")]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images at a time. Default: what suits the device.", show_default=False),
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="float32|bfloat16|auto", help="bfloat16 is faster on GPUs and rounds.")
]


def sample(
    run: Run = None,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many images.")] = 16,
    out: Out = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    first: Annotated[
        int, typer.Option("--first", min=0, metavar="I", help="Number of the first image: image I of a seed is fixed.")
    ] = 0,
    rounds: Rounds = None,
    nearest: Annotated[
        str | None,
        typer.Option("--nearest", metavar="T", help="Beside each sample, the nearest training images of T."),
    ] = None,
    gif: Gif = None,
    npz: Npz = None,
    batch_size: BatchSize = None,
    precision: Precision = "float32",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw new images from a model, and show them as a grid.

    \b
    Examples:
      igpt sample
      igpt sample builtin:igpt-tiny -n 4 -o grid.png
      igpt sample runs/igpt-s-1 -n 16 --temperature 0.95 --gif filling.gif
      igpt sample runs/igpt-s-1 -n 8 --nearest data/tokens-32.h5 -o nearest.png
      igpt sample runs/igpt-s-1 -n 50000 --npz samples.npz --precision auto

    As in the paper, colours are drawn from the model's own probabilities unless --temperature, --top-k or --top-p say
    otherwise; all settings are written into the picture. Image I of a --seed is the same image whatever is drawn with
    it, so --first goes on where another command ended. A BERT model fills an empty image, of which it saw none in
    training: it is made for igpt complete.

    --nearest shows how near the samples are to images that the model was trained on: the distance is the root mean
    squared difference of red, green and blue in 0..255, and a copy is marked.

    Default: samples/sample-<n>.png in the run's folder, or in the current one for a built-in model.
    """
    voice = Voice(quiet)
    import time

    from igpt_cli.cli.resolve import name_of, run_or_default
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import check_predicts_pixels, load_model
    from igpt_cli.sampling.draw import Chances
    from igpt_cli.sampling.generate import sample as library

    chances = Chances(temperature, top_k, top_p)
    model = load_model(run_or_default(run, voice), choose_device(device))
    check_predicts_pixels(model)
    training = nearest and open_training(nearest, model)
    out = output_or_default(out, model, "sample", voice)
    check_drawn(out, gif, npz, force)
    started = time.monotonic()
    with voice.progress("drawing", "pixels") as progress:
        drawn = library(
            model,
            n,
            seed=seed,
            first=first,
            chances=chances,
            rounds=rounds,
            precision=precision,
            batch_size=batch_size,
            progress=progress,
        )
    settings, of = settings_of("sample", model, drawn, chances, seed, first=first), ""
    say_drawn(voice, model, drawn, n, time.monotonic() - started)
    document: dict[str, Any] = {"path": str(out), "gif": gif and str(gif), "npz": npz and str(npz), **settings}
    side = model.config["model"]["resolution"]
    images = model.own_palette.dequantize(drawn.tokens.reshape(n, side, side))
    from igpt_cli.sampling.pictures import GAP, SPACE, beside_nearest, captioned, grid, write_npz, write_picture

    if n > MOST_SHOWN:
        voice.say(f"the picture shows the first {MOST_SHOWN:,} of {n:,} images" + ("" if npz else "; --npz keeps all"))
    shown = images[:MOST_SHOWN]
    if training:
        from igpt_cli.sampling.nearest import nearest as find

        with voice.progress("looking for the nearest", "training images") as progress:
            found = find(drawn.tokens, model.own_palette, training, NEAREST, progress)
        names = [[training.names[row] for row in rows] for rows in found.rows]
        settings = settings | {"nearest": str(nearest)}
        of = f"training images: {name_of(str(nearest))}"
        picture = beside_nearest(shown, found.images[:MOST_SHOWN], found.distances[:MOST_SHOWN], names[:MOST_SHOWN])
        document |= {"nearest": _nearest(found, names)}
        copies = int(found.copies.sum())
        voice.say(
            f"nearest of {len(training):,} training images: distance {found.distances[:, 0].min():.1f} to "
            f"{found.distances[:, 0].max():.1f}; {copies:,} of {n:,} samples are copies"
        )
    else:
        picture = grid(shown)
    write_picture(captioned(picture, caption(settings, of), SPACE if training else GAP), out, settings)
    if gif is not None:
        from igpt_cli.sampling.gif import raster_gif

        raster_gif(shown, drawn.order[:MOST_SHOWN], gif, settings)
        voice.say(f"drawn: {gif}")
    if npz is not None:
        write_npz(npz, drawn.tokens, images, settings)
        voice.say(f"written: {npz}")
    if json:
        result_json(document)
    else:
        result(out)


def open_training(path: str, model: ModelDir):
    """The split "train" of a token file, or its first: what samples are compared with."""
    from igpt_cli.errors import MismatchError
    from igpt_cli.tokens.store import open_tokens

    file, side = open_tokens(path), model.config["model"]["resolution"]
    if file.resolution != side:
        raise MismatchError(
            f"{path} has images of {file.resolution}x{file.resolution}, {model.run} draws {side}x{side}; --nearest "
            "needs the same resolution"
        )
    return file.split("train" if "train" in file.splits else next(iter(file.splits)))


def _nearest(found, names: list[list[str]]) -> list[list[dict]]:
    return [
        [{"row": int(r), "name": name, "distance": round(float(d), 3)} for r, name, d in zip(rows, some, distances)]
        for rows, some, distances in zip(found.rows, names, found.distances)
    ]


def output_or_default(out: Path | None, model: ModelDir, stem: str, voice: Voice) -> Path:
    """The picture named, or the first free samples/<stem>-<n>.png of the run; a built-in model's lie in ./samples."""
    if out is not None:
        return out
    from igpt_cli.workspace import BUILTIN, CHECKPOINTS

    home = model.path.parent.parent if model.path.parent.name == CHECKPOINTS else model.path
    folder = Path("samples") if model.run.startswith(BUILTIN) else home / "samples"
    n = 1
    while (folder / f"{stem}-{n}.png").exists():
        n += 1
    voice.default("out", folder / f"{stem}-{n}.png")
    return folder / f"{stem}-{n}.png"


def check_drawn(out: Path, gif: Path | None, npz: Path | None, force: bool) -> None:
    """What samples and completions are written to, checked before any work."""
    from igpt_cli.files import check_outputs
    from igpt_cli.images.pictures import PIXELS

    check_outputs({"--out": (out, PIXELS), "--gif": (gif, (".gif",)), "--npz": (npz, (".npz",))}, force)


def settings_of(
    command: str, model: ModelDir, drawn: Drawn, chances: Chances, seed: int, **more: Any
) -> dict[str, Any]:
    """How the images were made, as the picture and the JSON document tell."""
    sizes = model.config["model"]
    return {
        "command": command,
        "model": model.name,
        "run": model.run,
        "steps": model.config.get("result", {}).get("steps"),
        "objective": drawn.objective,
        "resolution": sizes["resolution"],
        "palette_sha256": model.own_palette.sha256,
        "seed": seed,
        **more,
        **chances.to_dict(),
        "rounds": drawn.rounds,
        "order": "raster" if drawn.objective == "ar" else "surest first",
        "precision": drawn.precision,
        "device": drawn.device,
        "batch_size": drawn.batch_size,
        "n": len(drawn.tokens),
    }


def caption(settings: dict[str, Any], of: str = "") -> str:
    """What stands below a picture: the model, how it drew, and of what the images are.

    >>> caption({"model": "igpt-s", "steps": 1000, "temperature": 1.0, "top_k": 50, "top_p": None, "seed": 0}, "cats")
    'igpt-s after 1,000 steps; temperature 1, top-k 50, seed 0; cats'
    """
    model = settings["model"] + (f" after {settings['steps']:,} steps" if settings["steps"] else "")
    how = [f"temperature {settings['temperature']:g}"]
    how += [f"{name} {settings[key]:g}" for key, name in (("top_k", "top-k"), ("top_p", "top-p")) if settings[key]]
    return "; ".join([model, ", ".join([*how, f"seed {settings['seed']}"]), *([of] if of else [])])


def say_drawn(voice: Voice, model: ModelDir, drawn: Drawn, n: int, seconds: float) -> None:
    """What was done, in one line."""
    how = "pixel by pixel" if drawn.objective == "ar" else f"in at most {drawn.rounds} rounds"
    voice.say(
        f"{model.name}, {drawn.objective}: {n:,} {'image' if n == 1 else 'images'} drawn {how} on {drawn.device} in "
        f"{seconds:.1f} s ({n / max(seconds, 1e-9):.2f} images/s)"
    )
