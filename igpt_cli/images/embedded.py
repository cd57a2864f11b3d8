"""The embedded images: 3,812 emoji of 64 x 64 pixels.

1,906 characters, each as drawn for Google's Noto Emoji and for Twemoji, on white, in nine groups (Unicode's). One
character in five is in the split "test", in both drawings and with its variants by gender and direction.
`data/emoji/README.md` names sources and licences, `data/emoji/make.py` makes the archive.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from igpt_cli.errors import OutputError
from igpt_cli.files import check_output, reason
from igpt_cli.images.archives import ArchiveSource, Zip
from igpt_cli.images.records import Progress
from igpt_cli.images.transforms import Preprocess, prepare
from igpt_cli.workspace import shipped

#: Side of the stored images in pixels.
SIDE = 64


class EmbeddedSource(ArchiveSource):
    """The embedded emoji: splits "train" and "test", shuffled, so that the first images are a random sample."""

    kind = "embedded"

    def __init__(self):
        super().__init__("embedded", [Zip(shipped("emoji") / "emoji.zip")], ["emoji"])
        self.kind = EmbeddedSource.kind


def write_embedded(folder: Path, resolution: int = SIDE, progress: Progress | None = None) -> int:
    """Write the embedded images as PNG files, `folder`/train/<group>/<name>.png and `folder`/test/....

    Args:
        folder: made when it is complete.
        resolution: side of the images in pixels, 1..224; `SIDE` writes them as they are stored.
        progress: called with (images done, images in all).

    Returns the number of images.

    Raises:
        OutputError: the folder exists already, or cannot be written.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already; choose another --out")
    check_output(folder)
    source, preprocess = EmbeddedSource(), Preprocess(resolution)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as part:
            for done, record in enumerate(source.records(), 1):
                path = Path(part, "images", record.name).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(prepare(record.data, preprocess, record.name)).save(path)
                if progress:
                    progress(done, len(source))
            Path(part, "images").rename(folder)
    except OSError as e:
        raise OutputError(f"cannot write {folder}: {reason(e)}") from e
    return len(source)
