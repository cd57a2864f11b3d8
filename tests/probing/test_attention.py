"""What models look at: counted by hand, against loops, for models of every kind; and the pictures of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir
from igpt_cli.model_input import decoder
from igpt_cli.models.registry import build_model, model_config
from igpt_cli.palette.palette import Palette
from igpt_cli.probing import attention as module
from igpt_cli.probing.attention import attention_distance, attention_maps, on_grid
from igpt_cli.report.attention import PALE, distance_figure, gaussian_figure, map_figure

PALETTE = Palette(np.linspace(10, 240, 8)[:, None].repeat(3, 1).astype(np.float32))


def run_of(model: nn.Module, resolution: int = 4, name: str = "a-model") -> ModelDir:
    return ModelDir(Path("a"), model.eval(), PALETTE, {"model": {"name": name, "resolution": resolution}})


class Looking(nn.Module):
    """A model of two blocks, with a class token and a 2 x 2 grid, whose attention is what it is given."""

    n_layers, input_kind = 2, "tokens"

    def __init__(self, *blocks: torch.Tensor):
        super().__init__()
        self.blocks, self.calls = blocks, []
        self.weight = nn.Parameter(torch.zeros(1))

    def attention(self, x, layers):
        self.calls.append(list(layers))
        return {layer: self.blocks[layer].expand(len(x), -1, -1, -1) for layer in layers}


def looking() -> Looking:
    """Block 0: head 0 looks at itself, head 1 one place to the right, else at the class token. Block 1: everywhere."""
    right = torch.zeros(5, 5)
    for query, key in ((1, 2), (3, 4), (0, 0), (2, 0), (4, 0)):
        right[query, key] = 1
    return Looking(torch.stack((torch.eye(5), right))[None], torch.full((1, 2, 5, 5), 0.2))


def tokens_of(n: int, T: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8, (n, T))


def test_distances_counted_by_hand():
    found = attention_distance(run_of(looking()), tokens_of(3))
    # A place of the 2 x 2 grid is 2 pixels wide. From each place: itself, two at 2 pixels, one at 2 sqrt(2).
    np.testing.assert_allclose(found[0], [0, 2])
    np.testing.assert_allclose(found[1], [(4 + 8**0.5) / 4] * 2)


def test_maps_of_a_pixel_leave_the_class_token_out():
    looks = attention_maps(run_of(looking()), tokens_of(2), pixel=(3, 1))
    assert looks[0].query == looks[1].query == (1, 0)
    np.testing.assert_array_equal(looks[0].maps[1], [[[0, 0], [1, 0]], [[0, 0], [0, 1]]])
    np.testing.assert_allclose(looks[1].maps, 0.2)
    np.testing.assert_allclose(looks[1].elsewhere, 0.2, atol=1e-6)
    assert attention_maps(run_of(looking()), tokens_of(1))[0].query == (1, 1)
    np.testing.assert_allclose(attention_maps(run_of(looking()), tokens_of(1))[0].elsewhere, [[0, 1]])


def test_the_grid_comes_last():
    for queries, keys, n in ((4, 4, 4), (5, 5, 4), (6, 6, 4), (16, 17, 16), (197, 197, 196), (198, 198, 196)):
        p = torch.arange(queries * keys).view(queries, keys)
        assert torch.equal(on_grid(p), p[queries - n :, keys - n :])


def test_layers_are_taken_together_as_memory_allows(monkeypatch):
    tokens, done = tokens_of(3), []
    run = run_of(looking())
    together = attention_distance(run, tokens, progress=lambda i, n: done.append((i, n)))
    assert run.model.calls == [[0], [0, 1], [0, 1], [0, 1]]
    assert done == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 1)
    run = run_of(looking())
    apart = attention_distance(run, tokens)
    assert run.model.calls == [[0], [0], [1], [0], [1], [0], [1]]
    for layer in (0, 1):
        np.testing.assert_array_equal(apart[layer], together[layer])


def built(name: str, **settings) -> ModelDir:
    torch.manual_seed(0)
    model = build_model({"backend": name, **settings})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return run_of(model, settings["resolution"], name)


RUNS = {
    "ar": lambda: run_of(build_model(model_config("igpt-tiny", n_layer=2, n_head=2, resolution=4, n_vocab=8))),
    "bert": lambda: run_of(
        build_model(model_config("igpt-tiny", n_layer=2, n_head=2, resolution=4, n_vocab=8, objective="bert"))
    ),
    "local": lambda: built("local_attention", depths=[1, 1], width=16, num_heads=2, window=3, stem="3x3", resolution=4),
    "conv": lambda: built("attention_conv", depth=2, num_heads=9, embed_dim=8, patch_size=1, resolution=4),
}


@pytest.mark.parametrize("kind", RUNS)
def test_distances_and_maps_of_every_kind_equal_a_loop(kind):
    run, tokens = RUNS[kind](), tokens_of(2)
    decode = decoder(run, PALETTE)
    with torch.no_grad():
        p = {layer: v.double().numpy() for layer, v in run.model.attention(decode(tokens), [0, 1]).items()}
    found = attention_distance(run, tokens, decode=decode)
    looks = attention_maps(run, tokens, decode=decode, pixel=(2, 1))
    for layer, values in p.items():
        first = values.shape[3] - 16  # AR: sos
        for head in range(values.shape[1]):
            far, mass = 0.0, 0.0
            for image, query, key in np.ndindex(2, 16, 16):
                weight = values[image, head, query, first + key]
                far += weight * np.hypot(query // 4 - key // 4, query % 4 - key % 4)
                mass += weight
            assert found[layer][head] == pytest.approx(far / mass, rel=1e-5)
        expected = values[:, :, 9, first:].reshape(2, -1, 4, 4)
        np.testing.assert_allclose(looks[layer].maps, expected, atol=1e-6)
        np.testing.assert_allclose(looks[layer].elsewhere, 1 - expected.sum((2, 3)), atol=1e-5)
    if kind == "ar":
        assert not looks[0].maps[..., 2, 1:].any()
        assert (looks[0].elsewhere > 0).all()


def test_what_cannot_be_shown_is_said():
    run = run_of(looking())
    with pytest.raises(InputError, match="layer 2 asked for; the layers of a-model that have attention: 0 to 1"):
        attention_maps(run, tokens_of(1), [2])
    with pytest.raises(InputError, match="the pixel 4,0 is outside the image; rows and columns go from 0 to 3"):
        attention_maps(run, tokens_of(1), pixel=(4, 0))
    some = built("local_attention", depths=[1, 2], width=16, num_heads=2, stem="3x3", resolution=4, attention_stages=[2])  # fmt: skip
    with pytest.raises(InputError, match="layer 0 asked for; the layers of local_attention that have attention: 1, 2"):
        attention_maps(some, tokens_of(1), [0], decode=decoder(some, PALETTE))
    with pytest.raises(InputError, match="resnet is a model whose attention cannot be shown"):
        attention_distance(built("resnet", depths=[1], width=4, stem="3x3", resolution=4), tokens_of(1))


# The pictures.


def coloured(path: Path) -> np.ndarray:
    """(height, width) bool: where a picture is neither white, black nor grey."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return rgb.max(-1) - rgb.min(-1) > 60


