"""The palette object, and the files that it is read from."""

import json
import math

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.files import sha256_of
from igpt_cli.palette.describe import describe, swatch
from igpt_cli.palette.formats import write_palette
from igpt_cli.palette.palette import Palette, luma, luminance_order


def random_palette(n: int = 64, seed: int = 0, order: str = "luminance") -> Palette:
    rng = np.random.default_rng(seed)
    centers = (rng.random((n, 3)) * 255).astype(np.float32)
    if order == "luminance":
        centers = centers[luminance_order(centers)]
    return Palette(centers, rng.integers(1, 1000, n), {"seed": seed})


def test_a_worked_example():
    palette = Palette([[0, 0, 0], [255, 255, 255]])
    tokens = palette.quantize(np.array([[[250, 240, 255], [9, 8, 7]]], np.uint8))
    assert tokens.tolist() == [[1, 0]]
    assert tokens.dtype == np.uint16
    assert palette.dequantize(tokens).tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_decoding_rounds_half_to_even_and_white_stays_white():
    palette = Palette([[0.5, 1.5, 2.5], [254.5, 254.51, 255]])
    assert palette.dequantize(np.array([0, 1])).tolist() == [[0, 2, 2], [254, 255, 255]]


@given(st.integers(0, 1000), st.sampled_from([np.uint16, np.int32, np.int64]))
@settings(max_examples=10, deadline=None)
def test_tokens_survive_decoding_and_encoding(seed, dtype):
    rng = np.random.default_rng(seed)
    centers = np.unique(rng.integers(0, 256, (50, 3)), axis=0).astype(np.float32)  # whole numbers: shown as they are
    palette = Palette(centers)
    tokens = rng.integers(0, len(centers), (2, 5, 5)).astype(dtype)
    assert np.array_equal(palette.quantize(palette.dequantize(tokens)), tokens)


def test_psnr_is_that_of_scikit_image_s_definition():
    palette = random_palette()
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
    shown = palette.dequantize(palette.quantize(images)).astype(float)
    assert palette.psnr(images) == pytest.approx(10 * math.log10(255**2 / np.mean((images - shown) ** 2)))
    assert palette.psnr(palette.rgb) == math.inf


def test_what_makes_two_palettes_the_same():
    palette = random_palette()
    assert palette.sha256 == sha256_of(palette.centers.astype("<f4").tobytes())
    assert Palette(palette.centers, None, {"other": 1}).sha256 == palette.sha256
    assert Palette(palette.centers[::-1]).sha256 != palette.sha256
    with pytest.raises(ValueError, match="read-only"):
        palette.centers[0] = 1


def test_a_palette_does_not_change_with_the_array_it_was_made_of():
    centers = np.array([[0, 0, 0], [9, 9, 9]], np.float32)
    palette = Palette(centers)
    centers[:] = 7
    assert palette.centers.tolist() == [[0, 0, 0], [9, 9, 9]]


@pytest.mark.parametrize(
    ("centers", "message"),
    [
        (np.zeros((512, 4)), "a palette is (V, 3) numbers, not float64 of shape (512, 4)"),
        (np.zeros((1, 3)), "a palette has 2 to 65,536 colours, not 1"),
        (np.array([[0, 0, 0], [np.nan, 0, 0]]), "colour 1 is not finite"),
        (np.array([[0, 0, 0], [256, 0, 0]]), "colours from 0 to 256 are outside 0..255"),
        (np.array([[-1, 0, 0], [1, 0, 0]]), "colours from -1 to 1 are outside 0..255"),
    ],
)
def test_impossible_colours(centers, message):
    with pytest.raises(FormatError) as refused:
        Palette(centers)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([0, 64]), "token 64 is outside 0..63: the palette has 64 colours"),
        (np.array([[-1]]), "token -1 is outside 0..63: the palette has 64 colours"),
        (np.array([0.0]), "tokens must be whole numbers, not float64"),
    ],
)
def test_impossible_tokens(tokens, message):
    with pytest.raises(InputError) as refused:
        random_palette().dequantize(tokens)
    assert str(refused.value) == message


def test_order_is_said_and_checked():
    assert random_palette().meta["order"] == "luminance"
    assert random_palette(order="as drawn").meta["order"] == "imported"
    with pytest.raises(FormatError, match="not sorted by luminance"):
        Palette([[255, 255, 255], [0, 0, 0]], None, {"order": "luminance"})
    assert luma(np.array([255, 255, 255])) == pytest.approx(255)


