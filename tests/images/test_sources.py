"""Every form in which images come gives the same images."""

import io
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_samples import SHAPES, drawing, encoded, make_samples, photos, small_images, write_tar, write_zip
from PIL import Image

from igpt_cli.errors import IgptError, InputError
from igpt_cli.images import archives
from igpt_cli.images.decode import BadImageError, load_rgb
from igpt_cli.images.sources import open_source, paths_from

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
PNG = encoded(drawing("disc", 0, (8, 8)), ".png")


def pixels(record) -> np.ndarray:
    return np.asarray(load_rgb(record.data))


def content(source) -> set:
    """What there is in a source but the names: {(split, class name, pixels)}."""
    classes = {-1: None} | dict(enumerate(source.classes))
    return {(r.split, classes[r.label], pixels(r).tobytes()) for r in source.records()}


@pytest.fixture(scope="module")
def drawn() -> set:
    """The photos as the script draws them, decoded by Pillow alone."""
    return {
        (*name.split("/")[:2], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes())
        for name, data in photos().items()
    }


def test_the_samples_are_what_the_script_draws(tmp_path):
    make_samples(tmp_path / "new")
    stored, new = (sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in (SAMPLES, tmp_path / "new"))
    assert stored == new
    assert sum(p.stat().st_size for p in SAMPLES.rglob("*")) < 400_000
    for one in ("photos", "modes", "stl10_binary.tar.gz", "cifar-10-batches-py", "shapes.npz"):
        a, b = (list(open_source([root / one]).records()) for root in (SAMPLES, tmp_path / "new"))
        assert [(r.name, r.split, r.label) for r in a] == [(r.name, r.split, r.label) for r in b]
        for x, y in zip(a, b, strict=True):
            # encoders differ a little between releases of Pillow
            assert np.abs(pixels(x).astype(int) - pixels(y)).mean() < 2, x.name


@pytest.mark.parametrize(
    "form", ["photos", "photos.tar", "photos.tar.gz", "photos.tar.bz2", "photos.tar.xz", "photos.zip", "parquet"]
)
def test_photos_are_the_same_in_every_form(form, drawn):
    source = open_source([SAMPLES / form])
    assert source.classes == sorted(SHAPES)
    assert source.counts == {"train": 12, "test": 6}
    assert content(source) == drawn
    names = [r.name for r in source.records()]
    assert len(set(names)) == 18
    assert names == [r.name for r in source.records()]
    if form != "parquet":
        assert sorted(n.removeprefix("photos/") for n in names) == sorted(photos())


def test_webdataset_labels_are_the_numbers(drawn):
    source = open_source([SAMPLES / "webdataset"])
    assert source.classes == ["0", "1", "2"]
    assert source.counts == {"train": 12, "test": 6}
    assert content(source) == {(split, str(SHAPES.index(name)), data) for split, name, data in drawn}
    assert next(r.name for r in source.records()) == "shapes-test-000000/000000.jpg"


