"""Default paths in the workspace, the current folder.

data/palette.npz          the palette
data/tokens-<R>.h5        tokens at model resolution R
data/features-<run>.h5    features of a run's layers
runs/<name>/              one folder a run
runs/latest               text file with the name of the newest run
<run>/checkpoints/best    text file with the name of the checkpoint that has the lowest validation loss
builtin:<name>            a model that ships with igpt
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from igpt_cli.errors import InputError, OutputError
from igpt_cli.files import reason, replacing

PALETTE = Path("data/palette.npz")
RUNS = Path("runs")
LATEST = RUNS / "latest"
BUILTIN = "builtin:"
CHECKPOINTS, BEST = "checkpoints", "best"


def tokens_path(resolution: int) -> Path:
    """data/tokens-32.h5 for resolution 32."""
    return Path(f"data/tokens-{resolution}.h5")


def features_path(run: Path) -> Path:
    """data/features-igpt-s-1.h5 for runs/igpt-s-1, data/features-igpt-s-1-step-500.h5 for its checkpoint."""
    run = run.resolve()
    name = f"{run.parent.parent.name}-{run.name}" if run.parent.name == CHECKPOINTS else run.name
    return Path(f"data/features-{name}.h5")


def default_tokens() -> Path:
    """The one token file of the workspace. Raises InputError: there is none, or more than one."""
    files = sorted(p for p in Path("data").glob("tokens-*.h5") if re.fullmatch(r"tokens-\d+\.h5", p.name))
    if not files:
        raise InputError("no token file given and none at data/tokens-<R>.h5; run `igpt tokenize` first")
    if len(files) > 1:
        raise InputError(f"no token file given and several in data/: {', '.join(map(str, files))}; name one of them")
    return files[0]


def shipped(what: str) -> Path:
    """The folder of the shipped "models" or "emoji", in an installed wheel or a source tree."""
    package = Path(__file__).parent
    installed = package / "data" / what
    return installed if installed.is_dir() else package.parent / "data" / what


def builtin_models() -> dict[str, Path]:
    """{name: folder} of the models that ship with igpt."""
    return {p.parent.name: p.parent for p in sorted(shipped("models").glob("*/config.json"))}


def name_of_run(path: Path) -> str:
    """The name of a model directory: "builtin:<name>" if it ships with igpt, else its path."""
    return next((BUILTIN + name for name, folder in builtin_models().items() if folder == path), str(path))


@contextmanager
def new_run(stem: str) -> Iterator[Path]:
    """Make the first free folder of runs/<stem>-1, runs/<stem>-2, ...; remove it after the block if it is empty."""
    try:
        RUNS.mkdir(exist_ok=True)
        taken = [int(m[1]) for p in RUNS.glob(f"{stem}-*") if (m := re.fullmatch(re.escape(stem) + r"-(\d+)", p.name))]
        for number in count(max(taken, default=0) + 1):
            run = RUNS / f"{stem}-{number}"
            with suppress(FileExistsError):
                run.mkdir()
                break
    except OSError as e:
        problem = f"cannot make a folder for the run in {RUNS.resolve()}: {reason(e)}"
        raise OutputError(f"{problem}; name one with --out") from e
    try:
        yield run
    finally:
        with suppress(OSError):
            run.rmdir()


@contextmanager
def as_latest(run: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that lets runs/latest name this run; restore the old name if the run is gone after."""
    before = LATEST.read_bytes() if LATEST.is_file() else None
    try:
        yield lambda: set_latest(run)
    finally:
        if not run.exists() and LATEST.is_file() and LATEST.read_bytes() == f"{run.name}\n".encode():
            if before is None:
                LATEST.unlink()
            else:
                with replacing(LATEST) as part:
                    part.write_bytes(before)


def set_latest(run: Path) -> None:
    """Let runs/latest name this run, if it is in the workspace's runs/."""
    if run.parent.resolve() == RUNS.resolve():
        with replacing(LATEST) as part:
            part.write_text(run.name + "\n", encoding="utf-8")


def name_in(path: Path) -> str:
    """The name in a file such as runs/latest or checkpoints/best.

    Raises:
        OSError: it cannot be read.
        InputError: it holds no name of a folder.
    """
    try:
        name = path.read_bytes().decode("utf-8").strip()
    except UnicodeDecodeError:
        name = "\n"
    if not name.isprintable() or len(name.encode()) > 255:
        raise InputError(f"{path} does not hold the name of a folder; remove it, or write the name into it")
    return name


def latest_run() -> Path:
    """The run that runs/latest names. Raises InputError: there is none, or it is gone."""
    try:
        name = name_in(LATEST)
    except OSError:
        raise InputError(
            "no run given and runs/latest names none; run `igpt pretrain` first, or use builtin:igpt-tiny"
        ) from None
    run = RUNS / Path(name).name
    if not name or not run.is_dir():
        raise InputError(f"runs/latest names {name!r}, and there is no folder {run}; name a run")
    return run


def resolve_run(run: str | Path) -> Path:
    """The model directory of a RUN argument: a folder, a run's checkpoints/best, "latest", or "builtin:<name>".

    Raises:
        InputError: there is no such folder or built-in model; the message lists the known ones.
    """
    text = str(run)
    if text.startswith(BUILTIN):
        built_in = builtin_models()
        if (name := text.removeprefix(BUILTIN)) in built_in:
            return built_in[name]
        listing = ", ".join(BUILTIN + n for n in built_in) or "none"
        raise InputError(f"there is no built-in model {text!r}; the built-in models: {listing}")
    path = Path(run)
    if path == LATEST or (text == "latest" and not path.exists()):
        return latest_run()
    if path.name == BEST and path.parent.name == CHECKPOINTS and path.is_file():
        return path.parent / Path(name_in(path)).name
    if not path.exists():
        runs = sorted(p.parent.name for p in RUNS.glob("*/config.json"))
        known = f"runs here: {', '.join(runs)}" if runs else "there are no runs here yet (`igpt pretrain` makes one)"
        raise InputError(f"there is no run {text}; {known}")
    return path
