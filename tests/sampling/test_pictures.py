"""Pictures show every pixel as it is; files keep what made them; the GIF ends with the images, read by two decoders."""

import errno
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from igpt_cli import __version__
from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.palette.palette import Palette, psnr_of
from igpt_cli.sampling import pictures
from igpt_cli.sampling.gif import frame_steps, raster_gif
from igpt_cli.sampling.pictures import (
    CHECKER,
    GAP,
    LINE,
    captioned,
    completions,
    default_columns,
    default_zoom,
    enlarged,
    grid,
    read_settings,
    with_missing,
    with_nearest,
    write_npz,
    write_picture,
)

RNG = np.random.default_rng(0)
HARD = {"seed": 3, "run": "runs/größe-画像", "name": "\udcff", "top_p": None, "files": ["a.png"]}


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), np.uint8)


def cut(picture: Image.Image, x: int, y: int, side: int, zoom: int) -> np.ndarray:
    """An image of a picture at (x, y), one number for each of its pixels, which must be squares of one colour."""
    shown = np.asarray(picture)[y : y + side * zoom, x : x + side * zoom]
    small = shown[::zoom, ::zoom]
    np.testing.assert_array_equal(shown, enlarged(small, zoom))
    return small


# Grids.


@pytest.mark.parametrize(("n", "zoom"), [(1, 1), (2, 3), (7, 2), (16, 4)])
def test_a_grid_holds_every_image_as_it_is(n, zoom):
    images, columns = noise(n, 6, 6), default_columns(n)
    picture, step = grid(images, zoom=zoom), 6 * zoom + GAP
    assert picture.mode == "RGB"
    assert picture.size == (columns * step + GAP, -(-n // columns) * step + GAP)
    seen = np.zeros(picture.size[::-1], bool)
    for i in range(n):
        x, y = GAP + i % columns * step, GAP + i // columns * step
        np.testing.assert_array_equal(cut(picture, x, y, 6, zoom), images[i])
        seen[y : y + 6 * zoom, x : x + 6 * zoom] = True
    assert (np.asarray(picture)[~seen] == 255).all()


def test_a_caption_stands_below_and_changes_nothing_above():
    picture = grid(noise(4, 8, 8), zoom=8)
    short, long = (
        captioned(picture, "igpt-tiny"),
        captioned(picture, "igpt-tiny after 1,000 steps; temperature 1, seed 0"),
    )
    for under in (short, long):
        assert under.crop((0, 0, *picture.size)).tobytes() == picture.tobytes()
        assert under.width == picture.width
    assert 0 < short.height - picture.height < long.height - picture.height
    text = np.asarray(long)[picture.height :]
    assert (text != 255).any((1, 2)).sum() > 20  # two lines of letters
    assert (text[:, -1] == 255).all()


def test_columns_and_zoom_can_be_chosen():
    assert grid(noise(6, 4, 4), columns=6, zoom=5).size == (6 * 22 + 2, 24)


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (7, 4), (8, 4), (16, 4), (64, 8)])
def test_grids_are_about_square(n, columns):
    assert default_columns(n) == columns


