"""Splits, classes and images as people lay them out: nothing is guessed or dropped without a word."""

import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter

import numpy as np
import pytest
from make_samples import drawing, encoded, write_tar, write_zip

from igpt_cli.errors import FormatError, InputError
from igpt_cli.images.decode import load_rgb
from igpt_cli.images.sources import open_source, paths_from

PNG = encoded(drawing("disc", 0, (8, 8)), ".png")


def lay(root, names):
    """Files of these names in a folder, images as PNG, texts as given."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(names[name] if isinstance(names, dict) else PNG)
    return root


def table(source):
    """{(split, class or None): images}"""
    classes = {-1: None} | dict(enumerate(source.classes))
    return dict(Counter((r.split, classes[r.label]) for r in source.records()))


def of(*splits, classes=("cat", "dog"), n=2):
    return {(s, c): n for s in splits for c in classes}


def tree(pattern, n=2, **parts):
    """The names that a pattern makes: tree("{s}/{c}/{i}.png", s=["train"], c=["cat"])"""
    names = [pattern]
    for key, values in {**parts, "i": range(n)}.items():
        names = [name.replace("{" + key + "}", str(v)) for name in names for v in values]
    return names


def without_end_mark(path):
    """A tar archive less the zeros at its end."""
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512))
    return path


NO_END = "the archive has no end mark: it may have been cut off, and files at its end be missing"
SPLITS = tree("{s}/{c}/{i}.png", s=["train", "test"], c=["cat", "dog"])


class TestLinks:
    def test_a_linked_split_is_there_and_so_is_the_one_it_leads_to(self, tmp_path):
        lay(tmp_path, SPLITS)
        (tmp_path / "val").symlink_to("test")
        source = open_source([tmp_path])
        assert table(source) == of("train", "val", "test")
        assert source.notes == ["the same images are there under several names: val is a link to test"]
        assert source.doubts == []

    def test_links_to_nothing_and_to_themselves_are_said(self, tmp_path):
        lay(tmp_path, SPLITS)
        (tmp_path / "val").symlink_to("gone")
        (tmp_path / "round").symlink_to("round")
        (tmp_path / "train" / "up").symlink_to("..")
        source = open_source([tmp_path])
        assert table(source) == of("train", "test")
        assert source.doubts == ["2 links to nothing passed over: round, val"]

    def test_links_that_multiply_end(self, tmp_path):
        for i in range(9):
            lay(tmp_path, [f"c{i}/x.png"])
            for j in range(9):
                if j != i:
                    (tmp_path / f"c{i}" / f"to{j}").symlink_to(f"../c{j}")
        with pytest.raises(InputError, match="more than 100 links lead to the folder"):
            open_source([tmp_path])

    @pytest.mark.parametrize("form", ["tar", "tar.gz", "zip"])
    def test_links_in_archives(self, tmp_path, form):
        links = {"val": "test", "test/cat/again.png": "0.png", "train/cat/gone.png": "/etc/passwd", "loop": "loop"}
        path = tmp_path / f"x.{form}"
        if form == "zip":
            write_zip(path, dict.fromkeys(SPLITS, PNG))
            with zipfile.ZipFile(path, "a") as archive:
                for name, target in links.items():
                    info = zipfile.ZipInfo(name)
                    info.external_attr = (stat.S_IFLNK | 0o777) << 16
                    archive.writestr(info, target)
        else:
            with tarfile.open(path, "w:gz" if form == "tar.gz" else "w") as tar:
                for name in SPLITS:
                    info = tarfile.TarInfo(name)
                    info.size = len(PNG)
                    tar.addfile(info, io.BytesIO(PNG))
                for name, target in links.items():
                    info = tarfile.TarInfo(name)
                    info.type, info.linkname = tarfile.SYMTYPE, target
                    tar.addfile(info)
        source = open_source([path])
        expected = of("train", "val", "test") | {("test", "cat"): 3, ("val", "cat"): 3}
        assert table(source) == expected
        assert "2 links to nothing in the archive passed over: loop, train/cat/gone.png" in source.doubts
        assert all(load_rgb(r.data).size == (8, 8) for r in source.records())

    def test_hard_links_in_a_tar(self, tmp_path):
        lay(tmp_path / "f", ["cat/0.png", "dog/0.png"])
        os.link(tmp_path / "f" / "cat" / "0.png", tmp_path / "f" / "dog" / "same.png")
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(tmp_path / "f", "f")
        source = open_source([tmp_path / "x.tar"])
        assert table(source) == {("train", "cat"): 1, ("train", "dog"): 2}
        assert source.notes == ["1 file of the archive are links to others in it"]


@pytest.mark.parametrize("form", ["zip", "tar", "folder"])
def test_backslashes_are_folders(tmp_path, form):
    names = [n.replace("/", "\\") for n in tree("photos/{s}/{c}/{i}.png", s=["train", "test"], c=["cat", "dog"])]
    path = tmp_path / f"x.{form}"
    if form == "folder":
        lay(path, names)
    elif form == "tar":
        write_tar(path, dict.fromkeys(names, PNG), "w")
    else:
        write_zip(path, {"photos\\": b"", "photos\\train\\": b"", **dict.fromkeys(names, PNG)})
    assert table(open_source([path])) == of("train", "test")


def test_names_in_a_zip_are_utf_8_whatever_it_says(tmp_path):
    write_zip(tmp_path / "test.zip", {"test/caf__/1.png": PNG, "test/dog/1.png": PNG})
    plain = (tmp_path / "test.zip").read_bytes()
    (tmp_path / "test.zip").write_bytes(plain.replace(b"caf__", "café".encode()))
    write_zip(tmp_path / "train.zip", {"train/café/1.png": PNG, "train/dog/1.png": PNG})
    source = open_source([tmp_path / "train.zip", tmp_path / "test.zip"])
    assert table(source) == {(s, c): 1 for s in ("train", "test") for c in ("café", "dog")}
    assert source.doubts == []
    (tmp_path / "test.zip").write_bytes(plain.replace(b"caf__", "café\0".encode("cp1252")))
    source = open_source([tmp_path / "test.zip"])
    assert source.doubts == ["1 name not in UTF-8 read as code page 437: test/cafΘ"]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_tiny_imagenet(tmp_path, form):
    names = dict.fromkeys(tree("tiny/train/{c}/images/{i}.JPEG", c=["n01", "n02"]), PNG)
    names |= dict.fromkeys(tree("tiny/{s}/images/{i}.JPEG", s=["val", "test"], n=3), PNG)
    names["tiny/val/val_annotations.txt"] = b"0.JPEG\tn02\t0\t0\t9\t9\n1.JPEG\tn01\t0\t0\t9\t9\n"
    path = tmp_path / "x"
    lay(path, names) if form == "folder" else write_zip(path, names)
    source = open_source([path])
    assert source.classes == ["n01", "n02"]
    assert [r.label for r in source.records() if r.split == "val"] == [1, 0, -1]
    assert [r.label for r in source.records() if r.split == "test"] == [-1] * 3
    assert "3 images of test without a label: the folder images is read as no class" in source.doubts
    assert "1 of 3 images of val have no label" in source.notes
    assert any("the classes of 2 images are from" in n for n in source.notes)


@pytest.mark.parametrize(
    ("pattern", "splits", "doubt"),
    [
        ("{s}/{c}/{i}.png", ["training_set", "test_set"], "splits by words in the folders' names: test_set as test"),
        ("{s}/{s}/{c}/{i}.png", ["training_set", "test_set"], "splits by words"),
        ("a/{s}/{s}/{c}/{i}.png", ["seg_train", "seg_test"], "splits by words"),
        ("{s}/{c}/{i}.png", ["Train2017", "Val2017"], "splits by words"),
        ("{s}/{c}/{i}.png", ["TrainSet", "TestSet"], "splits by words"),
        ("{c}/{s}/{i}.png", ["train", "test"], "splits by the folders in those of the classes: test, train"),
        ("{c}/{s}/x/{i}.png", ["Train", "Valid"], "splits by the folders in those of the classes"),
        ("{s}/{c}/{i}.png", ["train", "holdout", "val"], "folders next to those of the splits are read as splits"),
    ],
)
def test_splits_that_words_name(tmp_path, pattern, splits, doubt):
    source = open_source([lay(tmp_path, tree(pattern, s=splits, c=["cat", "dog"]))])
    assert source.classes == ["cat", "dog"]
    assert len(source.counts) == len(splits)
    assert set(table(source).values()) == {2}
    assert any(doubt in d for d in source.doubts)


def test_a_split_of_predictions_has_no_labels(tmp_path):
    names = tree("{s}/{s}/{c}/{i}.png", s=["seg_train", "seg_test"], c=["cat", "dog"]) + tree(
        "seg_pred/seg_pred/{i}.png"
    )
    source = open_source([lay(tmp_path, names)])
    assert table(source) == of("train", "test") | {("pred", None): 2}


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["cats_train", "cats_test", "dogs_train", "dogs_test"], True),
        (["bullet_train", "test_tube"], True),
        (["train", "car"], True),
        (["bullet_train", "test_tube", "cat", "dog", "owl"], False),
        (["freight train", "car"], False),
    ],
)
def test_classes_that_only_sound_like_splits_stay_classes(tmp_path, folders, said):
    source = open_source([lay(tmp_path, tree("{c}/{i}.png", c=folders))])
    assert source.classes == sorted(folders)
    assert list(source.counts) == ["train"]
    assert ["were not read as splits" in d for d in source.doubts] == [True] * said


def test_images_next_to_splits_are_said(tmp_path):
    source = open_source([lay(tmp_path, [*SPLITS, "stray.png"])])
    assert source.doubts == ["1 image next to the folders of the splits: read as train, without a label"]
    assert "1 of 5 images of train have no label" in source.notes


SYSTEM = [
    "@eaDir/cat/x.jpg",
    "#recycle/x.jpg",
    "$RECYCLE.BIN/x.jpg",
    "System Volume Information/x.jpg",
    "lost+found/x.jpg",
    *("found.001/x.jpg", "~snapshot/x.jpg", "@__thumb/x.jpg"),
]


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "list"])
def test_folders_that_systems_keep_for_themselves(tmp_path, form):
    names = [
        *tree("{c}/{i}.jpg", c=["cat", "dog"]),
        *SYSTEM,
        "cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        "cat/.hidden.jpg",
    ]
    names += ["__MACOSX/cat/._0.jpg"]
    if form in ("folder", "list"):
        lay(tmp_path, names)
        source = open_source(
            [tmp_path] if form == "folder" else [tmp_path / n for n in names if "hidden" not in n and "._" not in n]
        )
    else:
        (write_zip if form == "zip" else lambda p, f: write_tar(p, f, "w"))(tmp_path / "x", dict.fromkeys(names, PNG))
        source = open_source([tmp_path / "x"])
    assert table(source) == of("train")
    assert any(
        "9 images in system folders passed over (#recycle, $RECYCLE.BIN, @__thumb, @eaDir" in d for d in source.doubts
    )
    assert any("1 hidden image passed over" in d for d in source.doubts) == (form != "list")


def test_a_system_folder_that_cannot_be_read_is_no_error(tmp_path, monkeypatch):
    lay(tmp_path, ["cat/0.jpg", "dog/0.jpg", "lost+found/x.jpg"])
    (tmp_path / "lost+found").chmod(0)
    scandir = os.scandir

    def refused(path):
        if "lost+found" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert table(open_source([tmp_path])) == of("train", n=1)
    (tmp_path / "lost+found").chmod(0o700)


class TestSamplesOfSeveralImages:
    def samples(self, path, suffixes=("jpg", "seg.png", "cls"), n=4):
        files = {f"{i:04d}.{s}": str(i % 2).encode() if s == "cls" else PNG for i in range(n) for s in suffixes}
        write_tar(path, files, "w")
        return path

    @pytest.mark.parametrize(
        "suffixes",
        [
            ("jpg", "seg.png", "cls"),
            ("mask.png", "image.png", "json"),
            ("depth.png", "jpg"),
            ("png", "left.png", "cls"),
        ],
    )
    def test_one_is_taken(self, tmp_path, suffixes):
        source = open_source([self.samples(tmp_path / "x.tar", suffixes)])
        expected = next(s for s in suffixes if s in ("jpg", "image.png", "png"))
        assert [r.name for r in source.records()] == [f"{i:04d}.{expected}" for i in range(4)]
        (doubt,) = source.doubts
        assert f"{expected} is taken, 4 images passed over" in doubt
        assert "--column" in doubt

    def test_the_choice_can_be_made(self, tmp_path):
        path = self.samples(tmp_path / "x.tar")
        source = open_source([path], column="seg.png")
        assert {r.name.partition(".")[2] for r in source.records()} == {"seg.png"}
        assert source.doubts == []
        assert source.notes == ["--column seg.png: 4 images with other suffixes passed over"]
        with pytest.raises(InputError, match="no image in .* with the suffix 'webp'; known: jpg, seg.png"):
            open_source([path], column="webp")
        with pytest.raises(InputError, match="--column is for Parquet files"):
            open_source([lay(tmp_path / "f", ["cat/1.png"])], column="jpg")

    def test_samples_of_either_suffix_stay_whole_and_dots_in_names_are_no_samples(self, tmp_path):
        files = {"0.jpg": PNG, "0.cls": b"1", "1.png": PNG, "1.cls": b"0", "1.seg.png": PNG, "2.seg.png": PNG}
        write_tar(tmp_path / "a.tar", files, "w")
        assert [r.name for r in open_source([tmp_path / "a.tar"]).records()] == ["0.jpg", "1.png"]
        names = tree("train/{c}.{i}.jpg", c=["cat", "dog"], n=5)
        write_zip(tmp_path / "b.zip", dict.fromkeys(names, PNG))
        assert len(open_source([tmp_path / "b.zip"])) == 10


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_masks_next_to_their_images_are_said(tmp_path, form):
    names = ["cat/1 (1).png", "cat/1 (1)_mask.png", "dog/a.jpg", "dog/a-seg.png", "dog/b_mask.png"]
    lay(tmp_path / "x", names) if form == "folder" else write_zip(tmp_path / "x", dict.fromkeys(names, PNG))
    (doubt,) = open_source([tmp_path / "x"]).doubts
    assert doubt.startswith("2 images called like masks of others, and read as images: ")
    assert "b_mask" not in doubt


class TestLabelsOfSamples:
    def opened(self, path, **files):
        """Images 0..3, each with the text of `suffix=text` beside it, {i} standing for 0, 1, 0, 1."""
        texts = {f"{i}.{s}": t.replace("{i}", str(i % 2)).encode() for i in range(4) for s, t in files.items()}
        write_tar(path, {**{f"{i}.jpg": PNG for i in range(4)}, **texts}, "w")
        return open_source([path])

    def test_a_suffix_may_be_upper_case_and_minus_one_is_no_label(self, tmp_path):
        assert table(self.opened(tmp_path / "a.tar", CLS="{i}")) == {("train", "0"): 2, ("train", "1"): 2}
        assert table(self.opened(tmp_path / "b.tar", cls="-{i}")) == {("train", "-0"): 2, ("train", None): 2}

    def test_json_states_labels_where_nothing_else_does(self, tmp_path):
        source = self.opened(tmp_path / "a.tar", json='{"caption": "a cat", "label": {i}}')
        assert table(source) == {("train", "0"): 2, ("train", "1"): 2}
        assert source.doubts == ["classes are the labels in .json files, as nothing else names any"]
        source = self.opened(tmp_path / "b.tar", json='{"label": 7}', cls="{i}")
        assert (table(source), source.doubts) == ({("train", "0"): 2, ("train", "1"): 2}, [])
        for text in ('{"caption": "a cat"}', "[1]", "{", '{"label": null}', '{"label": [1]}'):
            source = self.opened(tmp_path / "c.tar", json=text)
            assert table(source) == {("train", None): 4}
            assert source.notes[0].startswith("no classes: ")


class TestParquet:
    @pytest.fixture(autouse=True)
    def _arrow(self):
        self.pa, self.pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(self, path, **columns):
        self.pq.write_table(self.pa.table(columns), path)
        return path

    def test_the_image_is_taken_and_the_choice_can_be_made(self, tmp_path):
        other = encoded(drawing("square", 1, (8, 8)), ".png")
        path = self.write(tmp_path / "x.parquet", annotation=[{"bytes": other}] * 3, image=[{"bytes": PNG}] * 3)
        source = open_source([path])
        assert [r.data for r in source.records()] == [PNG] * 3
        assert source.doubts == [
            "several columns hold images: image is taken, not annotation; --column chooses another"
        ]
        chosen = open_source([path], column="annotation")
        assert ([r.data for r in chosen.records()], chosen.doubts) == ([other] * 3, [])
        with pytest.raises(InputError, match="no column of images in .* called 'img'"):
            open_source([path], column="img")

    def test_bytes_that_are_no_images_are_no_column_of_images(self, tmp_path):
        path = self.write(tmp_path / "x.parquet", sha1=[b"01234567890123456789"] * 2, content=[PNG] * 2)
        source = open_source([path])
        assert [r.data for r in source.records()] == [PNG] * 2
        assert source.doubts == []
        assert source.notes[0].startswith("no labels: no column is called label")

    def test_a_category_of_pandas_is_a_label(self, tmp_path):
        labels = self.pa.array(["dog", "cat", None]).dictionary_encode()
        source = open_source([self.write(tmp_path / "x.parquet", jpg=[PNG] * 3, label=labels)])
        assert table(source) == {("train", "dog"): 1, ("train", "cat"): 1, ("train", None): 1}

    def test_kinds_of_labels(self, tmp_path):
        kinds = {
            "floating": ([0.0, 2.0, None], {"0": 1, "2": 1, None: 1}),
            "boolean": ([True, False, True], {"1": 2, "0": 1}),
            "names": ([b"cat", b"dog", b""], {"cat": 1, "dog": 1, None: 1}),
            "numbers": ([3, -1, 3], {"3": 2, None: 1}),
        }
        for kind, (labels, expected) in kinds.items():
            source = open_source([self.write(tmp_path / f"{kind}.parquet", jpg=[PNG] * 3, label=labels)])
            assert table(source) == {("train", c): n for c, n in expected.items()}
        source = open_source([self.write(tmp_path / "x.parquet", jpg=[PNG] * 2, label=[[1], [2]])])
        assert table(source) == {("train", None): 2}
        assert source.doubts[0].startswith("the column 'label' holds list<")
        with pytest.raises(FormatError, match="the column 'y' holds 0.5; labels are whole numbers or names"):
            open_source([self.write(tmp_path / "x.parquet", jpg=[PNG] * 2, y=[0.5, 1.0])])

    def test_kinds_of_bytes(self, tmp_path):
        for kind in (self.pa.binary(len(PNG)), self.pa.binary_view(), self.pa.large_binary()):
            path = self.write(tmp_path / "x.parquet", jpg=self.pa.array([PNG] * 2).cast(kind))
            assert [r.data for r in open_source([path]).records()] == [PNG] * 2

    def test_a_test_split_may_have_no_labels(self, tmp_path):
        self.write(tmp_path / "train.parquet", jpg=[PNG] * 2, label=[1, 0])
        path = self.write(tmp_path / "test.parquet", jpg=[PNG] * 3)
        source = open_source([tmp_path])
        assert table(source) == {("train", "0"): 1, ("train", "1"): 1, ("test", None): 3}
        assert source.notes == [f"no column of labels: {path}"]

    def test_the_column_called_label_is_the_label(self, tmp_path):
        features = {"blurred": {"_type": "ClassLabel", "names": ["no", "yes"]}}
        rows = self.pa.table({"jpg": [PNG] * 2, "blurred": [0, 0], "label": ["cat", "dog"]})
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        self.pq.write_table(rows.replace_schema_metadata(about), tmp_path / "x.parquet")
        assert open_source([tmp_path]).classes == ["cat", "dog"]

    def test_a_file_for_each_class(self, tmp_path):
        for name in ("train/cat", "train/dog", "test/cat"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            self.write(tmp_path / f"{name}.parquet", jpg=[PNG] * 2)
        source = open_source([tmp_path])
        assert table(source) == of("train") | {("test", "cat"): 2}
        assert source.doubts == ["classes are the names of the files, as nothing else names any: cat, dog"]

    def test_arrow(self, tmp_path):
        rows = self.pa.table({"jpg": [PNG] * 150, "label": [i % 3 for i in range(150)]})
        makers = {"train/data-0.arrow": self.pa.ipc.new_stream, "test/data-0.arrow": self.pa.ipc.new_file}
        for name, maker in makers.items():
            (tmp_path / name).parent.mkdir()
            with maker(str(tmp_path / name), rows.schema) as writer:
                writer.write_table(rows, 100)
        source = open_source([tmp_path])
        assert table(source) == {(s, c): 50 for s in ("train", "test") for c in "012"}
        assert {r.data for r in source.records()} == {PNG}
        data = (tmp_path / "train/data-0.arrow").read_bytes()
        (tmp_path / "cut.arrow").write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="cut.arrow is a broken Arrow file: "):
            len(list(open_source([tmp_path / "cut.arrow"]).records()))

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory in /proc")
    def test_a_row_group_may_be_larger_than_the_memory(self, tmp_path):
        """Of 200 MB in one row group a few pages are in memory at a time."""
        noise = np.random.default_rng(0).bytes(30_000)
        images = self.pa.array([noise[i : i + 10_000] for i in range(20_000)])
        path = tmp_path / "x.parquet"
        self.pq.write_table(self.pa.table({"jpg": images}), path, use_dictionary=False, compression=None)
        code = f"""
            import re
            from igpt_cli.images.sources import open_source
            peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
            source = open_source([{str(path)!r}])
            before = peak()
            print(sum(1 for _ in source.records()), peak() - before)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        rows, megabytes = map(int, done.stdout.split())
        assert (rows, megabytes < 100) == (20_000, True)


