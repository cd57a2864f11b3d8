"""Resolve the file to use: the named one, or the workspace's default, reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_cli.cli.output import BadImages, Voice
from igpt_cli.errors import InputError
from igpt_cli.workspace import BUILTIN, CHECKPOINTS, PALETTE, tokens_path

if TYPE_CHECKING:
    from igpt_cli.images.sources import Source
    from igpt_cli.images.subset import Select
    from igpt_cli.images.transforms import Preprocess
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.store import TokenFile, TokenSplit


def palette_or_default(path: str | Path | None, voice: Voice) -> Palette:
    """The palette named, or the workspace's.

    Raises:
        InputError: neither is there.
    """
    from igpt_cli.palette.palette import Palette

    if path is None:
        if not PALETTE.exists():
            raise InputError(f"no palette given and none at {PALETTE}; run `igpt palette fit` first, or give --palette")
        voice.default("palette", PALETTE)
        path = PALETTE
    return Palette.load(path)


def images_or_default(
    sources: list[str] | None, null: bool, voice: Voice, column: str | None = None, strict: bool = False
) -> Source:
    """The images named, those listed on stdin for "-", or the embedded ones.

    Raises:
        InputError: "-" among other sources, `null` without "-", no paths on stdin, or no images; with `strict`, images
            or what is known of them would be dropped or guessed.
    """
    import sys

    from igpt_cli.images.sources import open_source, paths_from

    named: Any = sources or []
    if null and "-" not in named:
        raise InputError("-0 (--null) is about paths on stdin; give the source '-' with it")
    if not named:
        voice.default("images", "embedded")
    if "-" in named:
        if len(named) > 1:
            raise InputError("'-' (paths on stdin) cannot be combined with other sources")
        if sys.stdin is None:
            raise InputError(
                "'-' reads paths from stdin, which is closed; write: find photos -name '*.jpg' | igpt ... -"
            )
        named = paths_from(sys.stdin.buffer, null)
    source = open_source(named, column)
    if strict and source.doubts:
        raise InputError(f"{source.description}: {'; '.join(source.doubts)}. Without --strict this is only said")
    return source


def tokens_or_default(path: Path | None, voice: Voice) -> Path:
    """The token file named, or the workspace's.

    Raises:
        InputError: none was named, and the workspace holds none or several.
    """
    from igpt_cli.workspace import default_tokens

    if path is None:
        path = default_tokens()
        voice.default("tokens", path)
    return path


@contextmanager
def open_for_model(
    source: str | list[str],
    run: ModelDir,
    voice: Voice,
    choose: Select | None = None,
    always: bool = False,
    test_part: float | None = None,
    column: str | None = None,
    seed: int = 0,
    **more: Any,
) -> Iterator[TokenFile]:
    """An open token file: the one named, or one of images as the model wants them (one source or several), with a bar.

    `choose` names the images that will be looked at; a model of RGB images, whose images may be large, has no others,
    and `always` no model. Images that the run was trained on are divided as they were then, unless `test_part` says
    otherwise. The rest is as in `open_or_tokenize`.
    """
    from igpt_cli.model_input import image_spec

    data = trained_on(run.config, source)
    more |= selection(data, test_part, column, seed)
    part = data.get("test_part"), data.get("test_seed", more["seed"])
    if data and more["test_part"] is not None and part != (more["test_part"], more["seed"]):
        other = "nothing" if part[0] is None else f"another part ({part[0]:g}, seed {part[1]})"
        voice.say(f"{run.run} was trained on {source} with {other} held out: it has seen some of these test images")
    how = image_spec(run)
    chosen = choose if always or getattr(run.model, "input_kind", None) == "rgb" else None
    with open_tokens_or_images(
        source, lambda: how.palette, how.preprocess, voice, keep_rgb=how.keep_rgb, choose=chosen, **more
    ) as file:
        yield file


def trained_on(config: Mapping[str, Any], source: str | Sequence[str]) -> dict[str, Any]:
    """The part "data" of a run's config.json if `source` is the images that it was trained on, or else nothing."""
    from igpt_cli.tokens.open_or_tokenize import is_token_file

    data = config.get("data") or {}
    same = isinstance(source, str) and data.get("path") and Path(source) == Path(data["path"])
    return data if same and not is_token_file(data["path"]) else {}


