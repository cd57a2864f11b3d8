"""Images chosen before decoding: those that cannot be read are replaced by others, and the rest stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from make_samples import drawing, encoded

from igpt_cli.errors import InputError
from igpt_cli.images.subset import UNREADABLE, evenly
from igpt_cli.palette.palette import even_palette
from igpt_cli.probing.images import Subsets, balanced, choose_images
from igpt_cli.tokens.open_or_tokenize import open_or_tokenize


def photos(root: Path, n: int = 12, broken: dict[str, range] | None = None) -> Path:
    """root/{train,test}/{disc,square}/: n images each, of which those of `broken` are cut in half."""
    for split in ("train", "test"):
        for shape in ("disc", "square"):
            folder = root / split / shape
            folder.mkdir(parents=True)
            for i in range(n):
                data = encoded(drawing(shape, i), ".png")
                bad = i in (broken or {}).get(f"{split}/{shape}", ())
                (folder / f"{i:02d}.png").write_bytes(data[: len(data) // 2] if bad else data)
    return root


def chosen(root: Path, choose, bad: list | None = None) -> dict[str, list[str]]:
    on_bad = None if bad is None else lambda name, reason: bad.append(name)
    with open_or_tokenize(root, even_palette, 8, choose=choose, on_bad=on_bad) as file:
        return {split: list(file.split(split).names) for split in file.splits}


def classes(names: list[str]) -> Counter:
    return Counter(name.split("/")[1] for name in names)


@pytest.mark.parametrize("seed", [0, 1])
def test_unreadable_images_are_replaced_class_by_class(tmp_path, seed):
    sound = chosen(photos(tmp_path / "sound"), balanced(12, 6, seed))
    root = photos(tmp_path / "damaged", broken={"train/disc": range(5), "test/square": range(4, 9)})
    bad: list[str] = []
    used = chosen(root, balanced(12, 6, seed), bad)
    assert bad
    assert len(bad) == len(set(bad))
    for split, each in (("train", 6), ("test", 3)):
        assert classes(used[split]) == {"disc": each, "square": each}
        assert not set(used[split]) & set(bad)
        assert set(sound[split]) - set(bad) <= set(used[split])  # the readable ones stay


def test_all_readable_images_are_used_where_there_are_too_few(tmp_path):
    root = photos(tmp_path / "x", broken={"train/disc": range(1, 12)})
    assert classes(chosen(root, balanced(20, 4, 0))["train"]) == {"disc": 1, "square": 12}


def test_each_of_several_seeds_has_its_images_replaced(tmp_path):
    root = photos(tmp_path / "x", broken={"train/disc": range(4), "train/square": range(8, 11)})
    subsets = Subsets(8, 4, [0, 1, 2])
    with open_or_tokenize(root, even_palette, 8, choose=subsets) as file:
        for seed in subsets.seeds:
            images = subsets.images(file, seed)
            assert np.bincount(images.labels.train).tolist() == [4, 4]
            assert np.bincount(images.labels.test).tolist() == [2, 2]
    with open_or_tokenize(root, even_palette, 8, choose=balanced(8, 4, 1)) as alone:
        one = choose_images(alone, 8, 4, 1)
        with open_or_tokenize(root, even_palette, 8, choose=subsets) as file:
            many = subsets.images(file, 1)
            for split in ("train", "test"):
                assert [alone.split(split).names[i] for i in one.rows[split]] == [
                    file.split(split).names[i] for i in many.rows[split]
                ]


def test_evenly_spaced_images_are_replaced_by_their_neighbours(tmp_path):
    labels = np.zeros(20, np.int64)
    choose = evenly(["test"], 5)
    assert choose("test", labels).tolist() == [0, 4, 8, 12, 16]
    labels[[8, 9, 16, 17, 18, 19]] = UNREADABLE
    assert choose("test", labels).tolist() == [0, 4, 10, 12, 15]
    assert choose("test", np.full(20, UNREADABLE)).tolist() == []
    # An only image that cannot be read is replaced as well.
    root = photos(tmp_path / "x", n=3, broken={"test/disc": range(2), "train/disc": range(1)})
    assert chosen(root, evenly(None, 1)) == {"train": ["train/disc/01.png"], "test": ["test/disc/02.png"]}


def test_no_readable_image_at_all(tmp_path):
    every = {f"{split}/{shape}": range(12) for split in ("train", "test") for shape in ("disc", "square")}
    bad: list[str] = []
    with pytest.raises(InputError, match="none of the 12 images can be read; the first is .*: image file is truncated"):
        chosen(photos(tmp_path / "x", n=3, broken=every), balanced(None, None, 0), bad)
    assert len(bad) == 12