class TestClassArchives:
    @pytest.mark.parametrize("form", ["tar", "zip"])
    def test_the_archives_name_the_classes(self, tmp_path, form):
        for split in ("train", "val"):
            for c in ("cat", "dog"):
                path = tmp_path / split / f"{c}.{form}"
                path.parent.mkdir(exist_ok=True)
                files = dict.fromkeys(tree(f"{c}_{{i}}.png"), PNG)
                write_zip(path, files) if form == "zip" else write_tar(path, files, "w")
        source = open_source([tmp_path])
        assert table(source) == of("train", "val")
        assert source.doubts == ["classes are the names of the archives, as nothing else names any: cat, dog"]

    def test_wordnet_names_are_classes_and_numbered_shards_are_not(self, tmp_path):
        for folder, names in (("a", ["n01440764", "n01443537"]), ("b", ["part-0", "part-1"])):
            (tmp_path / folder).mkdir()
            for name in names:
                write_tar(tmp_path / folder / f"{name}.tar", {"0.png": PNG}, "w")
        assert open_source([tmp_path / "a"]).classes == ["n01440764", "n01443537"]
        shards = open_source([tmp_path / "b"])
        assert (shards.classes, shards.doubts) == ([], [])
        assert shards.notes[0].startswith("no classes")

    def test_archives_in_an_archive(self, tmp_path):
        write_tar(tmp_path / "x.tar", {"cat.tar": b"x", "dog.tar": b"x"}, "w")
        with pytest.raises(InputError, match=r"holds 2 \.tar files: archives in an archive\. Unpack it once"):
            open_source([tmp_path / "x.tar"])
        lay(tmp_path / "f", {"cat/1.png": PNG, "dog.tar": b"x"})
        assert open_source([tmp_path / "f"]).doubts == ["1 archive next to the images not opened: dog.tar"]

    def test_arrays_name_classes_too(self, tmp_path):
        for name in ("cat", "dog"):
            np.save(tmp_path / f"{name}.npy", np.zeros((2, 4, 4, 3), np.uint8))
        assert table(open_source([tmp_path])) == of("train")


