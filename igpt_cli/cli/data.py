"""igpt data: make, fetch and look at images."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from igpt_cli.cli.options import Column, Folder, Json, Null, Quiet, Sources, StrictSource, group
from igpt_cli.cli.output import Voice, present, printable, result, table
from igpt_cli.cli.resolve import images_or_default
from igpt_cli.errors import InputError

app = group(
    "Images: make the embedded ones, fetch published ones, look at any.",
    "igpt data make embedded -o emoji",
    "igpt data fetch cifar10 -o downloads",
    "igpt data info photos/ --check",
)


@app.command("make")
def make(
    what: Annotated[str, Argument(metavar="embedded", help="What to make.")],
    out: Folder,
    resolution: Annotated[int, Option("--resolution", "-r", min=8, max=224, help="Side in pixels.")] = 64,
    quiet: Quiet = False,
) -> None:
    """Write the embedded images as PNG files, DIR/train/<group>/ and DIR/test/<group>/.

    They are 3,812 emoji on white: 1,906 characters as drawn for Noto Emoji and for Twemoji, in nine groups.

    \b
    Examples:
      igpt data make embedded -o emoji
      igpt data make embedded -o emoji-32 --resolution 32
    """
    from igpt_cli.images.embedded import write_embedded

    if what != "embedded":
        raise InputError(f"there is nothing called {what!r} to make; there is: embedded")
    voice = Voice(quiet)
    with voice.progress("writing") as progress:
        count = write_embedded(out, resolution, progress)
    voice.say(f"{count:,} images of {resolution} x {resolution}; look at them with: igpt data info {out}")
    result(out)


@app.command("fetch")
def fetch(
    name: Annotated[str, Argument(metavar="cifar10|cifar100|stl10", help="The data set.")],
    out: Folder,
    quiet: Quiet = False,
) -> None:
    """Download the official archive of CIFAR-10, CIFAR-100 or STL-10 into DIR, and check it.

    An interrupted download resumes where it stopped. The archive is used as it is; nothing is unpacked.

    \b
    Examples:
      igpt data fetch cifar10 -o downloads
      igpt palette fit downloads/cifar-10-python.tar.gz
    """
    from igpt_cli.images import fetch as library

    voice = Voice(quiet)
    with voice.progress(f"loading {name}", unit="bytes") as progress:
        path = library.fetch(name, out, library.ARCHIVES, progress)
    voice.say(f"checksum verified; next: igpt palette fit {path}")
    result(path)


@app.command("info")
def info(
    sources: Sources = None,
    check: Annotated[bool, Option("--check", help="Decode every image, and name those that are broken.")] = False,
    column: Column = None,
    strict: StrictSource = False,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a source of images holds: kind, splits, classes, sizes, broken images.

    What was guessed of splits and classes, and which images were dropped, is said; with --strict it is an error.

    \b
    Examples:
      igpt data info photos/
      igpt data info photos.tar --check
      find photos -name '*.jpg' | igpt data info - --json
    """
    from igpt_cli.images.inspect import inspect
    from igpt_cli.images.records import count

    voice = Voice(quiet)
    source = images_or_default(sources, null, voice, column, strict)
    with voice.progress("checking" if check else "reading") as progress:
        report = inspect(source, check, progress)
    if strict and report.bad:
        first = report.bad[0]
        raise InputError(f"{first['name']}: {first['reason']}; {count(len(report.bad), 'image')} cannot be read")
    present(report.to_dict(), printable(_text(report)), json)


def _text(report) -> str:
    """The report as text."""
    total = sum(report.splits.values())
    lines = [f"{report.description}: {report.kind}, {total:,} images", *report.notes]
    rows = [[name, *by_split.values()] for name, by_split in report.classes.items()]
    header = ["class" if rows else "", *report.splits]
    rows.append(["all", *report.splits.values()])
    lines += ["", table(rows, header)]
    commonest = [f"{size} ({n:,})" for size, n in list(report.sizes.items())[:5]]
    more = f" and {len(report.sizes) - 5:,} other sizes" if len(report.sizes) > 5 else ""
    looked = "" if report.looked_at == total else f", of the first {report.looked_at:,} images"
    if commonest:
        types = ", ".join(f"{kind} ({n:,})" for kind, n in report.types.items())
        lines += ["", f"sizes: {', '.join(commonest)}{more}{looked}", f"types: {types}"]
    if report.checked or report.bad:
        lines += ["", f"images that cannot be read: {len(report.bad):,} of {report.looked_at:,}"]
        lines += [f"  {b['name']}: {b['reason']}" for b in report.bad[:20]]
        if len(report.bad) > 20:
            lines.append(f"  and {len(report.bad) - 20:,} more; --json names all")
    return "\n".join(lines)
