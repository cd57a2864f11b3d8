"""Open a token file, or tokenize images into a temporary one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py

from igpt_cli.errors import IgptError, InputError
from igpt_cli.images.held_out import HeldOutSource, require_labelled
from igpt_cli.images.sources import open_source
from igpt_cli.images.subset import Select, SubsetSource
from igpt_cli.images.transforms import Preprocess
from igpt_cli.palette.palette import Palette
from igpt_cli.tokens.store import TokenFile, open_tokens
from igpt_cli.tokens.tokenize import tokenize

EMBEDDED = "embedded"
#: Unreadable images of a subset are replaced at most `ATTEMPTS` - 1 times.
ATTEMPTS = 20


def is_token_file(source: str | os.PathLike) -> bool:
    """Whether `source` is a token file: its content is HDF5, or its suffix says so (it may be damaged)."""
    path = Path(source)
    return path.is_file() and (path.suffix in (".h5", ".hdf5") or bool(h5py.is_hdf5(path)))


@contextmanager
def open_or_tokenize(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    palette: Callable[[], Palette],
    resolution: int | Preprocess,
    *,
    keep_rgb: bool = False,
    choose: Select | None = None,
    needs: Sequence[str] = (),
    column: str | None = None,
    test_part: float | None = None,
    seed: int = 0,
    on_note: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[TokenFile]:
    """Open a token file: `source` itself if it is one, or a temporary one made of images.

    Args:
        source: a token file, any image source, "embedded", or several image sources.
        palette: returns the palette for images; not called for a token file.
        resolution: the side of images in pixels, or how they are prepared.
        keep_rgb: store the images with their tokens.
        choose: selects the images to use before any is decoded, and replacements for unreadable ones; ignored for a
            token file.
        needs: the splits of images that must have labels; checked before any image is decoded.
        column: as for `open_source`.
        test_part, seed: the part of each class in "train" that becomes "test", for images without a split "test".
        on_note: called with each remark on the images.
        progress: called with (images done, images in all).
        on_bad: called with (name, reason) for each image that cannot be read.

    Raises:
        InputError: the path does not exist, is neither a token file nor an image source, or the images lack labels or
            splits. No message names the temporary file, not even one raised while it is open.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    for each in sources:
        if str(each) != EMBEDDED and not Path(each).exists():
            raise InputError(f"{each} does not exist; a token file or images were expected there")
        if is_token_file(each) and len(sources) > 1:
            raise InputError(f"{each} is a token file, and {len(sources)} sources were given; give it alone, or images")
    if is_token_file(sources[0]):
        for option, value in (("--test-part", test_part), ("--column", column)):
            if value is not None:
                raise InputError(f"{option} is for images, and {sources[0]} is a token file; give it to igpt tokenize")
        yield open_tokens(sources[0])
        return
    images = open_source(sources, column)
    if test_part is not None:
        images = HeldOutSource(images, test_part, seed)
    if on_note:
        for note in images.notes:
            on_note(note)
    if needs:
        require_labelled(images, needs)
    if choose is not None:
        images = SubsetSource(images, choose)
    how = resolution if isinstance(resolution, Preprocess) else Preprocess(resolution)
    with tempfile.TemporaryDirectory(prefix="igpt-") as folder, _named(folder, images.description):
        out = Path(folder) / "tokens.h5"
        bad: set[str] = set()

        def count(name: str, reason: str) -> None:
            bad.add(name)
            if on_bad:
                on_bad(name, reason)

        for attempt in range(ATTEMPTS):
            known, error = len(bad), None
            try:
                tokenize(images, palette(), out, how, keep_rgb=keep_rgb, force=True, progress=progress, on_bad=count)
            except InputError as e:  # none can be read: others may be
                error = e
            last = attempt == ATTEMPTS - 1 or len(bad) == known
            if last or not (isinstance(images, SubsetSource) and images.replace(bad)):
                if error:
                    raise error
                break
        file = open_tokens(out)
        file.title = images.description
        yield file


@contextmanager
def _named(folder: str, title: str) -> Iterator[None]:
    """Errors name the images, not the temporary file made of them."""
    try:
        yield
    except IgptError as e:
        if folder in str(e):
            text = str(e).replace(str(Path(folder) / "tokens.h5"), title)
            at = f"a temporary folder (below {os.path.dirname(folder)}, which TMPDIR names)"
            e.args = (text.replace(folder, at),)
        raise