class TestNamesThatLookTheSame:
    COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"

    def test_unicode_forms_are_one_class(self, tmp_path):
        files = dict.fromkeys([f"train/{self.COMPOSED}/1.png", f"test/{self.DECOMPOSED}/1.png", "train/x/1.png"], PNG)
        write_zip(tmp_path / "x.zip", files)
        source = open_source([tmp_path / "x.zip"])
        assert source.classes == [self.COMPOSED, "x"]
        assert source.doubts == [f"2 classes whose names differ only in Unicode form are taken as one: {self.COMPOSED}"]

    @pytest.mark.parametrize("other", ["Cat", "cat ", " cat", "CAT"])
    def test_case_and_blanks(self, tmp_path, other):
        write_zip(tmp_path / "x.zip", dict.fromkeys(["train/cat/1.png", f"test/{other}/1.png", "train/x/1.png"], PNG))
        source = open_source([tmp_path / "x.zip"])
        assert source.classes == ["cat", "x"]
        assert source.doubts == [
            f"classes whose names differ only in case or blanks are taken as one: 'cat', {other!r}"
        ]
        write_zip(tmp_path / "y.zip", dict.fromkeys(["cat/1.png", f"{other}/1.png"], PNG))
        source = open_source([tmp_path / "y.zip"])
        assert len(source.classes) == 2
        assert "are different ones" in source.doubts[0]

    def test_across_sources_and_marks(self, tmp_path):
        a = lay(tmp_path / "a", ["Cat/1.png", "dog/1.png"])
        write_zip(tmp_path / "b.zip", dict.fromkeys(["cat/1.png", "dog/1.png"], PNG))
        assert open_source([a, tmp_path / "b.zip"]).classes == ["Cat", "dog"]
        write_tar(tmp_path / "c-train.tar", {"1.png": PNG, "1.cls": b"Cat", "2.png": PNG, "2.cls": b"dog"}, "w")
        write_tar(tmp_path / "d-test.tar", {"1.png": PNG, "1.cls": b"cat"}, "w")
        source = open_source([tmp_path / "c-train.tar", tmp_path / "d-test.tar"])
        assert (source.classes, len(source.doubts)) == (["Cat", "dog"], 1)


