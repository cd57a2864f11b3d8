"""Text output of igpt tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpt_cli.cli.output import Voice, printable, table

if TYPE_CHECKING:
    from igpt_cli.tokens.store import TokenSplit


def in_terminal(split: TokenSplit, n: int, seed: int, voice: Voice) -> str:
    """Images as coloured text, originals at the left where they are stored and fit; or else a table of them."""
    import numpy as np

    from igpt_cli.cli.preview import previews, room, true_colour
    from igpt_cli.tokens.sheet import class_or_name, sample_rows

    rows, side, columns = sample_rows(split, n, seed), split.file.resolution, room()
    if not len(rows):
        return printable(f"{split.file.path}: the split {split.name} has no images")
    captions = [printable(class_or_name(split, row)) for row in rows]
    if not true_colour() or columns < side:
        why = f"an image takes {side} columns of {columns}" if true_colour() else "stdout has no 24-bit colours"
        voice.say(f"{why}; the images are listed instead")
        named = zip(rows.tolist(), captions, (split.names[row] for row in rows))
        return table([list(row) for row in named], ["row", "class", "name"])
    pictures = split.decode(rows)
    if split.rgb is not None and columns >= 2 * side:
        pictures = np.concatenate([split.rgb[rows], pictures], axis=2)
        voice.say("originals at the left, quantized at the right")
    return previews(list(pictures), captions, columns)


def description(about: dict) -> str:
    """What `describe` says of a token file: attributes, tree, classes, the commonest colours."""
    attrs, palette = about["attrs"], about["palette"]
    lines = [str(about["path"])]
    lines += [
        f"  {k} = {', '.join(f'{n}={v}' for n, v in attrs[k].items()) if k == 'preprocess' else attrs[k]}"
        for k in sorted(attrs)
    ]
    tree = [
        [t["name"], " x ".join(map(str, t["shape"])), t["dtype"], f"{t['bytes'] / 1e6:,.2f} MB"] for t in about["tree"]
    ]
    lines += ["", table(tree, ["dataset", "shape", "dtype", "size"])]
    splits = about["splits"]
    rows = [[name, *(s["classes"][name] for s in splits.values())] for name in next(iter(splits.values()))["classes"]]
    for key in ("unlabelled", "skipped"):
        if any(s[key] for s in splits.values()):
            rows.append([f"({key})", *(s[key] for s in splits.values())])
    rows.append(["rows", *(s["rows"] for s in splits.values())])
    lines += ["", table(rows, ["class", *splits])]
    most = [[m["token"], "#{:02x}{:02x}{:02x}".format(*m["rgb"]), f"{m['share']:.2f}%"] for m in palette["most_used"]]
    lines += ["", f"{palette['used']:,} of {palette['colours']:,} colours are used; most used:"]
    lines.append(table(most, ["token", "colour", "pixels"]))
    return "\n".join(lines)
