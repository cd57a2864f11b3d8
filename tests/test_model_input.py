"""What a model is shown: its own preparation, kept images or colours of tokens, and images in place of a token file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_rgb
from PIL import Image

from igpt_cli.errors import FormatError, InputError, MismatchError
from igpt_cli.images.sources import open_source
from igpt_cli.images.subset import SubsetSource
from igpt_cli.images.transforms import Preparation, Preprocess, prepare
from igpt_cli.model_dir import check_fit, load_model, new_config, write_model
from igpt_cli.model_input import image_spec, inputs_of
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.palette.palette import even_palette
from igpt_cli.probing.baselines import colour_histogram, raw_pixels, reduced
from igpt_cli.probing.images import balanced, choose_images
from igpt_cli.probing.store import extract_features
from igpt_cli.tokens.open_or_tokenize import open_or_tokenize
from igpt_cli.tokens.store import open_tokens
from igpt_cli.tokens.tokenize import tokenize

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
OWN = {"size": 10, "crop": 0.8, "filter": "bilinear", "mean": MEAN, "std": STD}


@pytest.fixture(autouse=True)
def toy():
    toy_rgb.register()
    yield
    toy_rgb.unregister()


def imported(path: Path | str, resolution: int = 10, preparation: dict | None = OWN, palette=None, **parts):
    """A model directory with random weights, as an import leaves it: without a palette."""
    config = model_config("toy", resolution=resolution, n_classes=2)
    torch.manual_seed(3)
    weights = build_model(config).state_dict()
    more = {} if preparation is None else {"preparation": preparation}
    return load_model(write_model(path, weights, palette, new_config(config, **more, **parts), force=True))


def photos(root: Path, n: int = 6, size: tuple[int, int] = (23, 17)) -> Path:
    """root/{train,test}/{cat,dog}/: cats are reddish, dogs bluish."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (*size[::-1], 3))
                pixels[..., 2 * k] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


# The preparation.


