"""Bits of HTML for the page of `igpt report`: text that is only text, tables that sort, lists, pictures, commands."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


def text(value: object) -> str:
    """What a name holds, shown as it is: nothing of it is markup, and what cannot be seen is escaped.

    >>> text("<b>&\\x1b"), text('"cat"')
    ('&lt;b&gt;&amp;\\\\x1b', '&quot;cat&quot;')
    """
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        html: what is shown.
        key: what it sorts by: a number, a text, or None for an empty cell, which comes last.
    """

    html: str
    key: float | str | None = None


def word(value: object) -> Cell:
    """A cell with a text; empty for None."""
    return Cell("", None) if value is None else Cell(text(value), str(value))


def number(value: float | None, form: str = ",") -> Cell:
    """A cell with a number in a format of Python's.

    >>> number(1234.5, ",.1f").html
    '1,234.5'
    """
    return Cell("", None) if value is None else Cell(format(value, form), value)


def table(
    name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = False
) -> str:
    """A table in a box in which it scrolls where it is too wide. The first cell of a row is its heading.

    Args:
        name: its id in the page.
        caption, header: texts, not HTML.
        sortable: the headings are buttons, by which page.js sorts the rows.
    """
    numeric = [
        any(isinstance(row[i].key, (int, float)) for row in rows)
        and not any(isinstance(row[i].key, str) for row in rows)
        for i in range(len(header))
    ]
    heads = []
    for i, title in enumerate(header):
        kind = ' class="n"' if numeric[i] else ""
        inner = f'<button type="button">{text(title)}</button>' if sortable else text(title)
        heads.append(f'<th scope="col"{kind}>{inner}</th>')
    lines = [f"<tr>{''.join(_cell(c, i, numeric[i], sortable) for i, c in enumerate(row))}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0"><table id="{name}"{kind}>'
        f'<caption id="{name}-caption">{text(caption)}</caption>\n<thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _cell(cell: Cell, i: int, numeric: bool, sortable: bool) -> str:
    key = f' data-key="{text(cell.key)}"' if sortable and cell.key is not None else ""
    kind = ' class="n"' if numeric else ""
    return f'<th scope="row"{key}>{cell.html}</th>' if i == 0 else f"<td{kind}{key}>{cell.html}</td>"


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names and what they are, the latter as HTML; empty ones are left out."""
    return "<dl>" + "".join(f"<div><dt>{text(k)}</dt><dd>{v}</dd></div>" for k, v in rows if v) + "</dl>"


def details(summary: str, inner: str, opened: bool = False) -> str:
    """Something that opens; `summary` is a text, `inner` HTML."""
    return f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{inner}</details>"


def picture(png: bytes, size: tuple[int, int], alt: str, caption: str) -> str:
    """A PNG within the page, with its caption."""
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    box = f'width="{size[0]}" height="{size[1]}"'
    return (
        f'<figure class="picture"><img src="{source}" {box} alt="{text(alt)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def code(line: str) -> str:
    """A command, to be copied."""
    return f'<pre tabindex="0"><code>{text(line)}</code></pre>'


def listed(items: Sequence[str]) -> str:
    """Texts as a list; nothing for none."""
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>" if items else ""