def test_no_grid_is_long_or_full_of_holes():
    for n in range(1, 500):
        columns = default_columns(n)
        rows = -(-n // columns)
        assert rows <= columns <= 3 * rows, n
        assert columns * rows - n < columns, n


@pytest.mark.parametrize(("n", "R", "side"), [(1, 32, 128), (16, 32, 128), (16, 64, 128), (100, 32, 64), (100, 64, 64)])
def test_images_are_128_pixels_wide_or_64_if_many(n, R, side):
    assert default_zoom(n, R) * R == side


def test_white_stays_white_and_black_black():
    """Palettes in 0..255, and in -1..1 as OpenAI's: rint(127.5 * (c + 1)), 255 and not 254 at the end."""
    tokens = np.array([[0, 1], [1, 0]])
    for centers in ([[0, 0, 0], [255, 255, 255]], 127.5 * (np.float32([[-1, -1, -1], [1, 1, 1]]) + 1)):
        picture = grid(Palette(centers).dequantize(tokens)[None], zoom=1)
        assert np.asarray(picture)[GAP:-GAP, GAP:-GAP, 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize(
    "images", [noise(0, 4, 4), noise(2, 4, 5), noise(4, 4), noise(2, 4, 4).astype(float), np.zeros((2, 4, 4), np.uint8)]
)
def test_what_is_no_images_is_refused_with_its_shape(images):
    with pytest.raises(InputError, match=r"images are to be uint8 \(.*, 3\), not "):
        grid(images)


# Completions.


def test_what_is_missing_is_a_checker():
    images, missing = noise(2, 4, 4), RNG.random((2, 4, 4)) < 0.5
    shown = with_missing(images, missing)
    np.testing.assert_array_equal(shown[~missing], images[~missing])
    row, column = np.indices((2, 4, 4))[1:]
    np.testing.assert_array_equal(shown[missing], np.array(CHECKER)[(row + column) % 2][missing])


@pytest.mark.parametrize(("n", "k", "known"), [(1, 1, True), (2, 3, False), (2, 4, True), (9, 2, True)])
def test_completions_are_rows_of_input_outputs_original(n, k, known):
    R, zoom = 8, 8
    missing = RNG.random((n, R, R)) < 0.5
    inputs, outputs, originals = noise(n, R, R), noise(n, k, R, R), noise(n, R, R)
    picture = completions(inputs, missing, outputs, originals if known else None, zoom)
    shown = np.asarray(picture)
    rows = [[with_missing(inputs, missing)[i], *outputs[i], *([originals[i]] if known else [])] for i in range(n)]
    found = {}  # where each image lies: each is there once, and its rows stand below each other
    for i, row in enumerate(rows):
        places = [place(shown, enlarged(image, zoom)) for image in row]
        assert len({y for _, y in places}) == 1
        assert [x for x, _ in places] == sorted(x for x, _ in places)
        found[i] = places[0]
    lefts = {x for x, _ in found.values()}
    assert len(set(found.values())) == n
    assert max(y for _, y in found.values()) < 3 * shown.shape[1]
    assert len(lefts) == (1 if n < 9 else len(lefts))
    title = shown[:LINE]
    assert (title < 200).any()  # captions


def place(picture: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """The one (x, y) at which an image lies in a picture."""
    side = len(image)
    corners = np.argwhere((picture[: -side + 1 or None, : -side + 1 or None] == image[0, 0]).all(-1))
    hits = [(int(x), int(y)) for y, x in corners if np.array_equal(picture[y : y + side, x : x + side], image)]
    assert len(hits) == 1, hits
    return hits[0]


@pytest.mark.parametrize("n", [3, 16, 64])
def test_many_rows_go_on_in_further_columns(n):
    width, height = completions(noise(n, 8, 8), np.ones((n, 8, 8), bool), noise(n, 2, 8, 8), zoom=8).size
    assert height <= 2 * width
    assert width <= 4 * height


def test_completions_of_other_shapes_are_refused():
    inputs, missing, outputs = noise(2, 4, 4), np.ones((2, 4, 4), bool), noise(2, 3, 4, 4)
    for wrong, told in [
        ((inputs, missing[:1], outputs), r"missing are to be bool \(2, 4, 4\), not bool \(1, 4, 4\)"),
        ((inputs, missing.astype(int), outputs), "missing are to be bool .* not int64"),
        ((inputs, missing, outputs[:, 0]), r"outputs are to be uint8 \(2, 1, 4, 4, 3\), not uint8 \(2, 4, 4, 3\)"),
        ((inputs, missing, outputs, noise(2, 5, 5)), "originals are to be"),
    ]:
        with pytest.raises(InputError, match=told):
            completions(*wrong)


# Nearest.


def test_each_sample_stands_beside_its_nearest_and_copies_are_marked():
    samples, nearest = noise(3, 8, 8), noise(3, 2, 8, 8)
    nearest[1, 0] = samples[1]
    distances = np.array([[3.0, 4.0], [0.0, 9.0], [0.04, 12.5]])
    shown = np.asarray(with_nearest(samples, nearest, distances, zoom=8))
    red = (shown == np.array([200, 30, 30])).all(-1)
    for i in (0, 2):
        x, y = place(shown, enlarged(samples[i], 8))
        for image in nearest[i]:
            at = place(shown, enlarged(image, 8))
            assert at[1] == y
            assert at[0] > x
    assert not red[: LINE + 64].any()  # row 0
    rows = np.flatnonzero(red.any(1))
    assert 64 < rows[-1] - rows[0] < 64 + 3 * LINE  # the frame and the word of one picture
    plain = np.asarray(with_nearest(samples, nearest, distances + 1, zoom=8))
    assert not (plain == np.array([200, 30, 30])).all(-1).any()


def test_distances_are_told_so_that_only_a_copy_is_nought():
    assert [pictures._distance_text(d) for d in (0.0, 0.004, 0.04, 0.06, 3.25, 101.96)] == [
        *("copy", "0.004", "0.04", "0.1", "3.2", "102.0")
    ]


def test_names_take_a_line_and_do_not_run_into_the_next_picture():
    samples, nearest = noise(1, 8, 8), noise(1, 2, 8, 8)
    plain = with_nearest(samples, nearest, np.ones((1, 2)), zoom=8)
    named = with_nearest(samples, nearest, np.ones((1, 2)), [["W" * 100, ""]], zoom=8)
    assert named.size == (plain.width, plain.height + LINE)
    x, y = place(np.asarray(named), enlarged(nearest[0, 1], 8))
    line = np.asarray(named)[y + 64 + LINE + 2 :]
    assert (line[:, x - 64 : x] < 128).any()
    assert (line[:, x:] == 255).all()
    with pytest.raises(InputError, match=r"distances and names are to be \(1, 2\)"):
        with_nearest(samples, nearest, np.ones((1, 2)), [["only one"]])


# PNG and npz.


def test_a_png_keeps_pixels_and_settings(tmp_path):
    picture = grid(noise(2, 4, 4))
    write_picture(picture, tmp_path / "a.png", HARD)
    with Image.open(tmp_path / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))
        assert read.info["Software"] == f"igpt {__version__}"
        assert json.loads(read.info["igpt"]) == HARD
    assert read_settings(tmp_path / "a.png") == HARD


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_files_without_settings_are_refused(tmp_path):
    write_picture(grid(noise(1, 4, 4)), tmp_path / "good.png", {})
    data = (tmp_path / "good.png").read_bytes()
    start, rest = data[:33], data[data.index(b"IDAT") - 4 :]
    hostile = {
        "plain.png": b"",
        "text.png": chunk(b"tEXt", b"igpt\0not JSON"),
        "list.png": chunk(b"tEXt", b"igpt\0[1]"),
        "deep.png": chunk(b"tEXt", b"igpt\0" + b"[" * 100_000),
        "long.png": chunk(b"tEXt", b'igpt\0{"a": "' + b"x" * 2_000_000 + b'"}'),
        "bomb.png": chunk(b"zTXt", b"igpt\0\0" + zlib.compress(bytes(50_000_000))),
    }
    for name, text in hostile.items():
        (tmp_path / name).write_bytes(start + text + rest)
        with pytest.raises(FormatError, match=f"{name} (has no settings of igpt in it|cannot be read as a PNG or GIF)"):
            read_settings(tmp_path / name)
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(FormatError, match=r"image.jpg cannot be read as a PNG or GIF"):
        read_settings(tmp_path / "image.jpg")
    with pytest.raises(InputError, match=r"none.png does not exist"):
        read_settings(tmp_path / "none.png")


def test_settings_that_no_reader_would_take_are_not_written(tmp_path):
    with pytest.raises(InputError, match="2,000,009 characters of settings are too many"):
        write_picture(grid(noise(1, 4, 4)), tmp_path / "a.png", {"a": "x" * 2_000_000})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", ["png", "gif", "npz"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, written):
    images, path = noise(2, 4, 4), tmp_path / f"a.{written}"
    path.write_bytes(b"old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(np, "savez_compressed", full)
    write = {
        "png": lambda: write_picture(grid(images), path, {}),
        "gif": lambda: raster_gif(images, raster(2, 4), path, {}),
        "npz": lambda: write_npz(path, np.zeros((2, 16), int), images, {}),
    }
    with pytest.raises(OutputError, match=f"a.{written}: No space left"):
        write[written]()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_arrays_are_kept_with_their_dtypes(tmp_path):
    tokens, images = RNG.integers(0, 1 << 16, (2, 3, 16)), noise(2, 3, 4, 4)
    more = {"originals": noise(2, 4, 4), "missing": RNG.random((2, 4, 4)) < 0.5}
    write_npz(tmp_path / "a.npz", tokens, images, HARD, **more)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file.files) == {"tokens", "images", "settings", "originals", "missing"}
        assert file["tokens"].dtype == np.uint16
        assert json.loads(str(file["settings"])) == HARD
        for name, array in {"tokens": tokens, "images": images, **more}.items():
            np.testing.assert_array_equal(file[name], array)
            assert file[name].dtype == (np.uint16 if name == "tokens" else array.dtype)


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    images = noise(2, 4, 4)
    for tokens in (np.zeros((2, 15), int), np.zeros((3, 16), int), np.full((2, 16), -1), np.full((2, 16), 1 << 16)):
        with pytest.raises(InputError, match=r"images are to be uint8|tokens are to be \(..., 16\) in 0..65535"):
            write_npz(tmp_path / "a.npz", tokens, images, {})
    assert list(tmp_path.iterdir()) == []


# The GIF.


def raster(n: int, R: int, given: int = 0) -> np.ndarray:
    order = np.arange(1, R * R + 1)
    return np.tile(np.where(order <= given, 0, order), (n, 1))


def frames_by_pillow(path) -> list[np.ndarray]:
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


def unpacked(data: bytes, bits: int, n: int) -> list[int]:
    """GIF's LZW, written from the specification."""
    clear, out, position, last = 1 << bits, [], 0, None
    number, width, table = int.from_bytes(data, "little"), bits + 1, []
    while len(out) <= n:
        code = number >> position & (1 << width) - 1
        position += width
        if code == clear:
            table, width, last = [[i] for i in range(clear)] + [[], []], bits + 1, None
        elif code == clear + 1:
            break
        else:
            entry = table[code] if code < len(table) else [*last, last[0]]
            out += entry
            if last is not None and len(table) < 4096:
                table.append([*last, entry[0]])
                width += len(table) == 1 << width and width < 12
            last = entry
    return out


def frames_by_hand(path) -> tuple[list[np.ndarray], list[int], bytes]:
    """The frames (H, W, 3) of a GIF, what each lasts in hundredths of a second, and the comment."""
    data = path.read_bytes()
    width, height, flags = struct.unpack("<HHB", data[6:11])
    at = 13 + 3 * (2 << (flags & 7))
    shared, canvas, frames, lasts, comment = data[13:at], np.zeros((height, width, 3), np.uint8), [], [], b""

    def blocks(at: int) -> tuple[bytes, int]:
        out = b""
        while data[at]:
            out, at = out + data[at + 1 : at + 1 + data[at]], at + 1 + data[at]
        return out, at + 1

    while data[at] != 0x3B:
        if data[at] == 0x21:
            kind, (body, at) = data[at + 1], blocks(at + 2)
            if kind == 0xF9:
                disposal, hidden = body[0] >> 2 & 7, body[3] if body[0] & 1 else None
                assert disposal in (0, 1)
                lasts.append(struct.unpack("<H", body[1:3])[0])
            comment = body if kind == 0xFE else comment
            continue
        x, y, w, h, flags = struct.unpack("<HHHHB", data[at + 1 : at + 10])
        assert not flags & 0x40, "interlaced"
        end = at + 10 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0)
        colours = np.frombuffer(data[at + 10 : end] or shared, np.uint8).reshape(-1, 3)
        packed, at = blocks(end + 1)
        index = np.array(unpacked(packed, data[end], w * h)).reshape(h, w)
        canvas[y : y + h, x : x + w][index != hidden] = colours[index[index != hidden]]
        frames.append(canvas.copy())
    return frames, lasts, comment


@pytest.mark.parametrize("given", [0, 8])
def test_a_gif_is_the_raster_being_filled(tmp_path, given):
    images, order = noise(3, 4, 4), raster(3, 4, given)
    raster_gif(images, order, tmp_path / "a.gif", HARD, seconds=1.6, zoom=2)
    frames, lasts, comment = frames_by_hand(tmp_path / "a.gif")
    assert len(frames) == 16 - given + 1
    for step, frame in zip([0, *range(given + 1, 17)], frames):
        missing = (order > step).reshape(3, 4, 4)
        np.testing.assert_array_equal(frame, np.asarray(grid(with_missing(images, missing), zoom=2)))
    np.testing.assert_array_equal(np.stack(frames_by_pillow(tmp_path / "a.gif")), np.stack(frames))
    assert lasts[0] == 50
    assert set(lasts[1:-1]) == {10 if given == 0 else 20}
    assert lasts[-1] == 200
    assert json.loads(comment) == HARD == read_settings(tmp_path / "a.gif")
    assert b"NETSCAPE2.0\x03\x01\x00\x00" in (tmp_path / "a.gif").read_bytes()  # for ever


def test_rounds_of_unmasking_are_frames(tmp_path):
    images, order = noise(2, 8, 8), RNG.integers(0, 6, (2, 64))
    raster_gif(images, order, tmp_path / "a.gif", {}, zoom=1)
    frames = frames_by_pillow(tmp_path / "a.gif")
    assert len(frames) == 6
    for step, frame in enumerate(frames):
        shown = with_missing(images, (order > step).reshape(2, 8, 8))
        np.testing.assert_array_equal(frame, np.asarray(grid(shown, zoom=1)))


@pytest.mark.parametrize("colours", [2, 252, 253, 254, 255])
def test_up_to_255_colours_are_shown_exactly(tmp_path, colours):
    drawn = np.unique(noise(400), axis=0)[:colours]
    images = drawn[np.concatenate([np.arange(colours), RNG.integers(colours, size=512 - colours)])].reshape(
        2, 16, 16, 3
    )
    assert len(np.unique(images.reshape(-1, 3), axis=0)) == colours
    raster_gif(images, raster(2, 16), tmp_path / "a.gif", {}, zoom=1)
    first, *_, last = frames_by_pillow(tmp_path / "a.gif")
    for i, image in enumerate(images):
        place(last, image)
        np.testing.assert_array_equal(last[GAP : GAP + 16, GAP + 18 * i : GAP + 18 * i + 16], image)
    if colours <= 252:
        np.testing.assert_array_equal(last, np.asarray(grid(images, zoom=1)))
        assert set(map(tuple, first.reshape(-1, 3).tolist())) == {*CHECKER, (255, 255, 255)}


def test_more_colours_are_shown_closely(tmp_path):
    """Smooth colour, 4,608 shades: at least 38 dB, and paper and checker as they are."""
    x, y = np.meshgrid(np.arange(48), np.arange(48))
    images = np.stack([np.stack([2 * x, 2 * y + 40 * i, (x + y) // 2 + 90], -1) for i in range(2)]).astype(np.uint8)
    raster_gif(images, raster(2, 48), tmp_path / "a.gif", {}, zoom=1)
    first, *_, last = frames_by_pillow(tmp_path / "a.gif")
    assert len(np.unique(images.reshape(-1, 3), axis=0)) == 4608
    wanted = np.asarray(grid(images, zoom=1)).astype(float)
    assert psnr_of(3 * np.mean((last - wanted) ** 2)) > 38
    assert (last[:GAP] == 255).all()
    assert set(map(tuple, first.reshape(-1, 3).tolist())) == {*CHECKER, (255, 255, 255)}


@pytest.mark.parametrize(("R", "frames"), [(4, 17), (8, 65), (32, 33), (48, 49), (64, 65)])
def test_a_frame_is_a_row_where_there_are_more_than_64_pixels(R, frames):
    steps = frame_steps(raster(1, R), R)
    assert len(steps) == frames
    assert steps[0] == 0
    assert steps[-1] == R * R
    if R >= 32:
        np.testing.assert_array_equal(steps, np.arange(0, R * R + 1, R))


def test_there_are_never_more_than_65_frames_and_the_last_is_complete():
    for n_steps in (0, 1, 2, 63, 64, 65, 70, 128, 129, 1000, 2304):
        order = np.minimum(np.arange(2304), n_steps)[None]
        steps = frame_steps(order, 48)
        assert len(steps) <= 65
        assert len(steps) > min(n_steps, 24)
        assert steps[-1] == min(n_steps, 2303)


def test_images_of_which_nothing_is_missing_make_a_still(tmp_path):
    images = noise(1, 4, 4)
    raster_gif(images, np.zeros((1, 16), int), tmp_path / "a.gif", {"a": 1}, zoom=1)
    (frame,) = frames_by_pillow(tmp_path / "a.gif")
    np.testing.assert_array_equal(frame, np.asarray(grid(images, zoom=1)))
    assert read_settings(tmp_path / "a.gif") == {"a": 1}


@pytest.mark.parametrize(
    "order", [np.zeros((2, 15), int), np.zeros((1, 16), int), np.zeros((2, 16)), -np.ones((2, 16), int)]
)
def test_an_order_that_does_not_fit_is_refused(tmp_path, order):
    with pytest.raises(InputError, match=r"order is to be \(2, 16\) whole numbers from 0"):
        raster_gif(noise(2, 4, 4), order, tmp_path / "a.gif", {})


def test_a_gif_of_16_images_is_small(tmp_path):
    """Worst case: noise does not compress. 16 images at 32 x 32, enlarged 4 times, in less than 2 MB."""
    few = np.unique(noise(600), axis=0)[:512]
    raster_gif(few[RNG.integers(512, size=(16, 32, 32))], raster(16, 32), tmp_path / "a.gif", {})
    assert (tmp_path / "a.gif").stat().st_size < 2_000_000
    assert Image.open(tmp_path / "a.gif").size == (4 * (128 + GAP) + GAP,) * 2
