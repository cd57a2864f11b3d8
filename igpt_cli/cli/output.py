"""Output: results to stdout, messages and progress to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: Called by long library functions with (done, total).
Progress = Callable[[int, int], None]


def result(text: object) -> None:
    """Print a result to stdout, at once, so that a closed pipe is noticed here."""
    print(text, flush=True)


def result_json(document: Any) -> None:
    """Print one JSON document to stdout; bytes of a path that are no UTF-8 are written as \\udc80..\\udcff."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    result(text.encode("utf-8", "backslashreplace").decode())


def present(document: Any, text: object, json: bool) -> None:
    """Print a command's result: its JSON document with `json`, or else its text."""
    if json:
        result_json(document)
    else:
        result(text)


def printable(text: object) -> str:
    """Text for a terminal: what cannot be shown, or would steer it, is escaped; line breaks stay.

    >>> printable("cat\x1b[31m")
    'cat\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows as aligned text: columns of numbers to the right, others to the left.

    >>> print(table([["igpt-s", 24], ["igpt-m", 36]], ["name", "layers"]))
    name    layers
    igpt-s      24
    igpt-m      36
    """
    numeric = [bool(rows) and all(isinstance(r[i], (int, float)) for r in rows) for i in range(len(header))]
    cells = [list(header)] + [[_cell(v) for v in r] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    lines = ("  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(r, widths, numeric)) for r in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else printable(value).replace("\n", "\\n")


class Voice:
    """Messages and progress on stderr; silent with `quiet`."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One note on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def show(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Images (H, W, 3) uint8 of one size on stderr, where it is a terminal of 24-bit colours."""
        from igpt_cli.cli.preview import previews, room, true_colour

        if not self.quiet and true_colour(sys.stderr):
            print(previews(images, captions, room()), file=sys.stderr, flush=True)

    def default(self, what: str, taken: object) -> None:
        """Say which default of the workspace was taken: "tokens: data/tokens-32.h5 (default)"."""
        self.say(f"{what}: {taken} (default)")

    @contextmanager
    def progress(self, label: str, unit: str = "images") -> Iterator[Progress]:
        """A callback (done, total) that draws a bar on a terminal, or else a plain line every ten seconds."""
        if self.quiet:
            yield lambda done, total: None
        elif self.terminal:
            with self._bar(label, unit) as advance:
                yield advance
        else:
            yield self._lines(label, unit)

    @contextmanager
    def _bar(self, label: str, unit: str) -> Iterator[Progress]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, started = bar.add_task(label, total=1, rate=""), time.monotonic()

            def advance(done: int, total: int) -> None:
                rate = done / max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=done, total=total, rate=f"{rate:,.0f}/s" if done else "")

            yield advance

    def _lines(self, label: str, unit: str, every: float = 10.0) -> Progress:
        started = said = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= every and done < total:
                said = now
                rate = done / (now - started)
                left = f", {(total - done) / rate:,.0f} s left" if rate else ""
                self.say(f"{label}: {done:,}/{total:,} {unit}, {rate:,.0f}/s{left}")

        return advance


def interval(bounds: Sequence[float]) -> str:
    """
    >>> interval([53.04, 66.1])
    '53.0-66.1'
    """
    return "{:.1f}-{:.1f}".format(*bounds)


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(5400), duration(200_000)
    ('75 s', '90 min', '55.6 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def bars(values: Sequence[float], full: float, width: int = 24) -> list[str]:
    """Each value as a bar of text, `full` being `width` characters.

    >>> bars([50.0, 100.0], 100.0, width=4)
    ['██', '████']
    """
    eighths = " ▏▎▍▌▋▊▉"
    out = []
    for value in values:
        whole, part = divmod(round(8 * width * max(0.0, min(value / full, 1.0))), 8)
        out.append("█" * whole + (eighths[part] if part else ""))
    return out


class BadImages:
    """Names the first images that cannot be read, as they occur."""

    #: More are not named, only counted.
    NAMED = 20

    def __init__(self, voice: Voice):
        self.voice, self.n = voice, 0

    def __call__(self, name: str, reason: str) -> None:
        self.n += 1
        if self.n <= self.NAMED:
            self.voice.say(f"excluded {name}: {reason}")
        elif self.n == self.NAMED + 1:
            self.voice.say("more images are excluded; they are counted at the end")

    def say_how_many(self) -> None:
        """Say how many there were, if any."""
        if self.n:
            self.voice.say(f"excluded {self.n:,} image{'s' if self.n > 1 else ''} in all")