@pytest.mark.parametrize(
    ("covariance", "slope"), [([[0.2, 0.0], [0.0, 6.0]], 0), ([[2.0, 1.8], [1.8, 2.0]], 1), ([[2.0, -1.8], [-1.8, 2.0]], -1)]
)  # fmt: skip
def test_ellipses_lie_as_the_covariance_says(tmp_path, covariance, slope):
    gaussian_figure({0: (np.array([[0.0, 0.0]]), np.array([covariance]))}, tmp_path / "g.png", "a title")
    rows, columns = np.nonzero(coloured(tmp_path / "g.png"))
    if slope == 0:
        assert np.ptp(columns) > 3 * np.ptp(rows)
    else:  # rows go down, in the picture as in the image
        assert np.corrcoef(rows, columns)[0, 1] * slope > 0.6


def test_centres_lie_where_they_are_and_those_far_away_are_named(tmp_path):
    narrow = np.array([[[0.01, 0], [0, 0.01]]] * 3)
    centres = np.array([[-3.0, 2.0], [1.0, -1.0], [40.0, 0.0]])
    gaussian_figure({0: (centres[:1], narrow[:1])}, tmp_path / "g.png")
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("L"))
    middle = np.argwhere(picture < 10)  # the black square, and the text above
    rows, columns = np.nonzero(coloured(tmp_path / "g.png"))
    assert rows.mean() < np.median(middle[:, 0])
    assert columns.mean() > np.median(middle[:, 1])
    gaussian_figure({0: (centres, narrow), 4: (centres, narrow)}, tmp_path / "g.svg", "a title")
    assert (tmp_path / "g.svg").read_text().startswith("<?xml")
    for name in ("a.png", "b.png"):
        gaussian_figure({0: (centres, narrow)}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_maps_show_each_layer_and_head_in_its_place(tmp_path):
    run, tokens = run_of(looking()), tokens_of(2)
    images = PALETTE.dequantize(tokens.reshape(2, 4, 4))
    looks = attention_maps(run, tokens, pixel=(3, 1))
    map_figure(looks, images, tmp_path / "m.png", [0, 1], (3, 1), ["one", "two"], "a title", "a note")
    picture = np.asarray(Image.open(tmp_path / "m.png").convert("RGB")).astype(int)
    side, start, top = 160, 24 + 160 + 72, 72 + 18
    for i, layer, head in np.ndindex(2, 2, 2):
        x, y = start + head * 166, top + i * (2 * 166 + 34) + layer * 166
        values = looks[layer].maps[i, head].repeat(2, 0).repeat(2, 1)
        from matplotlib import colormaps

        heat = colormaps["viridis"](values / values.max())[..., :3]
        unseen = (looks[layer].maps == 0).all((0, 1)).repeat(2, 0).repeat(2, 1)
        heat[unseen] = PALE
        expected = 255 * heat * 0.75 + 0.25 * images[i]
        step = side // 4
        shown = picture[y + step // 2 : y + side : step, x + step // 2 : x + side : step]
        np.testing.assert_allclose(shown, expected, atol=3)
        red = picture[y + side // 2 - 2 : y + side // 2 + 3, x + 5 : x + side // 2 - 5].astype(int)
        assert (red[..., 0] > 200).any(axis=0).all()  # the upper edge of the frame around the lower left place
    map_figure(looks, images, tmp_path / "one.svg", [1], (3, 1), ["one", "two"])
    with pytest.raises(InputError, match=r"1,200 maps: 2 images, 2 layers, 300 heads; a picture holds 1,024"):
        map_figure(looks, images, tmp_path / "m.png", range(300), (3, 1), ["one", "two"])


def test_distances_are_drawn(tmp_path):
    found = attention_distance(run_of(looking()), tokens_of(1))
    for name in ("a.png", "b.png"):
        distance_figure(found, tmp_path / name, "a title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert coloured(tmp_path / "a.png").any()