@pytest.mark.parametrize("order", ["luminance", "as drawn"])
@pytest.mark.parametrize("name", ["p.npz", "p.npy", "preprocessor_config.json"])
def test_every_form_gives_back_the_same_palette(tmp_path, name, order):
    palette = random_palette(300, order=order)
    read = Palette.load(write_palette(palette, tmp_path / name))
    assert read.sha256 == palette.sha256
    if name == "p.npz":
        assert np.array_equal(read.counts, palette.counts)
        assert read.meta == palette.meta
    else:
        assert read.meta["imported"]["scale"] == "-1..1"
        assert read.meta["imported"]["recognised"] is True


def test_openai_s_decoding(tmp_path):
    centers = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    np.save(tmp_path / "kmeans_centers.npy", centers)
    palette = Palette.load(tmp_path / "kmeans_centers.npy")
    assert palette.meta["order"] == "imported"
    expected = np.rint(127.5 * (centers + 1.0)).astype(np.uint8)  # as in OpenAI's run.py
    assert np.array_equal(palette.dequantize(np.arange(512)), expected)


def test_hugging_face_s_processor_reads_ours_and_gives_the_same_tokens(tmp_path):
    module = pytest.importorskip("transformers.models.imagegpt.image_processing_pil_imagegpt")
    palette = random_palette(512)
    write_palette(palette, tmp_path / "preprocessor_config.json")
    processor = module.ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    image = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    tokens = np.asarray(processor(image)["input_ids"]).reshape(32, 32)
    assert np.array_equal(palette.quantize(image), tokens)


def test_the_palette_of_a_token_file_and_of_folders(tmp_path, toy_tokens):
    tokens = toy_tokens(tmp_path / "t.h5")
    with h5py.File(tokens) as file:
        centers = file["palette"][:]
    assert np.array_equal(Palette.load(tokens).centers, centers)
    for name in ("palette.npz", "preprocessor_config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        write_palette(Palette(centers), folder / name)
        assert np.array_equal(Palette.load(folder).centers, centers)
    with h5py.File(tokens, "r+") as file:
        file["palette"][0, 0] += 1
    with pytest.raises(FormatError, match=r"t\.h5: /palette was changed: its SHA-256 is"):
        Palette.load(tokens)


def test_an_existing_palette_is_kept(tmp_path):
    path = random_palette().save(tmp_path / "p.npz")
    with pytest.raises(OutputError, match="exists already"):
        random_palette(seed=1).save(path)
    random_palette(seed=1).save(path, force=True)
    assert Palette.load(path).meta["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([[-1, 0, 1], [0.2, 0.3, 1]], "-1..1"), ([[0, 0, 0], [1, 1, 1]], "0..1"), ([[0, 51, 102], [200, 1, 1]], "0..255")],
)
def test_a_scale_that_is_said(tmp_path, values, scale):
    np.save(tmp_path / "p.npy", np.array(values, np.float32))
    palette = Palette.load(tmp_path / "p.npy", scale)
    low, high = (float(x) for x in scale.split(".."))
    expected = (np.array(values, np.float32).astype(float) - low) / (high - low) * 255
    np.testing.assert_allclose(palette.centers, expected, atol=1e-5)
    assert palette.meta["imported"] == {
        "from": str(tmp_path / "p.npy"),
        "form": "npy",
        "scale": scale,
        "recognised": False,
    }


def test_whole_numbers_above_1_are_recognised(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[0, 0, 0], [255, 255, 255]], np.uint8))
    assert Palette.load(tmp_path / "p.npy").meta["imported"]["scale"] == "0..255"


def test_describing_a_palette():
    centers = [[0, 0, 0], [100, 100, 100], [200, 200, 200], [255, 255, 255]]
    told = describe(Palette(centers, [700, 0, 299, 1], {"mean_squared_error": 75.0, "images": 3}))
    assert (told["pixels"], told["dead"], told["rare"]) == (1000, [1], [3])
    assert told["psnr"] == pytest.approx(10 * math.log10(255**2 / 25))
    assert told["colours"][2] == {"index": 2, "rgb": [200, 200, 200], "hex": "#c8c8c8", "count": 299, "share": 29.9}
    json.dumps(told, allow_nan=False)
    unknown = describe(Palette(centers))
    assert (unknown["pixels"], unknown["dead"], unknown["colours"][0]["share"]) == (None, None, None)


@pytest.mark.parametrize("n", [2, 16, 512])
def test_the_swatch_shows_every_colour(n):
    rng = np.random.default_rng(n)
    colours = np.unique(rng.integers(0, 240, (2 * n, 3)), axis=0)[:n]
    picture = np.asarray(swatch(Palette(colours[luminance_order(colours)])))
    assert {tuple(c) for c in colours.tolist()} <= {tuple(c) for c in picture.reshape(-1, 3).tolist()}