class TestArraysPeopleHave:
    def batch(self, seed, side=32, n=5):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        return images, images.transpose(0, 3, 1, 2).reshape(n, -1), rng.integers(1, 1001, n)

    @pytest.mark.parametrize("side", [16, 32, 64])
    @pytest.mark.parametrize("form", ["npz", "pickles", "zip"])
    def test_downsampled_imagenet(self, tmp_path, form, side):
        expected = {}
        for i, name in enumerate(["train_data_batch_1", "train_data_batch_2", "val_data"]):
            images, rows, labels = self.batch(i, side)
            split = "val" if "val" in name else "train"
            expected.setdefault(split, []).extend(zip(labels.tolist(), images, strict=True))
            content = {"data": rows, "labels": labels.tolist(), "mean": rows.mean(0)}
            if form == "npz":
                np.savez(tmp_path / name, **content)
            else:
                (tmp_path / name).write_bytes(pickle.dumps(content, 4))
        path = tmp_path
        if form == "zip":
            files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            write_zip(path := tmp_path / "Imagenet32.zip", files)
        source = open_source([path])
        assert source.classes == [str(i) for i in range(1, 1001)]
        assert source.doubts == []
        for split, images in expected.items():
            mine = [r for r in source.records() if r.split == split]
            assert [source.classes[r.label] for r in mine] == [str(label) for label, _ in images]
            np.testing.assert_array_equal(np.stack([r.data for r in mine]), np.stack([i for _, i in images]))
        if form == "pickles":
            assert len(open_source([tmp_path / "val_data"])) == 5
            (tmp_path / "train_data_batch_1").unlink()
            assert open_source([tmp_path]).doubts == ["training batches are missing: 1"]

    def test_arrays_without_names(self, tmp_path):
        x, y = self.batch(0)[0], np.arange(5) % 3
        np.savez(tmp_path / "a.npz", x, y)
        source = open_source([tmp_path / "a.npz"])
        np.testing.assert_array_equal(np.stack([r.data for r in source.records()]), x)
        assert ([r.label for r in source.records()], source.doubts) == ([0, 1, 2, 0, 1], [])
        for order in ((x, y, x[:2], y[:2]), (x, x[:2], y, y[:2])):
            np.savez(tmp_path / "b.npz", *order)
            source = open_source([tmp_path / "b.npz"])
            assert source.counts == {"train": 5, "test": 2}
            assert source.doubts == ["arrays without names are read by their shapes as train, test"]
        np.savez(tmp_path / "c.npz", x, x, x)
        with pytest.raises(InputError, match="arrays without names, of shapes"):
            open_source([tmp_path / "c.npz"])

    @pytest.mark.parametrize("shape", [(3, 28, 28), (3, 28, 28, 1), (3, 784)])
    def test_grey(self, tmp_path, shape):
        grey = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
        np.savez(
            tmp_path / "x.npz", x_train=grey.reshape(shape), y_train=[0, 1, 1], x_test=grey[:1].reshape(1, *shape[1:])
        )
        np.save(tmp_path / "x.npy", grey.reshape(shape))
        for name, n in (("x.npz", 4), ("x.npy", 3)):
            records = list(open_source([tmp_path / name]).records())
            assert len(records) == n
            np.testing.assert_array_equal(np.stack([r.data for r in records[:3]]), np.stack([grey] * 3, -1))

    @pytest.mark.parametrize("kind", [bool, np.float32, ">i4"])
    def test_labels_of_any_type_of_whole_numbers(self, tmp_path, kind):
        x, y = self.batch(0)[0], np.array([0, 1, 1, 0, 1])
        np.savez(tmp_path / "x.npz", images=x, labels=y.astype(kind)[:, None])
        assert [r.label for r in open_source([tmp_path / "x.npz"]).records()] == y.tolist()

    def test_svhn(self, tmp_path):
        from scipy.io import savemat

        images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        for split, labels in (("train", [10, 1, 2, 9]), ("test", [1, 10, 3, 4]), ("extra", [5, 10, 7, 8])):
            content = {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
            savemat(tmp_path / f"{split}_32x32.mat", content, do_compression=split == "train")
        source = open_source([tmp_path])
        assert source.classes == [str(i) for i in range(10)]
        assert source.counts == {"train": 4, "test": 4, "extra": 4}
        labels = {split: [r.label for r in source.records() if r.split == split] for split in source.counts}
        assert labels == {"train": [0, 1, 2, 9], "test": [1, 0, 3, 4], "extra": [5, 0, 7, 8]}
        one = open_source([tmp_path / "train_32x32.mat"])
        assert ([r.label for r in one.records()], one.notes) == ([0, 1, 2, 9], ["SVHN's label 10 is the digit 0"])
        np.testing.assert_array_equal(np.stack([r.data for r in one.records()]), images)
        savemat(tmp_path / "other.mat", {"a": np.zeros(3)})
        with pytest.raises(InputError, match=r"holds a \(1, 3\) float64; as in SVHN, images are `X`"):
            open_source([tmp_path / "other.mat"])


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_as_windows_writes_them(coding, end):
    names = ["photos/a b.jpg", "photos/caf\u00e9.png"]
    assert [str(p) for p in paths_from(io.BytesIO(end.join([*names, ""]).encode(coding)))] == names


def test_a_list_that_is_named_as_a_file_is_recognised(tmp_path):
    (tmp_path / "list.txt").write_bytes("a.jpg\n".encode("utf-16"))
    with pytest.raises(InputError, match="a text file; for a list of paths use: igpt ... - < list.txt"):
        open_source([tmp_path / "list.txt"])


def test_lists_of_more_than_paths(tmp_path, monkeypatch):
    lay(tmp_path, ["cat/1.png", "dog/1.png"])
    monkeypatch.chdir(tmp_path)
    for line in ('"cat/1.png"', "cat/1.png,cat", "cat/1.png\tcat", "# cats", " cat/1.png"):
        with pytest.raises(InputError, match=r"of 2 paths\); a line of a list is one path, without quotes"):
            open_source(paths_from(io.BytesIO(f"dog/1.png\n{line}\n".encode())))
    with pytest.raises(InputError, match="separated by lines, not by NUL; leave out -0"):
        paths_from(io.BytesIO(b"cat/1.png\ndog/1.png\n"), null=True)
    again = open_source(["cat/1.png", "./cat/1.png", "dog/1.png"])
    assert table(again) == {("train", "cat"): 2, ("train", "dog"): 1}
    assert again.doubts == [f"1 file given more than once, and read as often: {tmp_path}/cat/1.png"]
    mixed = open_source(["cat/1.png", "dog"])
    assert (table(mixed), mixed.doubts) == ({("train", None): 2}, [])


class TestTarHeaders:
    def negative(self, size):
        info = tarfile.TarInfo("a/1.png")
        info.size = 2048
        head = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        head[124:136] = size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head) + PNG.ljust(2048, b"\0") + bytes(1024)

    @pytest.mark.parametrize(
        "size", [b"-0000000512\0", b"-0000001000\0", (-512 % 2**96).to_bytes(12, "big"), b"9" * 11 + b"\0"]
    )
    def test_a_size_that_is_negative_or_no_number_is_refused(self, tmp_path, size):
        (tmp_path / "x.tar").write_bytes(self.negative(size))
        with pytest.raises(InputError, match="the header at byte 0 states the size"):
            open_source([tmp_path / "x.tar"])

    @pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
    def test_a_name_without_bound_is_not_unpacked(self, tmp_path, kind):
        import bz2

        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, 8 * 2**30
        head = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(head + bytes(2**20)))
        with pytest.raises(InputError, match="states a name of 8,589,934,592 bytes"):
            open_source([tmp_path / "x.tar.bz2"])

    def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(self, tmp_path):
        info = tarfile.TarInfo("a/1.png")
        info.size = 50 * 2**30
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**16))
        with pytest.raises(InputError, match="refused as a bomb"):
            open_source([tmp_path / "x.tar.gz"])

    def test_damage_in_the_middle_does_not_end_the_archive_silently(self, tmp_path):
        write_tar(tmp_path / "x.tar", {f"{i}.png": PNG for i in range(4)}, "w")
        data = bytearray((tmp_path / "x.tar").read_bytes())
        data[2 * (512 + -(-len(PNG) // 512) * 512)] ^= 255
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(InputError, match="the header at byte .* is damaged"):
            open_source([tmp_path / "x.tar"])

    def test_wherever_a_tar_is_cut_off_it_is_refused_or_said(self, tmp_path):
        long = "cat/" + "n" * 200  # has a header of its own
        write_tar(tmp_path / "x.tar", {f"{name}.png": PNG for name in ("dog/0", long, "dog/1")}, "w")
        data = without_end_mark(tmp_path / "x.tar").read_bytes()

        def outcome(at):
            (tmp_path / "x.tar").write_bytes(data[:at])
            try:
                return open_source([tmp_path / "x.tar"]).doubts
            except InputError as e:
                return re.findall(
                    r"it ends inside (?:a header|dog/.\.png|cat/n+\.png), after [0-2] whole files?;", str(e)
                )

        found = {at: outcome(at) for at in range(512, len(data), 64)}
        assert all(len(said) == 1 for said in found.values())
        assert [at for at, said in found.items() if said == [NO_END]] == [1024, 3072]  # after a whole file
        assert outcome(len(data)) == [NO_END]
        assert len(open_source([tmp_path / "x.tar"])) == 3

    def test_an_end_mark_far_before_the_end_is_said(self, tmp_path):
        write_tar(tmp_path / "x.tar", {"cat/0.png": PNG}, "w")
        assert open_source([tmp_path / "x.tar"]).doubts == []
        with open(tmp_path / "x.tar", "r+b") as file:  # as one that is being downloaded
            file.truncate(3_000_000)
        (doubt,) = open_source([tmp_path / "x.tar"]).doubts
        assert doubt == "3.0 MB after its end mark are not read: is it fully downloaded?"

    def test_what_is_said_of_one_archive_of_several_names_it(self, tmp_path):
        for name in ("a", "b", "c"):
            write_tar(tmp_path / f"{name}.tar", {f"cat/{name}.png": PNG, f"dog/.{name}.png": PNG}, "w")
        without_end_mark(tmp_path / "b.tar")
        source = open_source([tmp_path])
        assert len(source) == 3
        assert any(doubt == f"b.tar: {NO_END}" for doubt in source.doubts)
        assert "3 hidden images passed over (names that begin with a dot)" in source.doubts

    def test_archives_one_after_the_other_are_said(self, tmp_path):
        for name in "ab":
            write_tar(tmp_path / f"{name}.tar", {f"{name}.png": PNG}, "w")
        both = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
        both = both + bytes(-len(both) % 512 + 1024) + (tmp_path / "b.tar").read_bytes()
        (tmp_path / "c.tar").write_bytes(both)
        assert open_source([tmp_path / "c.tar"]).doubts[0].startswith("another archive follows")


class TestCommands:
    def test_strict_refuses_what_is_only_said_without(self, igpt, workspace):
        lay(workspace / "photos", [*SPLITS, "#recycle/x.png"])
        said = "1 image in system folders passed over (#recycle)"
        info = igpt("data", "info", "photos")
        assert (info.code, said in info.stdout) == (0, True)
        for command in (
            ["data", "info", "photos"],
            ["tokenize", "photos", "-p", "p.npz"],
            ["palette", "fit", "photos"],
        ):
            if command[0] == "tokenize":
                assert igpt("palette", "fit", "photos", "-o", "p.npz", "-k", 4).code == 0
            refused = igpt(*command, "--strict")
            assert refused.code == 1
            assert refused.stderr.endswith(f"photos: {said}. Without --strict this is only said\n")
        done = igpt("tokenize", "photos", "-p", "p.npz", "-o", "t.h5")
        assert (done.code, said in done.stderr) == (0, True)
        assert igpt("data", "info", "photos/train", "--strict").code == 0
        (workspace / "photos" / "train" / "cat" / "bad.png").write_bytes(b"x")
        assert "1 image cannot be read" in igpt("data", "info", "photos/train", "--strict").stderr

    def test_an_archive_without_an_end_mark(self, igpt, workspace):
        write_tar(workspace / "x.tar", {f"cat/{i}.png": PNG for i in range(3)}, "w")
        without_end_mark(workspace / "x.tar")
        assert igpt("palette", "fit", "x.tar", "-k", 4, "-o", "p.npz").code == 0
        assert NO_END in igpt("data", "info", "x.tar").stdout
        done = igpt("tokenize", "x.tar", "-p", "p.npz", "-o", "t.h5")
        assert (done.code, NO_END in done.stderr) == (0, True)
        for command in (["data", "info", "x.tar"], ["tokenize", "x.tar", "-p", "p.npz", "-o", "u.h5"]):
            refused = igpt(*command, "--strict")
            assert (refused.code, refused.stderr) == (
                1,
                f"error: x.tar: {NO_END}. Without --strict this is only said\n",
            )
        assert not (workspace / "u.h5").exists()

    def test_column(self, igpt, workspace):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        other = encoded(drawing("square", 1, (16, 16)), ".png")
        pq.write_table(pa.table({"mask": [other] * 8, "image": [PNG] * 8}), "x.parquet")
        assert "sizes: 8x8 (8)" in igpt("data", "info", "x.parquet").stdout
        assert "sizes: 16x16 (8)" in igpt("data", "info", "x.parquet", "--column", "mask", "--strict").stdout
        assert igpt("palette", "fit", "x.parquet", "--column", "mask", "-k", 2, "-o", "p.npz").code == 0
        assert igpt("tokenize", "x.parquet", "-p", "p.npz", "--column", "mask", "--strict", "-o", "t.h5").code == 0

    def test_test_part_is_the_same_part_of_each_class(self, igpt, workspace):
        from igpt_cli.tokens.store import open_tokens

        lay(workspace / "photos", [*tree("{c}/{i}.png", n=10, c=["cat", "dog"]), "owl/0.png"])
        assert igpt("palette", "fit", "photos", "-k", 4, "-o", "p.npz").code == 0
        for seed in (0, 0, 1):
            command = [
                "tokenize",
                "photos",
                "-p",
                "p.npz",
                "--test-part",
                0.2,
                "--seed",
                seed,
                "-o",
                f"{seed}.h5",
                "--force",
            ]
            done = igpt(*command)
            assert "test: 4 of 21 training images are held out, 0.2 of each class, seed" in done.stderr
        files = [open_tokens("0.h5"), open_tokens("1.h5")]
        assert [[f.split(s).class_counts().tolist() for s in ("train", "test")] for f in files] == [
            [[8, 8, 1], [2, 2, 0]]
        ] * 2
        assert files[0].split("test").names != files[1].split("test").names
        assert sorted(files[0].split("train").names + files[0].split("test").names) == sorted(
            r.name for r in open_source(["photos"]).records()
        )
        for part, message in ((1.5, "--test-part is 1.5; it is a part"), (0, "--test-part is 0")):
            assert message in igpt("tokenize", "photos", "-p", "p.npz", "--test-part", part, "-o", "x.h5").stderr
        lay(workspace / "split", SPLITS)
        refused = igpt("tokenize", "split", "-p", "p.npz", "--test-part", 0.2, "-o", "x.h5")
        assert "split has a split test of 4 images; leave out --test-part" in refused.stderr

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                tree("{c}/{i}.png", c=["cat", "dog"]),
                "photos has no split 'test'; its splits: train; --test-part 0.2 holds out",
            ),
            (tree("{s}/cat/{i}.png", s=["train", "test"]), "photos: the training images are all of one class, cat"),
            ([*SPLITS, "test/owl/1.png"], "photos: the test images have classes that the training images lack: owl"),
            (tree("{s}/{i}.png", s=["train", "test"]), "photos: no image of the split 'train' has a label"),
        ],
    )
    def test_probe_refuses_before_anything_is_decoded(self, igpt, workspace, monkeypatch, names, message):
        lay(workspace / "photos", names)
        monkeypatch.setattr("igpt_cli.tokens.open_or_tokenize.tokenize", lambda *_, **__: pytest.fail("decoded"))
        refused = igpt("probe", "builtin:igpt-tiny", "photos", "--layer", 3)
        assert refused.code == 1
        assert f"error: {message}" in refused.stderr

    def test_no_message_names_a_temporary_file_and_results_name_the_images(self, workspace):
        from igpt_cli.errors import MismatchError
        from igpt_cli.palette.palette import Palette
        from igpt_cli.tokens.open_or_tokenize import open_or_tokenize

        lay(workspace / "photos", SPLITS)
        palette = Palette(np.linspace(0, 255, 12).reshape(4, 3).astype(np.float32))
        with pytest.raises(MismatchError, match="^photos is wrong$"):
            with open_or_tokenize("photos", lambda: palette, 8) as file:
                assert file.title == "photos"
                raise MismatchError(f"{file.path} is wrong")
        with pytest.raises(InputError, match="^photos has no split 'val'; its splits: train, test$"):
            with open_or_tokenize("photos", lambda: palette, 8) as file:
                file.split("val")


def test_numbers_have_two_orders():
    from igpt_cli.evaluation.classes import text_order

    assert text_order(["0", "1", "2"]) is None
    assert text_order(["a", "b", "10"]) is None
    names = [str(i) for i in range(12)]
    order = text_order(names)
    assert [sorted(names)[i] for i in order] == names
