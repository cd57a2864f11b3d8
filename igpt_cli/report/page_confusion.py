"""Which classes a probe takes for which: the section of a report with the confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from igpt_cli.report.page_html import number, table, text, word
from igpt_cli.report.page_run import Account

#: Up to so many classes the matrix is shown; of more, only the pairs most often confused.
MANY_CLASSES = 25
#: So many of these pairs.
CONFUSED = 12
#: Tints of the matrix, `t0` to `t10` in the style sheet.
TINTS = 10


def confusion(accounts: Sequence[Account]) -> str:
    """Which classes the probe takes for which."""
    out = []
    for i, account in enumerate(accounts):
        found: dict[str, Any] = (account.probe or {}).get("details") or {}
        if not found.get("confusion"):
            continue
        counts = found["confusion"]
        names = [found["classes"][k] if k < len(found["classes"]) else str(k) for k in range(len(counts))]
        out.append(f"<h3>{text(account.name)}</h3>")
        if len(names) <= MANY_CLASSES:
            out.append(_matrix(counts, names, i, account))
        out.append(_confused(counts, names, i))
    return "\n".join(out)


def _matrix(counts: Sequence[Sequence[int]], names: Sequence[str], i: int, account: Account) -> str:
    """Percentages of each true class, tinted."""
    name, probe = f"confusion-{i}", account.probe or {}
    head = "".join(f'<th scope="col"><span>{text(n)}</span></th>' for n in names)
    lines = []
    for true, row in zip(names, counts):
        total = max(1, sum(row))
        shares = [100 * n / total for n in row]
        cells = "".join(f'<td class="n t{round(TINTS * share / 100)}">{share:.0f}</td>' for share in shares)
        lines.append(f'<tr><th scope="row">{text(true)}</th>{cells}<td class="n">{sum(row):,}</td></tr>')
    caption = (
        f"Test images of each true class (rows) by predicted class (columns), in percent: probe of layer "
        f"{probe['layer']}, {probe['accuracy']:.1f}% of {probe['n_test']:,} right"
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0"><table class="matrix" '
        f'id="{name}"><caption id="{name}-caption">{text(caption)}</caption>'
        f'<thead><tr><th scope="col">true \\ predicted</th>{head}<th scope="col">images</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _confused(counts: Sequence[Sequence[int]], names: Sequence[str], i: int) -> str:
    """The pairs that are most often confused."""
    mistakes = [(n, a, b) for a, row in enumerate(counts) for b, n in enumerate(row) if n and a != b]
    rows = [
        [word(names[a]), word(names[b]), number(n), number(100 * n / sum(counts[a]), ".0f")]
        for n, a, b in sorted(mistakes, key=lambda m: (-m[0], m[1:]))[:CONFUSED]
    ]
    if not rows:
        return "<p>No test image was classified wrongly.</p>"
    header = ["true class", "taken for", "images", "% of the class"]
    return table(f"confused-{i}", "Most often confused", header, rows, sortable=True)
