"""The report: one self-contained HTML file on any number of runs.

Its content is in `page_run`, its sections in `page_sections`, its form in templates/page.html. The page loads
nothing, has one style and one script, page.css and page.js, which are allowed by their hashes, and works without the
script, but for sorting. Whatever a name holds is shown as text (`html`).
"""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

from igpt_cli import __version__
from igpt_cli.errors import InputError
from igpt_cli.files import check_output, replacing
from igpt_cli.images.records import brief
from igpt_cli.report import page_sections as sections
from igpt_cli.report.html import TEMPLATES
from igpt_cli.report.page_run import Account


def page(accounts: Sequence[Account], command: str | None = None) -> str:
    """The whole page.

    Args:
        accounts: of `page_run.read_runs`.
        command: what was typed to make it.

    Raises:
        InputError: no accounts.
    """
    if not accounts:
        raise InputError("no run to report on; name one or more")
    made = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), timezone.utc)
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    parts = (
        ("glance", "At a glance", sections.glance(accounts)),
        ("trained", "What was trained on what", sections.trained(accounts)),
        ("palette", "Palette", sections.palettes(accounts)),
        ("pictures", "Samples and completions", [account for account in accounts if account.pictures]),
        ("loss", "Loss", sections.losses(accounts)),
        ("layers", "What the layers know", sections.layers(accounts)),
        ("confusion", "What is taken for what", sections.confusion(accounts)),
        ("reproduce", "Commands to reproduce it", sections.commands(accounts, command)),
        ("hashes", "Versions and hashes", sections.hashes(accounts)),
    )
    return TEMPLATES.get_template("page.html").render(
        title=f"igpt report: {brief([account.name for account in accounts], 3)}",
        lead=_lead(accounts),
        created=made.strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        script=script,
        hash=_hash,
        sections=[part for part in parts if part[2] or part[0] == "palette"],
    )


def write_page(html: str, out: Path | str, force: bool = False) -> Path:
    """Write the page: the old file is there, or the new one, whole.

    Raises:
        OutputError: something is there already, or the place cannot be written.
    """
    out = check_output(out, force)
    with replacing(out) as part:
        part.write_text(html, encoding="utf-8", errors="backslashreplace")
    return out


def _hash(source: str) -> str:
    """What a policy allows a style or a script by."""
    return f"sha256-{b64encode(sha256(source.encode()).digest()).decode()}"


def _lead(accounts: Sequence[Account]) -> str:
    """The first sentence: how many runs, and the best probe where they can be compared."""
    n = len(accounts)
    said = f"{'A model' if n == 1 else f'{n:,} models'} and how {'it was' if n == 1 else 'they were'} trained."
    probed = [account for account in accounts if account.probe]
    if len({(a.probe or {}).get("images_sha256") for a in probed}) == 1:
        best = max(probed, key=lambda a: (a.probe or {})["accuracy"])
        found = best.probe or {}
        low, high = found["interval"]
        whose = "A linear probe of it gets" if n == 1 else f"The highest linear probe is that of {best.name}:"
        said += (
            f" {whose} {found['accuracy']:.1f}% of {found['n_test']:,} test images right (95%: {low:.1f} to "
            f"{high:.1f}), at layer {found['layer']} of {found['n_layers']}."
        )
    return said
