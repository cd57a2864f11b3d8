"""Atomic writes: a reader finds the old file or the new one, whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from igpt_cli.errors import InputError, OutputError

#: Suffixes of pictures that can be written.
PICTURES = (".png", ".svg", ".pdf")
#: Errors of the system that are the user's to mend.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def check_output(path: Path | str, force: bool = False) -> Path:
    """Check the file to write before any work: it does not exist (unless `force`), and its folder can be made.

    Raises:
        OutputError: with the path, the reason and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, a file is to be written there; choose another --out")
    target = target_of(path)
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another --out, or overwrite it with --force")
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise OutputError(f"cannot write {path}: {e.filename} is not a folder; choose another --out") from e
    except OSError as e:
        raise OutputError(f"cannot make the folder {folder} for {path.name}: {reason(e)}") from e
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {folder.resolve()}")
    return path


def target_of(path: Path | str) -> Path:
    """The file that an output replaces: `path`, or the target of a link, so that the link stays.

    Raises:
        OutputError: it is a device, a pipe or a socket, or the link leads in a circle.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OutputError(f"{path} is a link that leads in a circle; choose another --out") from e
        return path  # making its folder shows the problem
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise OutputError(f"{path} is a {kind}, which a file does not replace; choose another --out")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_outputs(outputs: Mapping[str, tuple[Path | None, Sequence[str]]], force: bool = False) -> None:
    """Check all files that a command is to write before any work, each as `check_output` does.

    Args:
        outputs: {option: (the path or None, the suffixes that it may have; none for any)}.

    Raises:
        InputError: a suffix that cannot be written, or the same file twice.
        OutputError: as `check_output`.
    """
    paths = [path for path, _ in outputs.values() if path is not None]
    for option, (path, suffixes) in outputs.items():
        if path is not None and suffixes and path.suffix.lower() not in suffixes:
            *others, last = suffixes
            known = f"{', '.join(others)} or {last}" if others else last
            raise InputError(f"{option} {path} ends in {path.suffix!r}; a {known} file is written")
    for path in paths:
        check_output(path, force)
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("two outputs have the same name; give each its own: " + ", ".join(map(str, paths)))


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary name in the folder of `path`; after the block, the file is synced and renamed to `path`.

    A link stays, and its target is replaced (`target_of`). If the block raises (Ctrl-C included), the temporary file is
    removed and `path` is unchanged.

    >>> with replacing("palette.npz") as part:
    ...     part.write_bytes(b"...")
    """
    path = target_of(path)
    # The suffix stays last: NumPy and Pillow use it.
    part = path.with_name(f".{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:6]}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as e:
        if e.errno in (*_REFUSED, errno.EISDIR, errno.ENOENT):
            raise OutputError(f"cannot write {path}: {reason(e)}") from e
        raise
    finally:
        part.unlink(missing_ok=True)


def check_folder(path: Path | str, marker: str, force: bool = False) -> Path:
    """Check the folder to write before any work.

    Args:
        marker: a file that every such folder has; `force` replaces only a folder that has it.

    Raises:
        OutputError: with the path, the reason and what to do.
    """
    path = Path(path)
    if path.exists():
        if not force:
            raise OutputError(f"{path} exists already; choose another --out, or overwrite it with --force")
        if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
            raise OutputError(f"{path} has no {marker}, so it is something else, and --force does not overwrite it")
        if path.resolve() == Path.cwd():
            raise OutputError(f"{path} is the current folder, which cannot be replaced; choose another --out")
    check_output(path / marker, force=True)
    if not any(path.iterdir()):
        path.rmdir()  # `check_output` made it; it is to appear when complete
    return path


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """An empty folder next to `path`, which replaces it after the block.

    If the block raises (Ctrl-C included), the new folder is removed and `path` is unchanged.
    """
    path = target_of(path)
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:6]}"
    part, old = path.with_name(f".{path.name}.{unique}.part"), path.with_name(f".{path.name}.{unique}.old")
    try:
        part.mkdir()
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
        sync_folder(path.parent)
    except OSError as e:
        if old.exists() and not path.exists():
            old.rename(path)
        if e.errno in _REFUSED:
            raise OutputError(f"cannot write {path}: {reason(e)}") from e
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def reason(e: OSError) -> str:
    """The system's reason, without the errno number: "No space left on device"."""
    return e.strerror or str(e)


def require_file(path: Path | str, what: str) -> Path:
    """Check that `path` is a readable file; `what` names it in the error ("a palette", "a token file").

    Raises:
        InputError: it does not exist, is a folder, a pipe or a device, or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {wrong}; {what} was expected there")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission")
    return path


def proc_bytes(path: str, name: str) -> int | None:
    """The bytes that a file such as /proc/meminfo states in kB under a name; None if it does not."""
    with suppress(OSError, ValueError, StopIteration), open(path, encoding="ascii") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith(name + ":")))
    return None


def sha256_of(*chunks: bytes | memoryview) -> str:
    """Hexadecimal SHA-256 of the chunks one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return sha256_of(*iter(lambda: file.read(2**20), b""))
