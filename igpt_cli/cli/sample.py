"""igpt sample"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from igpt_cli.cli.options import BatchSize, Device, Force, Json, Out, Precision, Quiet, Run, Seed
from igpt_cli.cli.output import Voice, present
from igpt_cli.files import check_outputs

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.sampling.generate import Drawn
    from igpt_cli.sampling.write import Outputs

#: Training images shown with each sample.
NEAREST = 3

Temperature = Annotated[
    float,
    Option(
        "--temperature", min=0, help="Logits are divided by it; below 1 favours likely colours, 0 takes the likeliest."
    ),
]
TopK = Annotated[
    int | None, Option("--top-k", min=1, metavar="K", help="Draw only from the K likeliest colours. Default: from all.")
]
TopP = Annotated[
    float | None,
    Option("--top-p", metavar="P", help="Draw from the likeliest colours of total probability P. Default: from all."),
]
Rounds = Annotated[
    int | None,
    Option("--rounds", min=1, metavar="N", help="BERT: fill in N rounds, the surest pixels first.  [default: 32]"),
]
Gif = Annotated[Path | None, Option("--gif", metavar="GIF", help="Show how the images are filled.")]
Npz = Annotated[Path | None, Option("--npz", metavar="NPZ", help="Write tokens and images as NumPy arrays.")]


def sample(
    run: Run = None,
    n: Annotated[int, Option("-n", "--number", min=1, help="How many images.")] = 16,
    out: Out = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    first: Annotated[
        int, Option(min=0, metavar="I", help="Number of the first image: image I of a seed is fixed.")
    ] = 0,
    rounds: Rounds = None,
    nearest: Annotated[
        str | None, Option(metavar="T", help="Show with each sample the nearest training images of T.")
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
    """Sample new images from a model, and show them as a grid.

    \b
    Examples:
      igpt sample
      igpt sample builtin:igpt-tiny -n 4 -o grid.png
      igpt sample runs/igpt-s-1 -n 16 --temperature 0.95 --gif filling.gif
      igpt sample runs/igpt-s-1 -n 8 --nearest data/tokens-32.h5 -o nearest.png
      igpt sample runs/igpt-s-1 -n 50000 --npz samples.npz --precision auto

    As in the paper, colours are drawn from the model's own probabilities unless --temperature, --top-k or --top-p say
    otherwise; all settings are written into the picture. Image I of a --seed is the same image whatever is drawn with
    it, so --first continues where another command ended. A BERT model fills an empty image, of which it saw none in
    training: it is made for igpt complete.

    --nearest shows how near the samples are to images that the model was trained on: the distance is the root mean
    squared difference of red, green and blue in 0..255, and a copy is marked.

    Default: samples/sample-<n>.png in the run's folder, or in the current one for a built-in model.
    """
    voice = Voice(quiet)
    import time

    from igpt_cli.cli.resolve import name_of, picture_or_default, run_or_default
    from igpt_cli.device import choose_device
    from igpt_cli.model_dir import check_predicts_pixels, load_model
    from igpt_cli.sampling.draw import SamplingParams
    from igpt_cli.sampling.generate import sample as library
    from igpt_cli.sampling.nearest import nearest as find
    from igpt_cli.sampling.write import MOST_SHOWN, settings_of, training_split, write_samples

    params = SamplingParams(temperature, top_k, top_p)
    model = load_model(run_or_default(run, voice), choose_device(device))
    check_predicts_pixels(model)
    training = None if nearest is None else training_split(nearest, model)
    outputs = checked_outputs(picture_or_default(out, model, "sample", voice), gif, npz, force)
    how: dict[str, Any] = {"params": params, "rounds": rounds, "precision": precision, "batch_size": batch_size}
    started = time.monotonic()
    with voice.progress("drawing", "pixels") as progress:
        drawn = library(model, n, seed=seed, first=first, **how, progress=progress)
    settings, of = settings_of("sample", model, drawn, params, seed, first=first), ""
    say_drawn(voice, model, drawn, n, time.monotonic() - started)
    document, near = outputs.to_dict() | settings, None
    if n > MOST_SHOWN:
        voice.say(f"the picture shows the first {MOST_SHOWN:,} of {n:,} images" + ("" if npz else "; --npz keeps all"))
    if training is not None:
        with voice.progress("looking for the nearest", "training images") as progress:
            near = find(drawn.tokens, model.own_palette, training, NEAREST, progress)
        settings, of = settings | {"nearest": str(nearest)}, f"training images: {name_of(str(nearest))}"
        document |= {"nearest": near.to_dict(training)}
        voice.say(
            f"nearest of {len(training):,} training images: distance {near.distances[:, 0].min():.1f} to "
            f"{near.distances[:, 0].max():.1f}; {int(near.copies.sum()):,} of {n:,} samples are copies"
        )
    write_samples(model, drawn, outputs, settings, near, training, of)
    say_written(voice, outputs)
    present(document, outputs.picture, json)


def checked_outputs(picture: Path, gif: Path | None, npz: Path | None, force: bool) -> Outputs:
    """What samples and completions are written to, checked before any work."""
    from igpt_cli.images.pictures import PIXELS
    from igpt_cli.sampling.write import Outputs

    check_outputs({"--out": (picture, PIXELS), "--gif": (gif, (".gif",)), "--npz": (npz, (".npz",))}, force)
    return Outputs(picture, gif, npz)


def say_drawn(voice: Voice, model: ModelDir, drawn: Drawn, n: int, seconds: float) -> None:
    """What was done, in one line."""
    how = "pixel by pixel" if drawn.objective == "ar" else f"in at most {drawn.rounds} rounds"
    voice.say(
        f"{model.name}, {drawn.objective}: {n:,} {'image' if n == 1 else 'images'} drawn {how} on {drawn.device} in "
        f"{seconds:.1f} s ({n / max(seconds, 1e-9):.2f} images/s)"
    )


def say_written(voice: Voice, outputs: Outputs) -> None:
    """What was written in addition to the picture."""
    for path in (outputs.gif, outputs.npz):
        if path is not None:
            voice.say(f"written: {path}")
