"""Lists of classes, such as Tiny ImageNet's `val/val_annotations.txt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from igpt_cli.images.records import brief, count

#: Bytes of a list that are read, at most.
LARGEST_LIST = 64 * 2**20


def is_annotations(name: str) -> bool:
    """Whether a file's name is an annotation list's."""
    return name.rpartition("/")[2].lower().endswith("_annotations.txt")


def stated_classes(images: Sequence[str], texts: Mapping[str, bytes]) -> dict[str, str]:
    """{image: class} from `texts`, {name of a list: its text of lines "file<TAB>class<TAB>..."}, for the images below
    the folder of each list."""
    classes: dict[str, str] = {}
    for path, text in texts.items():
        lines = (line.split("\t") for line in text.decode("utf-8", "replace").splitlines())
        stated = {cells[0].strip(): cells[1].strip() for cells in lines if len(cells) > 1 and cells[1].strip()}
        folder = path.rpartition("/")[0]
        for name in images if stated else ():
            if name.startswith(f"{folder}/" if folder else "") and (label := stated.get(name.rpartition("/")[2])):
                classes[name] = label
    return classes


def annotated_notes(classes: Mapping[str, str], texts: Mapping[str, bytes]) -> list[str]:
    return [f"the classes of {count(len(classes), 'image')} are from {brief(sorted(texts))}"] if classes else []
