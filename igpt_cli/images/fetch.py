"""Download a published data set: resumable, checksum verified."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from igpt_cli.errors import InputError, OutputError
from igpt_cli.files import reason
from igpt_cli.images.records import Progress

CHUNK = 2**18
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Archive:
    """An official archive: its address, and the MD5 that its publishers (or torchvision) state."""

    url: str
    md5: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


ARCHIVES: Mapping[str, Archive] = {
    "cifar10": Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": Archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "stl10": Archive("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0821fb"),
}


def fetch(
    name: str, folder: Path | str, archives: Mapping[str, Archive] = ARCHIVES, progress: Progress | None = None
) -> Path:
    """Download the official archive of a data set into a folder.

    An interrupted download stays in `<file>.part`, and the next call resumes it. A complete file is recognised by its
    checksum and not downloaded again.

    Args:
        name: "cifar10", "cifar100" or "stl10".
        folder: made if it does not exist.
        archives: {name: archive}.
        progress: called with (bytes done, bytes in all).

    Returns:
        The archive's path, for `open_source`.

    Raises:
        InputError: no such data set, no network, an error from the server, or a wrong checksum.
        OutputError: the folder cannot be written, or another file of that name is there.
    """
    if name not in archives:
        raise InputError(f"there is no data set {name!r} to fetch; there are {', '.join(archives)}")
    archive, folder = archives[name], Path(folder)
    path = folder / archive.file_name
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if path.is_file() and _md5(path) == archive.md5:
                return path
            raise OutputError(f"{path} exists and is not the published file (its MD5 is another); move it away")
        _download(archive.url, part, progress)
        if (found := _md5(part)) != archive.md5:
            part.unlink()
            raise InputError(
                f"{archive.url} gave a file with MD5 {found}, published is {archive.md5}; it was deleted, try again"
            )
        os.replace(part, path)
    except urllib.error.HTTPError as e:
        raise InputError(f"{archive.url}: the server answered {e.code} {e.reason}; nothing was loaded") from e
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        raise InputError(_no_network(archive, folder, part, e)) from e
    except OSError as e:
        raise OutputError(f"cannot write {path}: {reason(e)}") from e
    return path


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Download `url` into `part`, resuming it if it exists."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "igpt"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing is left to download; the checksum is checked next
            return
        raise
    with answer:
        if answer.status != 206:
            have = 0  # a server that cannot resume sends all of it
        total = have + int(answer.headers.get("Content-Length") or 0)
        with open(part, "ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, max(total, have))
    if have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _no_network(archive: Archive, folder: Path, part: Path, e: Exception) -> str:
    why = getattr(e, "reason", None) or ("it broke off" if isinstance(e, http.client.IncompleteRead) else e)
    why = why.strerror or str(why) if isinstance(why, OSError) else why or type(e).__name__
    kept = f" {part.stat().st_size:,} bytes are kept, the same command goes on behind them." if part.exists() else ""
    return (
        f"cannot load {archive.url}: {why}.{kept} Without a network: put {archive.file_name} into {folder} by other "
        "means, or work with the embedded images"
    )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