@pytest.mark.parametrize(
    ("size", "crop", "name", "resized", "corner"),
    [
        ((100, 60), 0.875, "bicubic", (426, 256), (101, 16)),  # 256 * 100 / 60 = 426.7
        ((60, 100), 0.9, "bilinear", (248, 413), (12, 94)),  # 224 / 0.9 = 248.9; (413 - 224) / 2 = 94.5
        ((300, 300), 1.0, "lanczos", (224, 224), (0, 0)),
    ],
)
def test_a_models_own_preparation_is_timms_steps(size, crop, name, resized, corner):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    found = prepare(pixels, Preparation(224, crop=crop, filter=name), "x")
    image = Image.fromarray(pixels).resize(resized, Image.Resampling[name.upper()])
    expected = np.asarray(image)[corner[1] : corner[1] + 224, corner[0] : corner[0] + 224]
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_without_a_crop_the_whole_image_is_squeezed():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(prepare(pixels, Preparation(32, crop=None), "x"), expected)
    # An image of the right size already is cropped, too, if the model says so.
    small = Preparation(20, crop=0.5).apply(Image.fromarray(pixels[:, :20]))
    assert np.array_equal(small, np.asarray(Image.fromarray(pixels[:, :20]).resize((40, 40), 3).crop((10, 10, 30, 30))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 2000}, "resolution 2000 is outside 1..1024"),
        ({"crop": 1.5}, "crop is 1.5, the part of the short side"),
        ({"crop": "all"}, "crop is 'all'"),
        ({"filter": "sinc"}, "filter is 'sinc', expected one of nearest, box, bilinear"),
    ],
)
def test_a_preparation_that_cannot_be_used(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Preparation(**{"resolution": 224, **settings})
    if "resolution" not in settings:
        run = imported(tmp_path / "run", preparation={**OWN, **settings})
        with pytest.raises(
            FormatError, match=r"run/config.json states a preparation that cannot be used: .*" + message
        ):
            image_spec(run)


# Models without a palette, and token files.


def test_an_imported_model_has_no_palette_and_sees_any_token_file(tmp_path, toy_tokens):
    run, tokens = imported(tmp_path / "run", 4), open_tokens(toy_tokens())
    assert run.palette is None
    with pytest.raises(InputError, match="run has no palette: it is toy, a model of RGB images that knows none"):
        _ = run.own_palette
    check_fit(run, tokens)
    with pytest.raises(MismatchError, match=r"toy.h5 has images of 4x4, .*big takes 10x10; name the images themselves"):
        check_fit(imported(tmp_path / "big"), tokens)
    # With a palette of its own, too, it sees the colours of others.
    check_fit(imported(tmp_path / "own", 4, palette=even_palette(2)), tokens)
    # A model of tokens without its palette is damaged.
    config = model_config("igpt-tiny", n_layer=1, n_head=1, n_embd=8, resolution=4, n_vocab=8)
    bare = write_model(tmp_path / "bare", build_model(config).state_dict(), None, new_config(config))
    with pytest.raises(InputError, match="palette.npz does not exist; a palette was expected there"):
        load_model(bare)


def test_a_model_of_rgb_images_sees_kept_images_or_else_colours(tmp_path, toy_tokens):
    run, plain = imported(tmp_path / "run", 4), open_tokens(toy_tokens())
    kept = tmp_path / "kept.h5"
    images = np.random.default_rng(1).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", X_train=images, y_train=np.arange(12) % 2)
    tokenize(open_source([tmp_path / "images.npz"]), plain.palette, kept, Preprocess(4), keep_rgb=True)
    file = open_tokens(kept)
    for split, pixels in (
        (file.split("train"), images),
        (plain.split("train"), plain.split("train").decode(np.arange(12))),
    ):
        values, decode = inputs_of(run, split)
        expected = (pixels.transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        assert np.allclose(decode(values[np.arange(12)]).numpy(), expected, atol=1e-6)
    # The features file tells which of them it was.
    found = extract_features(run, file, tmp_path / "f.h5", [0])
    assert found.split("train").attrs["rgb_sha256"] == file.split("train").rgb_sha256 != ""
    assert "rgb_sha256" not in extract_features(run, plain, tmp_path / "g.h5", [0]).split("train").attrs
    assert extract_features(run, file, tmp_path / "f.h5", [0]).reused


def test_images_are_prepared_as_the_model_was_trained(tmp_path):
    assert image_spec(imported(tmp_path / "a")).preprocess == Preparation(10, crop=0.8, filter="bilinear")
    assert image_spec(imported(tmp_path / "b", preparation=None)).preprocess == Preprocess(10)
    assert image_spec(imported(tmp_path / "c", 256, preparation=None)).preprocess == Preparation(256)
    trained = {"preparation": {"size": 10, "mean": MEAN, "std": STD}, "palette": even_palette(2)}
    for images, kept in (("rgb", True), ("tokens", False)):
        run = imported(tmp_path / images, **trained, data={"images": images})
        how = image_spec(run)
        assert (how.preprocess, how.keep_rgb) == (Preprocess(10), kept)
        assert how.palette.sha256 == even_palette(2).sha256


# Images in place of a token file.


def test_a_folder_of_photos_is_probed_at_the_models_own_resolution(igpt, workspace):
    photos(workspace / "photos")
    run = imported("run", 6)
    done = igpt("features", "run", "photos", "-o", "f.h5", "--layers", "1", "--json")
    assert done.code == 0, done.stderr
    from igpt_cli.probing.feature_file import open_features

    features = open_features("f.h5")
    for split in ("train", "test"):
        assert len(features.names(split)) == 12
        for i, name in enumerate(features.names(split)):
            image = Image.open(workspace / "photos" / name)
            pixels = np.asarray(image.resize((9, 7), 2).crop((2, 0, 8, 6)), np.float32) / 255  # 6 / 0.8 = 7.5
            x = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
            with torch.no_grad():
                expected = run.model.features(x, [1])[1][0].numpy()
            assert np.allclose(features.read(split, 1)[i], expected, atol=1e-5), name
    done = igpt("probe", "run", "photos", "--train-images", "8", "--test-images", "6", "--json", "-o", "probe.json")
    found = json.loads(done.stdout)
    assert (done.code, found["n_train"], found["n_test"], found["tokens"]) == (0, 8, 6, "photos")
    assert set(found["floors"]) == {"raw pixels", "colour histogram", "untrained network"}
    assert found["floors"]["raw pixels"]["n_features"] == 108
    assert found["floors"]["colour histogram"]["n_features"] == 512
    assert found["floors"]["colour histogram"]["accuracy"] == 100.0


def test_a_probe_of_a_token_file_in_any_palette(igpt, workspace, toy_tokens):
    toy_tokens(workspace / "toy.h5")
    imported("run", 4)
    found = json.loads(igpt("probe", "run", "toy.h5", "--json").stdout)
    assert (found["n_train"], found["bert_masks"]) == (64, None)
    assert found["floors"]["colour histogram"]["n_features"] == 8
    done = igpt("probe", "run")
    assert done.stderr.endswith(
        "error: no images given, run does not say which it was trained on, and data/tokens-4.h5 is not here; name a "
        "token file or images\n"
    )
    done = igpt("probe", "run", "toy.h5", "--bert-masks", "2")
    assert "is no BERT model" in done.stderr


def test_only_the_images_that_are_wanted_are_decoded(tmp_path):
    source = open_source([photos(tmp_path / "photos")])
    for file in sorted((tmp_path / "photos" / "train" / "dog").iterdir())[3:]:
        file.write_bytes(b"")  # whoever decodes it is found out
    n = 0

    def first_of_each(split: str, labels: np.ndarray) -> np.ndarray:
        nonlocal n
        n += len(labels)
        return np.array([0, 6]) if split == "train" else np.empty(0, np.int64)

    some = SubsetSource(source, first_of_each)
    assert (n, some.counts, some.classes) == (24, {"train": 2}, ["cat", "dog"])
    assert [r.name for r in some.records()] == ["train/cat/0.png", "train/dog/0.png"]
    bad = []
    with open_or_tokenize(
        tmp_path / "photos", even_palette, Preparation(6), choose=first_of_each, on_bad=lambda *b: bad.append(b)
    ) as file:
        assert (len(file.split("train")), list(file.splits), bad) == (2, ["train"], [])


def test_the_images_chosen_before_decoding_are_those_of_a_probe(tmp_path):
    with open_or_tokenize(photos(tmp_path / "photos"), even_palette, Preparation(6)) as whole:
        expected = choose_images(whole, 9, 4, seed=3)
        choose = balanced(9, 4, seed=3)
        with open_or_tokenize(tmp_path / "photos", even_palette, Preparation(6), choose=choose) as some:
            found = choose_images(some, 9, 4, seed=3)
            for split in ("train", "test"):
                names = [whole.split(split).names[row] for row in expected.rows[split]]
                assert some.split(split).names == names
                assert list(found.rows[split]) == list(range(len(names)))


def test_floors_of_large_images_are_of_the_same_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    means = pixels.reshape(3, 32, 3, 32, 3, 3).astype(float).mean((2, 4))
    assert np.abs(reduced(pixels) - means).max() <= 0.5
    assert raw_pixels(reduced(pixels)).shape == (3, 3072)
    assert np.array_equal(reduced(pixels[:, :64, :64]), pixels[:, :64, :64])
    with open_or_tokenize(photos(tmp_path / "photos", n=4), even_palette, Preparation(72), keep_rgb=True) as file:
        train = file.split("train")
        for kept, pixels in ((True, train.rgb), (False, train.decode(slice(None)))):
            images = choose_images(file, None, None, 0, as_kept=kept)
            assert images.rgb("train").shape == (8, 32, 32, 3)
            assert np.array_equal(images.rgb("train"), reduced(pixels))
        assert np.array_equal(images.histogram("train"), colour_histogram(train.tokens[:], 512))


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("sample run", ": it predicts no pixels"),
        ("complete run photos", ": it predicts no pixels"),
        ("finetune run photos -o x", ", which has no loss on pixels; fine-tune it with: igpt train run\n"),
    ],
)
def test_what_a_model_without_a_palette_cannot_do(igpt, workspace, command, why):
    photos(workspace / "photos", n=1)
    imported("run", 6)
    done = igpt(*command.split(), "--device", "cpu")
    assert (done.code, done.stdout) == (1, "")
    assert f"error: run is toy, a model of RGB images{why}" in done.stderr


def test_such_a_model_is_not_pretrained(igpt, workspace):
    done = igpt("pretrain", "nowhere.h5", "-m", "vit-b16")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.endswith("error: vit-b16 is a model of RGB images; it learns classes: igpt train vit-b16\n")