def test_webdataset_classes_may_be_names_and_unused_numbers_keep_their_place(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.cls": b"3\n", "0.png": PNG, "1.png": PNG}, "w")
    source = open_source([tmp_path / "a.tar"])
    assert (source.classes, [r.label for r in source.records()]) == (["0", "1", "2", "3"], [3, -1])
    write_tar(tmp_path / "b.tar", {"x/0.cls": b"owl", "x/0.png": PNG, "x/1.cls": b"cat", "x/1.png": PNG}, "w")
    source = open_source([tmp_path / "b.tar"])
    assert (source.classes, [r.label for r in source.records()]) == (["cat", "owl"], [1, 0])


@pytest.mark.parametrize(
    "form",
    ["cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-100-binary", "cifar-100-python.tar.gz", "shapes.npz"],
)
def test_bare_pixels_come_back(form):
    source = open_source([SAMPLES / form])
    records = list(source.records())
    assert source.classes == list(SHAPES)
    for split, (images, labels) in small_images().items():
        mine = [r for r in records if r.split == split]
        np.testing.assert_array_equal(np.stack([r.data for r in mine]), images)
        assert [r.label for r in mine] == labels


def test_stl10_is_turned_upright_and_unlabelled_images_are_a_split_of_their_own():
    source = open_source([SAMPLES / "stl10_binary.tar.gz"])
    assert source.counts == {"train": 6, "test": 3, "unlabeled": 1}
    expected = small_images(96)
    for split in ("train", "test"):
        mine = [r for r in source.records() if r.split == split]
        np.testing.assert_array_equal(np.stack([r.data for r in mine]), expected[split][0])
        assert [r.label for r in mine] == expected[split][1]
    assert [(r.label, r.name) for r in source.records()][-1] == (-1, "unlabeled/000000")


def test_npy():
    source = open_source([SAMPLES / "shapes.npy"])
    np.testing.assert_array_equal(np.stack([r.data for r in source.records()]), small_images()["train"][0])


def test_the_embedded_emoji_are_split_by_character():
    for paths in ([], ["embedded"]):
        source = open_source(paths)
        assert (source.kind, source.description, len(source.classes)) == ("embedded", "embedded", 9)
        assert source.counts == {"train": 3022, "test": 790}
    characters: dict[str, set[str]] = {}
    for record in source.records():
        image = load_rgb(record.data)
        assert image.size == (64, 64)
        characters.setdefault(record.split, set()).add(
            re.sub("^(man|woman|person|men|women)-|-(noto|twemoji).webp$", "", record.name.split("/")[2])
        )
    assert len(characters["test"]) < 395  # both drawings of a character, and its variants, count once
    assert not characters["train"] & characters["test"]


def test_a_list_of_files_reads_folders_as_the_folder_itself_does(drawn):
    files = sorted(p for p in (SAMPLES / "photos").rglob("*") if p.is_file())
    source = open_source(files)
    assert content(source) == drawn
    assert [r.name for r in source.records()] == [f.as_posix() for f in files]
    only_test = open_source([f for f in files if "test" in f.parts])
    assert only_test.counts == {"test": 6}
    assert only_test.classes == sorted(SHAPES)
    one = open_source([files[0], files[0]])
    assert (one.classes, len({r.name for r in one.records()})) == ([], 2)


def test_several_sources_become_one(tmp_path, drawn):
    write_zip(tmp_path / "more.zip", {"zebra/1.png": PNG, "disc/2.png": PNG, "__MACOSX/zebra/._1.png": b"x"})
    source = open_source([SAMPLES / "photos", tmp_path / "more.zip", SAMPLES / "modes" / "rgb.png"])
    assert source.classes == ["disc", "square", "triangle", "zebra"]
    assert source.counts == {"train": 15, "test": 6}
    labels = {r.name: source.classes[r.label] if r.label >= 0 else None for r in source.records()}
    assert len(labels) == 21
    assert labels["more/zebra/1.png"] == "zebra"
    assert labels["more/disc/2.png"] == "disc"
    assert drawn < content(source)


def test_a_folder_of_archives_and_the_archives_themselves_are_the_same(tmp_path):
    for name in ("b.tar", "a.tar"):
        write_tar(tmp_path / name, {"dog/1.png": PNG, "cat/1.png": PNG} if name == "a.tar" else {"owl/1.png": PNG}, "w")
    folder = open_source([tmp_path])
    assert folder.classes == ["cat", "dog", "owl"]
    assert [r.name for r in folder.records()] == ["a/dog/1.png", "a/cat/1.png", "b/owl/1.png"]
    files = open_source([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert list(files.records()) == list(folder.records())
    assert open_source([SAMPLES / "photos.tar", SAMPLES / "photos.zip"]).counts == {"train": 24, "test": 12}


def test_fetched_archive_is_found_in_its_folder(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes((SAMPLES / "cifar-10-binary.tar.gz").read_bytes())
    assert open_source([tmp_path]).kind == "cifar10"


def test_what_is_passed_over_in_folders_and_archives(tmp_path):
    files = {"cat/1.png": PNG, "cat/._1.png": b"x", "cat/Thumbs.db": b"x", "dog/.DS_Store": b"x", "dog/2.png": PNG}
    files |= {"__MACOSX/cat/1.png": b"x", "notes.txt": b"x"}
    for name, data in files.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    (tmp_path / "f" / "again").symlink_to(tmp_path / "f")  # a loop
    (tmp_path / "f" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source([tmp_path / "f"])
    assert [r.name for r in source.records()] == ["cat/1.png", "cat/gone.png", "dog/2.png"]
    assert source.notes == ["1 files that are no images were passed over (1 .txt file)"]
    with pytest.raises(BadImageError, match="No such file"):
        load_rgb(next(r for r in source.records() if "gone" in r.name).data)


def test_links_and_paths_in_archives_are_only_names(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name, kind, target in [
            ("link.png", tarfile.SYMTYPE, str(secret)),
            ("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name in ("../../up/1.png", "/abs/2.png"):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    before = sorted(tmp_path.rglob("*"))
    records = list(open_source([tmp_path / "evil.tar"]).records())
    assert [(r.name, r.data) for r in records] == [("../../up/1.png", PNG), ("/abs/2.png", PNG)]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_those_of_tarfile(tmp_path, form):
    names = (
        ["a/ü.png", "b/" + "long" * 30 + ".png", "c.png"] if form != tarfile.USTAR_FORMAT else ["d" * 80 + "/e" * 40]
    )
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = i * 600
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    tar = archives.Tar(tmp_path / "t.tar")
    with tarfile.open(tmp_path / "t.tar") as oracle:
        expected = [(m.name, oracle.extractfile(m).read()) for m in oracle if m.isreg() and m.name in names]
    members = [m for m in tar.members if m.name in names]
    assert list(zip([m.name for m in members], tar.read(members), strict=True)) == expected


def test_an_absurd_size_in_an_archive_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST_IMAGE", 1000)
    monkeypatch.setattr(archives.Tar.read, "__defaults__", (1000,))
    monkeypatch.setattr(archives.Zip.read, "__defaults__", (1000,))
    files = {"a/1.png": PNG[:900], "a/2.png": bytes(2000), "b/3.png": PNG[:900]}
    write_tar(tmp_path / "x.tar", files, "w")
    write_zip(tmp_path / "x.zip", files)
    for name in ("x.tar", "x.zip"):
        records = list(open_source([tmp_path / name]).records())
        assert [len(r.data) for r in records] == [len(PNG[:900]), 0, len(PNG[:900])]
        with pytest.raises(BadImageError, match="it is said to hold 0 MB; more than 0 MB is refused"):
            load_rgb(records[1].data)
        assert pickle.loads(pickle.dumps(records[1])).data.reason == records[1].data.reason


def test_a_damaged_or_encrypted_zip_member_is_a_bad_image(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", PNG)
        archive.writestr("b.png", PNG)
    data = bytearray(path.read_bytes())
    data[data.index(PNG) + 50] ^= 255  # the first member's bytes no longer fit their checksum
    second = data.rindex(b"PK\x01\x02")
    data[second + 8] |= 1  # the second one claims to be encrypted
    path.write_bytes(data)
    reasons = []
    for record in open_source([path]).records():
        with pytest.raises(BadImageError) as e:
            load_rgb(record.data)
        reasons.append(e.value.reason)
    assert reasons == ["it is damaged in the archive (Bad CRC-32 for file 'a.png')", "it is encrypted in the archive"]


def test_paths_from():
    assert paths_from(io.BytesIO(b"a b.jpg\r\n\nc.jpg")) == [Path("a b.jpg"), Path("c.jpg")]
    assert paths_from(io.BytesIO(b"a\nb.jpg\0c.jpg\0"), null=True) == [Path("a\nb.jpg"), Path("c.jpg")]
    assert paths_from(io.BytesIO(b"\xff.jpg")) == [Path(os.fsdecode(b"\xff.jpg"))]
    with pytest.raises(InputError, match="separated by NUL; read them with -0"):
        paths_from(io.BytesIO(b"a.jpg\0b.jpg\0"))


def test_parquet_without_pyarrow_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'igpt-cli\[parquet\]'"):
        open_source([SAMPLES / "parquet"])


def test_parquet_of_other_people(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"img": [PNG, None, PNG], "label": ["owl", "cat", None]}), tmp_path / "a.parquet")
    source = open_source([tmp_path / "a.parquet"])
    records = list(source.records())
    assert (source.classes, [r.label for r in records]) == (["cat", "owl"], [1, 0, -1])
    with pytest.raises(BadImageError, match="holds no bytes"):
        load_rgb(records[1].data)
    image = pa.array([{"bytes": None, "path": "/etc/passwd"}])
    pq.write_table(pa.table({"image": image, "label": [7]}), tmp_path / "b.parquet")
    source = open_source([tmp_path / "b.parquet"])
    assert source.classes == [str(i) for i in range(8)]
    with pytest.raises(BadImageError, match="only a path, which is not followed"):
        load_rgb(next(source.records()).data)


def test_every_record_can_be_sent_to_another_process():
    for form in ("photos", "photos.zip", "shapes.npz", "stl10_binary.tar.gz", "broken"):
        for record in open_source([SAMPLES / form]).records():
            assert pickle.loads(pickle.dumps(record)).name == record.name


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 99)), st.integers(0, 255), min_size=1
    ),
    st.sampled_from(["w", "w:gz"]),
)
@settings(max_examples=20, deadline=None)
def test_folder_tar_and_zip_agree(tmp_path_factory, images, mode):
    root = tmp_path_factory.mktemp("same")
    files = {}
    for (top, cls, number), value in images.items():
        image = encoded(Image.new("RGB", (3, 2), (value, 0, number)), ".png")
        files[f"top{top}/{cls}/{number}.png"] = image
        (root / "f" / f"top{top}/{cls}").mkdir(parents=True, exist_ok=True)
        (root / "f" / f"top{top}/{cls}/{number}.png").write_bytes(image)
    write_tar(root / "t", files, mode)
    write_zip(root / "z", files)
    found = [content(open_source([root / f])) for f in ("t", "z")]
    assert found[0] == found[1]
    assert {p for _, _, p in found[0]} == {p for _, _, p in content(open_source([root / "f"]))}
    assert len(open_source([root / "t"])) == len(images)


@given(st.binary(max_size=300), st.sampled_from(["", ".tar", ".zip", ".npy", ".npz", ".parquet", ".jpg", ".tar.gz"]))
@settings(max_examples=30, deadline=None)
def test_any_bytes_give_a_source_or_one_clear_error(tmp_path_factory, data, suffix):
    heads = {".zip": b"PK\x03\x04", ".npz": b"PK\x03\x04", ".npy": b"\x93NUMPY\x01\x00", ".parquet": b"PAR1"}
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    path.write_bytes(heads.get(suffix, b"\x1f\x8b" if suffix == ".tar.gz" else b"") + data)
    try:
        source = open_source([path])
    except IgptError as e:
        message = str(e)
    else:
        message = str(path)
        for record in source.records():
            with pytest.raises(BadImageError):
                load_rgb(record.data)
    assert str(path) in message


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_a_damaged_archive_never_raises_anything_else(tmp_path_factory, place, value):
    data = bytearray((SAMPLES / "photos.tar.gz").read_bytes())
    data[place % len(data)] = value
    path = tmp_path_factory.mktemp("damaged") / "x.tar.gz"
    path.write_bytes(data[: len(data) - (value % 3) * 100])
    message = str(path)
    reasons = []
    try:
        for record in open_source([path]).records():
            try:
                load_rgb(record.data)
            except BadImageError as e:
                reasons.append(e.reason)
    except InputError as e:
        message = str(e)
    assert str(path) in message
    assert all(reasons)
