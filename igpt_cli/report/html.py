"""The Jinja2 templates of `igpt report` and their tables.

Whatever is put into a template is text: markup in it is escaped, and so is what cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from igpt_cli.probing.layers import place


def visible(value: Any) -> Any:
    """A value as a template shows it: text of which every character can be seen; markup stays as it is.

    >>> visible("a\\x1b<b>")
    'a\\\\x1b<b>'
    """
    if hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=visible,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        name: its id in the page.
        header: the headings, divided by |, with formats behind colons: one of Python's for numbers, "layer" for layers,
            none for texts.
        rows: values, None for an empty cell; the first of a row is its heading.
        sortable: the headings are buttons, by which page.js sorts the rows.
        marked: rows have the colours of runs before them.
    """

    name: str
    caption: str
    header: str
    rows: Sequence[Sequence[Any]]
    sortable: bool = True
    marked: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """{heading: format}."""
        return dict(column.partition(":")[::2] for column in self.header.split("|"))

    def cells(self, row: Sequence[Any]) -> Iterator[tuple[str, Any, str]]:
        """What is shown, what it sorts by (None: last), and the format of each cell of a row.

        >>> list(Table("t", "", "n:,.1f|layer:layer", []).cells([1234.5, "3.mlp"]))
        [('1,234.5', 1234.5, ',.1f'), ('3.mlp', 3.5, 'layer')]
        """
        for value, form in zip(row, self.columns.values()):
            if value is None:
                yield "", None, form
            elif form == "layer":  # places within a block come behind the block's input
                block, site = place(value)
                yield str(value), block + {"": 0.0, "attention": 0.25, "mlp": 0.5}.get(site, 0.75), form
            else:
                yield format(value, form), value, form
