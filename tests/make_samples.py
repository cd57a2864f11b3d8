"""Draw the sample images of data/samples, in every format that igpt reads: python tests/make_samples.py

A test draws them again and compares them with those in the repository.
"""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle")
#: Images of each class in train and in test.
COUNTS = {"train": 4, "test": 2}


def drawing(shape: str, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A shape on a shaded ground, RGB."""
    rng = np.random.default_rng([SHAPES.index(shape), seed])
    width, height = size
    ground, stroke = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0.6, 1.0, width)[None, :, None] * np.ones((height, 1, 1))
    image = Image.fromarray((ground * ramp).astype(np.uint8))
    x, y = rng.uniform(0.35, 0.65, 2) * size
    r = rng.uniform(0.2, 0.32) * height
    draw = ImageDraw.Draw(image)
    fill = tuple(int(c) for c in stroke)
    if shape == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill)
    else:
        draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
    return image


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    out = io.BytesIO()
    kind = Image.registered_extensions()[suffix]
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return out.getvalue()


def photos() -> dict[str, bytes]:
    """{split/class/name: encoded image}, in several file types."""
    suffixes = (".jpg", ".png", ".webp", ".bmp", ".gif", ".tif")
    files = {}
    for split, count in COUNTS.items():
        for c, shape in enumerate(SHAPES):
            for i in range(count):
                seed = i + (100 if split == "test" else 0)
                suffix = suffixes[(i + 2 * c) % len(suffixes)]
                options = {"lossless": True} if suffix == ".webp" else {}
                options |= {"compression": "tiff_deflate"} if suffix == ".tif" else {}
                size = (24, 20) if suffix == ".bmp" else (48, 40)
                files[f"{split}/{shape}/{i:02d}{suffix}"] = encoded(drawing(shape, seed, size), suffix, **options)
    return files


def modes() -> dict[str, bytes]:
    """One file for each way in which pixels are stored."""
    rgb = drawing("triangle", 7)
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    clear = rgb.quantize(8)
    clear.info["transparency"] = clear.getpixel((0, 0))
    many = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "rgb.png": encoded(rgb, ".png"),
        "grey.png": encoded(grey, ".png"),
        "grey-16-bit.png": encoded(many, ".png"),
        "grey-and-alpha.png": encoded(alpha.convert("LA"), ".png"),
        "alpha.png": encoded(alpha, ".png"),
        "palette.png": encoded(rgb.quantize(16), ".png"),
        "palette-with-transparency.png": encoded(clear, ".png", transparency=clear.info["transparency"]),
        "black-and-white.png": encoded(grey.convert("1"), ".png"),
        "float.tif": encoded(Image.fromarray(np.asarray(grey, np.float32) / 255), ".tif"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), ".jpg"),
        "turned-by-exif.jpg": encoded(rgb.transpose(Image.Transpose.ROTATE_90), ".jpg", exif=exif),
        "portable.ppm": encoded(rgb.resize((24, 20)), ".ppm"),
    }


def broken() -> dict[str, bytes]:
    """Files that look like images by their names, and are none."""
    good = encoded(drawing("disc", 1), ".jpg")
    png = encoded(drawing("disc", 1), ".png")
    return {
        "good.jpg": good,
        "truncated.jpg": good[: len(good) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.png": b"",
        "text.jpg": b"not an image\n",
        "bomb.png": bomb(60_000, 60_000),
        "photo.heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    }


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that declares very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


def small_images(side: int = 32) -> dict[str, tuple[np.ndarray, list[int]]]:
    """{split: (images (N, side, side, 3) uint8, labels)} for the formats that hold bare pixels; classes mixed."""
    out = {}
    for split, count in COUNTS.items():
        seeds = [(i + (100 if split == "test" else 0), c) for i in range(count // 2) for c in range(len(SHAPES))]
        images = [np.asarray(drawing(SHAPES[c], i, (side, side))) for i, c in seeds]
        out[split] = np.stack(images), [c for _, c in seeds]
    return out


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 and NumPy 1 wrote CIFAR's: text and pixels alike as `str`."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, obj):
        self.write(b"U" + bytes([len(obj)]) + obj if len(obj) < 256 else b"T" + struct.pack("<i", len(obj)) + obj)

    def save_str(self, obj):
        self.save_bytes(obj.encode("ascii"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str


def pickled(thing: object) -> bytes:
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(thing)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def planes(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) -> (N, 3072), as CIFAR stores pixels."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def cifar10() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """CIFAR-10's Python and binary forms, with two batches for training."""
    splits = small_images()
    x, y = planes(splits["train"][0]), splits["train"][1]
    parts = {"data_batch_1": (x[:3], y[:3]), "data_batch_2": (x[3:], y[3:])}
    parts["test_batch"] = planes(splits["test"][0]), splits["test"][1]
    python = {"batches.meta": pickled({b"label_names": list(SHAPES), b"num_vis": 3072, b"num_cases_per_batch": 3})}
    binary = {"batches.meta.txt": "".join(f"{s}\n" for s in SHAPES).encode()}
    for name, (data, labels) in parts.items():
        python[name] = pickled(
            {b"batch_label": name, b"labels": labels, b"data": data, b"filenames": ["x.png"] * len(data)}
        )
        binary[name + ".bin"] = b"".join(
            bytes([label]) + row.tobytes() for row, label in zip(data, labels, strict=True)
        )
    return python, binary


def cifar100() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """CIFAR-100's Python and binary forms."""
    python = {"meta": pickled({b"fine_label_names": list(SHAPES), b"coarse_label_names": ["round", "angular"]})}
    binary = {"fine_label_names.txt": "\n".join(SHAPES).encode(), "coarse_label_names.txt": b"round\nangular\n"}
    for split, (images, labels) in small_images().items():
        coarse = [min(label, 1) for label in labels]
        python[split] = pickled({b"fine_labels": labels, b"coarse_labels": coarse, b"data": planes(images)})
        rows = zip(coarse, labels, planes(images), strict=True)
        binary[split + ".bin"] = b"".join(bytes([c, f]) + row.tobytes() for c, f, row in rows)
    return python, binary


def stl10() -> dict[str, bytes]:
    """STL-10's binary form; the unlabelled part is one image."""
    files = {"class_names.txt": "\n".join(SHAPES).encode()}
    for split, (images, labels) in small_images(96).items():
        files[f"{split}_X.bin"] = np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tobytes()
        files[f"{split}_y.bin"] = bytes(label + 1 for label in labels)
    files["unlabeled_X.bin"] = files["test_X.bin"][: 3 * 96 * 96]
    return files


def write_parquet(path: Path, split: str) -> None:
    """A file as the Hugging Face hub publishes them."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = [(name, data) for name, data in photos().items() if name.startswith(split)]
    labels = [SHAPES.index(name.split("/")[1]) for name, _ in rows]
    names = [name.rpartition("/")[2] for name, _ in rows]
    images = [{"bytes": data, "path": name} for name, (_, data) in zip(names, rows, strict=True)]
    features = (
        '{"image": {"_type": "Image"}, "label": {"names": ["disc", "square", "triangle"], "_type": "ClassLabel"}}'
    )
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": f'{{"info": {{"features": {features}}}}}'},
    )
    pa.parquet.write_table(pa.table({"image": images, "label": labels}, schema=schema), path)


def make_samples(root: Path) -> None:
    """Write all samples below `root`, which is emptied first."""
    shutil.rmtree(root, ignore_errors=True)
    files = photos()
    for folder, content in {"photos": files, "modes": modes(), "broken": broken()}.items():
        for name, data in content.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    inside = {f"photos/{name}": data for name, data in files.items()}
    for suffix, mode in {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}.items():
        write_tar(root / f"photos{suffix}", inside, mode)
    write_zip(root / "photos.zip", inside)
    (root / "webdataset").mkdir()
    for split in COUNTS:
        shard = {}
        for i, name in enumerate(n for n in files if n.startswith(split)):
            shard[f"{i:06d}.cls"] = str(SHAPES.index(name.split("/")[1])).encode()
            shard[f"{i:06d}{Path(name).suffix}"] = files[name]
        write_tar(root / "webdataset" / f"shapes-{split}-000000.tar", shard, "w")
    (root / "parquet").mkdir()
    for split in COUNTS:
        write_parquet(root / "parquet" / f"{split}-00000-of-00001.parquet", split)
    python10, binary10 = cifar10()
    python100, binary100 = cifar100()
    for name, content in {"cifar-10-batches-py": python10, "cifar-100-binary": binary100}.items():
        (root / name).mkdir()
        for file, data in content.items():
            (root / name / file).write_bytes(data)
    archives = {
        "cifar-10-binary.tar.gz": ("cifar-10-batches-bin", binary10),
        "cifar-100-python.tar.gz": ("cifar-100-python", python100),
        "stl10_binary.tar.gz": ("stl10_binary", stl10()),
    }
    for name, (folder, content) in archives.items():
        write_tar(root / name, {f"{folder}/{n}": d for n, d in content.items()}, "w:gz")
    small = small_images()
    np.save(root / "shapes.npy", small["train"][0])
    arrays = {f"{split}_images": images for split, (images, _) in small.items()}
    arrays |= {f"{split}_labels": np.array(labels) for split, (_, labels) in small.items()}
    np.savez_compressed(root / "shapes.npz", classes=np.array(SHAPES), **arrays)


if __name__ == "__main__":
    make_samples(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "data" / "samples")
