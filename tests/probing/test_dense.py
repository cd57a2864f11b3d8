"""The dense probe on masks that are drawn here; IoU and upsampling against plain loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_masks import draw
from PIL import Image

from igpt_cli.errors import InputError
from igpt_cli.images.masks import find_pairs, load_mask, resize_mask
from igpt_cli.model_dir import ModelDir
from igpt_cli.models.igpt import IGPT, IGPTConfig
from igpt_cli.models.swin import Swin, SwinConfig
from igpt_cli.palette.palette import Palette
from igpt_cli.probing import dense
from igpt_cli.probing.dense import Tally, dense_probe, on_grid, predict
from igpt_cli.probing.linear import Linear


def model_dir(model: torch.nn.Module, **config) -> ModelDir:
    centers = np.stack(np.meshgrid(*[np.linspace(0, 255, 5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    described = {"name": "toy", "resolution": model.config.resolution}
    return ModelDir(Path("toy"), model.eval(), Palette(centers), {"model": described, **config})


def swin() -> ModelDir:
    torch.manual_seed(0)
    config = SwinConfig(embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, patch_size=2, resolution=32)
    return model_dir(Swin(config), preparation={"mean": [0.5] * 3, "std": [0.25] * 3})


def test_finds_what_was_drawn(tmp_path):
    found = dense_probe(swin(), draw(tmp_path), steps=300)
    assert found.protocol == "igpt-dense-v1"
    assert (found.n_train, found.n_test, found.n_classes, found.ignore) == (12, 5, 3, 0)
    assert [(row.layer, row.grid, row.n_features) for row in found.layers] == [
        (0, 16, 16),
        (1, 8, 32),
        (2, 8, 32),
    ]
    assert found.layer == max(found.layers, key=lambda row: row.val_mean_iou).layer
    assert set(found.class_iou) == {"1", "2", "3"}
    assert found.mean_iou == pytest.approx(np.mean(list(found.class_iou.values())), abs=1e-3)
    first = found.layers[0]
    assert first.mean_iou > 85
    assert first.pixel_accuracy > 92
    assert found.commonest["mean_iou"] < 25
    assert found.commonest["pixel_accuracy"] < 60
    # A grid half as fine draws edges less well.
    assert first.mean_iou > found.layers[1].mean_iou > 60


def test_the_result_is_that_of_plain_loops(tmp_path, monkeypatch):
    """What is reported, from the classifier that was fitted, pixel by pixel."""
    run, root, kept = swin(), draw(tmp_path, 6, 3), []
    monkeypatch.setattr(dense, "_fit", lambda *args, fit=dense._fit: kept.append(fit(*args)) or kept[-1])
    found = dense_probe(run, root, [1], steps=100)
    fitted, confusion = kept[0][0], np.zeros((4, 4))
    for file in sorted((root / "images" / "validation").iterdir()):
        mask = np.asarray(Image.open(root / "annotations" / "validation" / f"{file.stem}.png"))
        pixels = np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BICUBIC))
        rgb = run.palette.dequantize(run.palette.quantize(pixels)) / 255
        x = torch.tensor((rgb - 0.5) / 0.25, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            features = run.model.features(x, [1], pool="none")[1][0].double().numpy()
        scores = (features - fitted.mean) / fitted.std @ fitted.weight.T + fitted.bias
        scores = torch.from_numpy(scores.T.reshape(1, 3, 8, 8))
        upsampled = F.interpolate(scores, size=mask.shape, mode="bilinear", align_corners=False)[0].numpy()
        for y in range(mask.shape[0]):
            for z in range(mask.shape[1]):
                if mask[y, z]:
                    confusion[mask[y, z], fitted.classes[upsampled[:, y, z].argmax()]] += 1
    iou = [100 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]) for k in (1, 2, 3)]
    assert list(found.class_iou.values()) == pytest.approx(iou, abs=0.2)
    assert found.pixel_accuracy == pytest.approx(100 * np.trace(confusion) / confusion.sum(), abs=0.2)


def test_every_pixel_of_an_igpt_is_a_position(tmp_path):
    torch.manual_seed(0)
    model = IGPT(IGPTConfig(n_layer=2, n_head=2, n_embd=16, resolution=16, n_vocab=125, objective="bert"))
    found = dense_probe(model_dir(model), draw(tmp_path, 8, 3), [0], steps=300)
    assert found.layers[0].grid == 16
    assert found.mean_iou > 60


@pytest.mark.parametrize("trained", [False, True])
def test_without_a_palette_or_trained_on_kept_images_the_colours_themselves_are_seen(tmp_path, trained):
    run, root = swin(), draw(tmp_path, 6, 3)
    kept = {"config": {**run.config, "data": {"images": "rgb"}}} if trained else {"palette": None}
    found = dense_probe(replace(run, **kept), root, [0], steps=200)
    assert found.mean_iou > 85
    assert found.mean_iou != dense_probe(run, root, [0], steps=200).mean_iou


def test_another_number_can_stand_for_no_class(tmp_path):
    root = draw(tmp_path, 4, 2)
    found = dense_probe(swin(), root, [0], ignore=255, steps=100)
    assert set(found.class_iou) == {"0", "1", "2", "3"}


def test_few_images_and_the_same_again(tmp_path):
    root = draw(tmp_path, 6, 4)
    settings = {"train_images": 4, "test_images": 2, "steps": 50, "seed": 3}
    first, second = (dense_probe(swin(), root, [0], **settings) for _ in range(2))
    assert (first.n_train, first.n_test) == (4, 2)
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_iou_against_loops():
    rng = np.random.default_rng(1)
    truth, predicted, tally = rng.integers(0, 5, (40, 30)), rng.integers(0, 7, (40, 30)), Tally()
    tally.add(predicted[:20], truth[:20])
    tally.add(predicted[20:], truth[20:])
    expected = {}
    for k in range(7):
        both = sum(t == k and p == k for t, p in zip(truth.flat, predicted.flat, strict=True))
        either = sum(t == k or p == k for t, p in zip(truth.flat, predicted.flat, strict=True))
        expected[k] = 100 * both / either
    assert tally.class_iou() == pytest.approx(expected)
    assert tally.mean_iou == pytest.approx(sum(expected.values()) / 7)
    assert tally.pixel_accuracy == pytest.approx(100 * sum(truth.flat == predicted.flat) / truth.size)


def test_upsampling_a_few_classes_at_a_time_changes_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    fitted = Linear(
        rng.normal(size=(7, 3)), rng.normal(size=7), np.ones(3), np.full(3, 2.0), np.arange(10, 17), 1.0, 0.0, True, 1
    )
    x = rng.normal(size=(4, 4, 3))
    scores = torch.tensor(((x - 1) / 2) @ fitted.weight.T + fitted.bias).permute(2, 0, 1)[None]
    whole = 10 + F.interpolate(scores, size=(11, 17), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    for bytes_ in (2**28, 3 * 4 * 11 * 17, 1):
        monkeypatch.setattr(dense, "UPSAMPLED_BYTES", bytes_)
        assert np.array_equal(predict(fitted, x, (11, 17)), whole)


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("side", [1, 2, 7])
def test_class_tokens_are_left_out(before, side):
    x = np.arange(2 * (side**2 + before) * 3).reshape(2, -1, 3)
    assert np.array_equal(on_grid(x).reshape(2, -1, 3), x[:, before:])


# Masks.


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_of_any_kind_of_png(tmp_path, mode):
    mask = np.arange(12, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(3, 4)
    image = Image.fromarray(mask)
    if mode == "P":
        image = Image.fromarray(mask, mode="P")
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "m.png")
    found = load_mask(tmp_path / "m.png")
    assert found.dtype == np.int32
    assert np.array_equal(found, mask)


def test_masks_are_resized_by_the_pixel_in_the_middle():
    mask = np.arange(35, dtype=np.int32).reshape(5, 7)
    expected = [[mask[int((y + 0.5) * 5 / 3), int((x + 0.5) * 7 / 3)] for x in range(3)] for y in range(3)]
    assert resize_mask(mask, 3).tolist() == expected


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="images/training is no folder"):
        find_pairs(tmp_path / "empty")
    root = draw(tmp_path / "drawn", 3, 2)
    (root / "annotations" / "training" / "001.png").rename(root / "annotations" / "training" / "other.png")
    with pytest.raises(InputError, match="1 images .* have no mask .*001.jpg"):
        find_pairs(root)
    (root / "annotations" / "training" / "other.png").rename(root / "annotations" / "training" / "001.png")
    assert [len(pairs) for pairs in find_pairs(root).values()] == [3, 2]


def test_what_cannot_be_read_is_named_counted_and_replaced(tmp_path):
    root, said = draw(tmp_path / "drawn", 6, 3), []
    few = {"train_images": 3, "test_images": 2, "steps": 20, "seed": 1}
    order = np.random.default_rng(1).permutation(6)
    broken, spare = order[0], order[3]
    (root / "images" / "training" / f"{broken:03}.jpg").write_bytes(b"nothing")
    Image.new("RGB", (5, 5)).save(root / "annotations" / "validation" / "000.png")
    found = dense_probe(swin(), root, [0], **few, on_bad=lambda *bad: said.append(bad))
    assert (found.n_train, found.n_test, found.skipped) == (3, 2, {"train": 1, "test": 1})
    assert [Path(name).relative_to(root).as_posix() for name, _ in said] == [
        f"images/training/{broken:03}.jpg",
        "annotations/validation/000.png",
    ]
    assert "PNG of mode RGB; a mask is a PNG of class numbers" in said[1][1]
    # The same as if the spare one were all that was left to choose from.
    for i in set(range(6)) - {order[1], order[2], spare}:
        (root / "images" / "training" / f"{i:03}.jpg").unlink()
    (root / "images" / "validation" / "000.jpg").unlink()
    again = dense_probe(swin(), root, [0], **few)
    assert again.skipped == {}
    assert again.commonest == found.commonest
    for file in (root / "annotations" / "validation").iterdir():
        Image.new("RGB", (5, 5)).save(file)
    with pytest.raises(InputError, match=r"none of the 2 images with masks can be read; the first is .*: PNG of mode"):
        dense_probe(swin(), root, [0], **few)
    for file in list((root / "images" / "training").iterdir())[1:]:
        file.write_bytes(b"nothing")
    for file in (root / "annotations" / "validation").iterdir():
        Image.new("L", (5, 5), 1).save(file)
    with pytest.raises(InputError, match="has 1 training image; one is held out"):
        dense_probe(swin(), root, [0], **few)