def selection(data: Mapping[str, Any], test_part: float | None, column: str | None, seed: int | None) -> dict[str, Any]:
    """How images are opened (`open_or_tokenize`): as requested, or else as the run with this `data` opened them."""
    if test_part is None:
        test_part, seed = data.get("test_part"), data.get("test_seed", seed)
    return {"test_part": test_part, "column": column or data.get("column"), "seed": seed or 0}


@contextmanager
def open_tokens_or_images(
    source: str | list[str], palette: Callable[[], Palette], resolution: int | Preprocess, voice: Voice, **how: Any
) -> Iterator[TokenFile]:
    """An open token file: the one named, or one made on the way from images (one source or several), with a bar."""
    from igpt_cli.tokens.open_or_tokenize import is_token_file, open_or_tokenize

    if is_token_file(source if isinstance(source, str) else source[0]):
        given: dict[str, Any] = {k: how.get(k) for k in ("test_part", "column")}
        with open_or_tokenize(source, palette, resolution, **given) as file:
            yield file
        return
    bad = BadImages(voice)
    with ExitStack() as stack:
        with voice.progress("quantizing") as progress:
            made = open_or_tokenize(
                source, palette, resolution, progress=progress, on_bad=bad, on_note=voice.say, **how
            )
            file = stack.enter_context(made)
        bad.say_how_many()
        yield file


def split_or_default(file: TokenFile, name: str | None, voice: Voice) -> TokenSplit:
    """The split named, or "test", or "val"."""
    from igpt_cli.evaluation.pixels import default_split

    if name is None:
        name = default_split(file)
        voice.default("split", name)
    return file.split(name)


def picture_or_default(out: Path | None, model: ModelDir, stem: str, voice: Voice) -> Path:
    """The picture named, or the first free samples/<stem>-<n>.png of the run; a built-in model's lie in ./samples."""
    if out is not None:
        return out
    home = model.path.parent.parent if model.path.parent.name == CHECKPOINTS else model.path
    folder = Path("samples") if model.run.startswith(BUILTIN) else home / "samples"
    n = 1
    while (folder / f"{stem}-{n}.png").exists():
        n += 1
    voice.default("out", folder / f"{stem}-{n}.png")
    return folder / f"{stem}-{n}.png"


def name_of(source: str | Path | Sequence[str]) -> str:
    """What a picture calls the images: the last part of a path, of several the first and how many more.

    >>> name_of("data/cifar.h5"), name_of(["cats/1.png", "cats/2.png", "dogs/"])
    ('cifar.h5', '1.png and 2 more')
    """
    first, *more = [source] if isinstance(source, (str, Path)) else source
    return Path(first).name + (f" and {len(more)} more" if more else "")


def run_or_default(run: str | None, voice: Voice) -> str:
    """The run named, or the newest."""
    if run is not None:
        return run
    from igpt_cli.workspace import latest_run

    path = str(latest_run())
    voice.default("run", path)
    return path


def tokens_of(run: ModelDir, voice: Voice) -> str:
    """What a run is used on when nothing is named: its own token file, or the workspace's, or the embedded images.

    Raises:
        InputError: the run was not trained on the embedded images and no token file can be found.
    """
    from igpt_cli.tokens.open_or_tokenize import is_token_file
    from igpt_cli.tokens.store import open_tokens

    data = run.config.get("data", {})
    named, workspace = data.get("path"), tokens_path(run.config["model"].get("resolution", 32))
    for path in (named, workspace):
        if not path or not Path(path).exists():
            continue
        # A file of another palette would only be refused later; the embedded images may still serve.
        any_palette = getattr(run.model, "input_kind", None) == "rgb"
        if not is_token_file(path) or any_palette or open_tokens(path).palette.sha256 == run.own_palette.sha256:
            voice.default("tokens" if is_token_file(path) else "images", path)
            return str(path)
    if data.get("source") == "embedded":
        voice.default("images", "embedded")
        return "embedded"
    if named is None:
        raise InputError(
            f"no images given, {run.run} does not say which it was trained on, and {workspace} is not here; name a "
            f"token file or images"
        )
    raise InputError(
        f"no token file given, and neither {named} (which {run.run} was trained on) nor {workspace} is here with the "
        f"palette of the model; name a token file or images"
    )
