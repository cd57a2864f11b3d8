"""Which file a command works on: what was named, or the workspace's default, which is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from igpt_cli.cli.output import Voice
from igpt_cli.errors import InputError
from igpt_cli.workspace import PALETTE, tokens_path

if TYPE_CHECKING:
    from igpt_cli.model_dir import ModelDir
    from igpt_cli.palette.palette import Palette
    from igpt_cli.tokens.store import TokenFile


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


@contextmanager
def open_tokens_or_images(
    source: str, palette: Callable[[], Palette], resolution: int, voice: Voice
) -> Iterator[TokenFile]:
    """An open token file: the one named, or one made on the way from images, with a progress bar."""
    from igpt_cli.tokens.anything import is_token_file, tokens_from

    if is_token_file(source):
        with tokens_from(source, palette, resolution) as file:
            yield file
        return
    with voice.progress("quantizing") as progress, tokens_from(source, palette, resolution, progress=progress) as file:
        yield file


def run_or_default(run: str | None, voice: Voice) -> str:
    """The run named, or the newest."""
    if run is not None:
        return run
    from igpt_cli.workspace import latest_run

    path = str(latest_run())
    voice.default("run", path)
    return path


def tokens_of(run: ModelDir, voice: Voice) -> str:
    """What a run is tried on when nothing is named: its own token file, or the workspace's, or the embedded images.

    Raises:
        InputError: the run was not trained on the embedded images and no token file can be found.
    """
    data = run.config.get("data", {})
    named = data.get("path")
    workspace = str(tokens_path(run.config["model"].get("resolution", 32)))
    for path in (named, workspace):
        if path and Path(path).is_file() and not str(run.path).endswith(f"models/{run.path.name}"):
            voice.default("tokens", path)
            return path
    if data.get("source") == "embedded":
        voice.default("images", "embedded")
        return "embedded"
    raise InputError(
        f"no token file given; {run.path} was trained on {named}, which is not here, and there is no {workspace}; "
        f"name a token file or images"
    )
