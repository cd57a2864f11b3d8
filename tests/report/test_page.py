"""The page of igpt report: well formed, accessible, safe with any name, true to the runs; and alive in a browser."""

from __future__ import annotations

import base64
import copy
import html
import json
import math
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from report_runs import CLASSES, IMAGES, NASTY, make_runs

from igpt_cli.errors import FormatError, InputError, OutputError
from igpt_cli.model_dir import WEIGHTS, load_model, read_config, write_config
from igpt_cli.palette.palette import Palette
from igpt_cli.probing.probe import read_result
from igpt_cli.report import page as page_module
from igpt_cli.report.html import TEMPLATES, Table, visible
from igpt_cli.report.page import page, write_page
from igpt_cli.report.page_charts import thinned
from igpt_cli.report.page_layers import probe_groups
from igpt_cli.report.page_run import read_runs
from igpt_cli.report.svg import Chart, Level, Line, ticks
from igpt_cli.sampling.pictures import grid, write_picture
from igpt_cli.tokens.store import open_tokens

PARTS = TEMPLATES.get_template("parts.html").module
VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report")
    make_runs(path)
    return path


@contextmanager
def images(run):
    yield IMAGES, open_tokens(run.path.parent / IMAGES)


@contextmanager
def no_images(run):
    raise InputError("the images are not here")
    yield


@pytest.fixture(scope="module")
def accounts(folder):
    """Both runs, drawn and probed."""
    return read_runs([folder / "a", folder / NASTY], images, samples=2, device="cpu")


@pytest.fixture(scope="module")
def made(accounts) -> str:
    return page(accounts, "igpt report '<a>'")


class Reader(HTMLParser):
    """What is in a page; it must be well nested."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.feed(source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.stack[-1] if self.stack else "", []).append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag in tags]


@pytest.fixture(scope="module")
def read(made) -> Reader:
    return Reader(made)


def test_the_page_can_be_read_by_everyone(made, read):
    assert made.startswith("<!DOCTYPE html>")
    assert read.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = read.all("img")
    assert len(pictures) == 4
    assert all(picture["alt"] and picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    charts = [attrs for attrs in read.all("svg") if attrs.get("role") == "img"]
    assert len(charts) == 4  # palette, two kinds of loss, layers
    assert all(chart["aria-label"] for chart in charts)
    assert all(attrs.get("aria-hidden") for attrs in read.all("svg") if attrs not in charts)
    tables = read.all("table")
    assert len(read.all("caption")) == len(tables) > 6
    assert all(head["scope"] in ("row", "col") for head in read.all("th"))
    assert sum(attrs.get("type") == "button" for attrs in read.all("button")) == len(read.all("button")) > 20
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    named = [attrs["aria-labelledby"] for _, attrs in read.tags if "aria-labelledby" in attrs]
    assert set(named) <= set(ids)
    links = [attrs["href"] for attrs in read.all("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert links[0] == "#main"  # the skip link comes first


def test_the_page_needs_nothing_else(made, read):
    for _, attrs in read.tags:
        assert not [key for key in attrs if key == "style" or key.startswith("on")]
        for key in ("src", "href", "action", "data", "srcset"):
            assert re.match("#|data:image/png;", attrs.get(key, "#")), attrs
    assert "http:" not in made
    assert "https:" not in made
    assert "url(" not in made
    assert "@import" not in made
    (policy,) = [attrs["content"] for attrs in read.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    for kind in ("style", "script"):
        ((whole,),) = (read.text[kind],)
        assert f"{kind}-src 'sha256-{base64.b64encode(sha256(whole.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy


def test_names_are_text_and_nothing_else(made, read):
    known = {"a", "article", "body", "button", "caption", "circle", "code", "dd", "details", "div", "dl", "dt"}
    known |= {
        "figcaption",
        "figure",
        "g",
        "h1",
        "h2",
        "h3",
        "head",
        "header",
        "html",
        "img",
        "li",
        "main",
        "meta",
        "nav",
    }
    known |= {
        "p",
        "path",
        "pre",
        "rect",
        "script",
        "section",
        "span",
        "style",
        "summary",
        "svg",
        "table",
        "tbody",
        "td",
    }
    known |= {"text", "th", "thead", "title", "tr", "ul"}
    assert {tag for tag, _ in read.tags} <= known
    assert len(read.all("script")) == len(read.all("style")) == 1
    everything = "".join(part for parts in read.text.values() for part in parts)
    for name in (NASTY, "<u>toy</u>", IMAGES, CLASSES[0], CLASSES[1], "a</style>&amp;\\u202eb"):
        assert name in everything
    assert "\u202e" not in made
    assert "igpt pretrain '</script><script>alert(1)</script>'" in read.text["code"]
    assert read.text["title"][0] == f"igpt report: a, {NASTY}"


def test_the_page_does_not_say_where_the_data_lay(made):
    assert "data.path" in made
    assert "where-it-lay" not in made


def test_the_numbers_are_those_of_the_runs(accounts, made, read):
    first = accounts[0]
    words = [t.strip() for part in ("td", "th", "span") for t in read.text[part]]
    for account in accounts:
        assert f"{account.probe['accuracy']:.1f}" in words
        assert f"{account.n_parameters:,}" in words
        assert sum(row["layer"] for row in account.probe["layers"]) == 3
    run = load_model(first.run)
    assert first.checkpoint_sha256 == first.probe["checkpoint_sha256"]
    assert f"<code>{first.weights_sha256}</code>" in made
    assert first.weights_sha256 == sha256((run.path / WEIGHTS).read_bytes()).hexdigest()
    points = read.text["title"]
    for row in first.probe["layers"]:
        low, high = row["interval"]
        assert f"a, layer {row['layer']}: {row['accuracy']:.1f}% (95%: {low:.1f} to {high:.1f})" in points
    for name in ("raw pixels", "colour histogram"):
        assert f"{name}, {first.probe['floors'][name]['accuracy']:.1f}%" in points
    assert "a, step 400: held-out loss 1.2025" in points
    assert "training budgets differ" in made
    settings = dict(re.findall(r'<th scope="row">([\w.]+)</th><td(?: class="n")?>([^<]*)</td>', made))
    assert (settings["training.seed"], settings["model.n_head"], settings["training.learning_rate"]) == (
        "0",
        "2",
        "0.01",
    )
    probe = first.probe
    command = f"igpt probe {first.run} '{IMAGES}' --train-images 60 --test-images 60 --seed 0 --details -o probe.json"
    assert command in read.text["code"]
    assert f"{probe['accuracy']:.1f}% of 60 test images right" in made


def section(source: str, name: str) -> str:
    """The HTML of a section of a page; "" where it is left out."""
    return source.partition(f'<section id="{name}"')[2].partition('<section id="')[0]


def test_losses_of_different_kinds_have_their_own_charts(made):
    _, *charts = section(made, "loss").split('<figure class="plot">')
    assert ["next pixel" in chart for chart in charts] == [True, False]
    assert "masked pixels" in charts[1]
    # Each run keeps its colour.
    assert "line s0" in charts[0]
    assert "line s1" in charts[1]
    assert 'class="line s0' not in charts[1]


def test_contrast():
    """AA: 4.5 for text, 3 for curves, on both grounds, in light and in dark."""
    style = Path(page_module.__file__).with_name("page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media (prefers-color-scheme: dark)")[:2]
    )
    dark = dict(re.findall(r"--(\w+): (#\w{6})", style.split("prefers-color-scheme: dark)")[1].split("\n}\n")[0]))
    assert light["paper"] != dark["paper"]
    for colours in (light, dark):
        for ground in ("paper", "card"):
            for name, least in [("ink", 7), ("faint", 4.5), ("link", 4.5), *((f"c{i}", 3) for i in range(8))]:
                assert contrast(colours[name], colours[ground]) >= least, (name, ground)
        # The deepest tint of the confusion matrix: ink on 55% of the tint.
        tint = [int(v) for v in re.findall(r"--tint: (\d+) (\d+) (\d+)", style)[colours is dark]]
        paper = [int(colours["paper"][i : i + 2], 16) for i in (1, 3, 5)]
        mixed = "#" + "".join(f"{round(0.55 * a + 0.45 * b):02x}" for a, b in zip(tint, paper))
        assert contrast(colours["ink"], mixed) >= 4.5


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# What a page tells of a run.


@pytest.fixture
def one(tmp_path, folder) -> Path:
    """A copy of the run "a" that may be changed."""
    shutil.copytree(folder / "a", tmp_path / "a")
    return tmp_path / "a"


def test_probes_that_are_there_are_shown(one, accounts):
    found = accounts[0].probe
    (one / "probe.json").write_text(json.dumps(found))
    (account,) = read_runs([one], no_images, draw=False, device="cpu")
    assert (account.probe, account.probed_here, account.notes) == (found, False, [])
    named = {**found, "accuracy": 12.5}
    (account,) = read_runs([one], no_images, probes={"p.json": named}, draw=False, device="cpu")
    assert account.probe == named
    (one / "probe.json").write_text(json.dumps({**found, "checkpoint_sha256": "0"}))
    (account,) = read_runs([one], no_images, draw=False, device="cpu")
    assert account.notes == [
        "its probe.json is of other weights and is not used",
        "it was not probed: the images are not here",
    ]
    with pytest.raises(InputError, match="p.json: probes of other weights than those of these runs"):
        read_runs([one], no_images, probes={"p.json": {**found, "checkpoint_sha256": "0"}}, measure=False, draw=False)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"protocol": "igpt-dense-v1", "checkpoint_sha256": "", "layers": [], "accuracy": 1}']
)
def test_what_is_no_probe(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(
        FormatError,
        match=r"p\.json (is (not readable JSON|no result of a probe)|holds .*; a result of igpt probe -o was expected)",
    ):
        read_result(tmp_path / "p.json")


def test_pictures_of_the_last_step_are_shown_and_others_are_not(one):
    folder = one / "samples"
    folder.mkdir()
    blank = grid(np.zeros((3, 4, 4, 3), np.uint8))
    settings = {
        "command": "sample",
        "model": "igpt-tiny",
        "resolution": 4,
        "n": 3,
        "seed": 7,
        "temperature": 0.5,
        "run": "a",
    }
    write_picture(blank, folder / "old.png", {**settings, "steps": 399})
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (account,) = read_runs([one], no_images, measure=False, device="cpu")
    assert [picture.caption for picture in account.pictures] == [
        "8 samples, igpt-tiny after 400 steps; temperature 1, seed 0"
    ]
    assert account.notes == ["it draws nothing more: the images are not here"]
    write_picture(blank, folder / "new.png", {**settings, "steps": 400})
    (account,) = read_runs([one], no_images, measure=False, device="cpu")
    (picture,) = account.pictures
    assert picture.caption == "From a/samples/new.png: 3 samples, igpt-tiny after 400 steps; temperature 0.5, seed 7"
    assert picture.png == (folder / "new.png").read_bytes()
    assert read_runs([one], no_images, measure=False, draw=False, device="cpu")[0].pictures == []


def test_a_run_that_goes_on_has_its_curve(one):
    (one / WEIGHTS).unlink()
    config = read_config(one)
    write_config(one, config | {"result": {"status": "running"}})
    (account,) = read_runs([one], no_images, device="cpu")
    assert account.notes == ["it has no model.safetensors yet (status: running), so it draws nothing and is not probed"]
    shown = page([account])
    assert "a, step 400: held-out loss 1.2025" in shown
    assert "status: running" in shown
    assert 'id="layers"' not in shown
    assert "The command that made it was not recorded." not in shown


def test_a_config_that_says_little_is_enough(one):
    config = read_config(one)
    write_config(one, {key: config[key] for key in ("format", "format_version", "model")})
    (one / "metrics.jsonl").unlink()
    (account,) = read_runs([one], no_images, measure=False, draw=False, device="cpu")
    assert account.notes == ["it has no metrics.jsonl, so there is no loss curve of it"]
    shown = page([account])
    Reader(shown)
    assert "The command that made it was not recorded." in shown
    assert 'id="loss"' not in shown


def test_a_checkpoint_is_called_after_its_run(one):
    step = one / "checkpoints" / "step-5"
    step.mkdir(parents=True)
    for name in ("config.json", WEIGHTS, "palette.npz"):
        shutil.copy(one / name, step / name)
    (one / "checkpoints" / "best").write_text("step-5\n")
    first, second = read_runs([one, one / "checkpoints" / "best"], no_images, measure=False, draw=False, device="cpu")
    assert (first.name, second.name) == ("a", "a/step-5")
    assert len(second.metrics) == 402
    with pytest.raises(InputError, match="a run is named twice"):
        read_runs([one, one], no_images)
    with pytest.raises(InputError, match="no run to report on"):
        read_runs([], no_images)


def test_the_file_is_written_whole(tmp_path):
    path = write_page("<p>\udcff", tmp_path / "r.html")
    assert path.read_text() == "<p>\\udcff"
    with pytest.raises(OutputError, match=r"r\.html exists already"):
        write_page("", path)
    write_page("new", path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


# Charts and tables.


def test_points_lie_where_their_values_are():
    line = Line("a", [(0, 10), (5, 20), (10, 40)], ["x", "y", "<z>"], band=[(9, 12), (19, 22), (35, 45)])
    chart = PARTS.chart(Chart([line], [Level("floor", 30)], x_label="<x>", y_label="y", label="l", from_zero=True))
    places = [(float(u), float(v)) for u, v in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4"><title>', chart)]
    (x0, y0), (x1, y1), (x2, y2), (_, level) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) / (y1 - y2) == pytest.approx(0.5, abs=0.01)
    assert level == pytest.approx((y1 + y2) / 2, abs=0.2)
    assert "<title>&lt;z&gt;</title>" in chart
    assert "&lt;x&gt;" in chart
    ticks_at = {float(t): float(v) for v, t in re.findall(r'x="54" y="([\d.]+)" dy="4" .*>([\d.]+)<', chart)}
    assert min(ticks_at) == 0
    assert ticks_at[40] == pytest.approx(y2, abs=0.2)
    assert 'class="band s0 dash0"' in chart


@pytest.mark.parametrize("points", [[(3, 7.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 2e9)], [(0, -5.0), (1e7, -5.0)]])
def test_charts_of_odd_values(points):
    chart = PARTS.chart(Chart([Line("a", points, ["s"] * len(points))], x_label="x", y_label="y", label="l"))
    numbers = [float(n) for n in re.findall(r'c[xy]="([^"]+)"', chart)]
    assert all(math.isfinite(n) and -1 <= n <= 721 for n in numbers)
    assert "nan" not in chart
    Reader(chart)


@pytest.mark.parametrize(("low", "high"), [(0, 24), (1, 1869), (2.31, 6.24), (0, 0.003), (5, 5), (-3, 1e6)])
def test_ticks_are_round_and_around(low, high):
    for whole in (False, True):
        found = ticks(low, high, 6, whole)
        assert len(found) <= 9
        assert found == sorted(set(found))
        assert found[0] <= low + 1e-9
        assert found[-1] >= high - 1e-9
        assert not whole or all(float(t).is_integer() for t in found)


def test_long_curves_are_means_of_steps():
    points = [(n, float(n % 2)) for n in range(1, 1001)]
    thin = thinned(points, 160)
    assert len(thin) <= 160
    assert thin[-1][0] == 1000
    assert np.mean([y for _, y in thin[:-1]]) == pytest.approx(0.5, abs=0.08)
    assert thinned(points, 1000) == points
    assert thinned([]) == []


def test_cells_sort_by_values_not_by_what_is_shown():
    shown = PARTS.table(Table("t", "<c>", "name|n:,.0f", [("x", 1234.5), ("y", None)]))
    assert '<th scope="row" data-key="x">x</th><td class="n" data-key="1234.5">1,234</td>' in shown
    assert '<td class="n"></td>' in shown
    assert shown.count('<button type="button">') == 2
    assert "&lt;c&gt;" in shown
    assert visible("a\n\x00\u202e") == "a\\n\\x00\\u202e"


def test_places_within_blocks_and_several_seeds(accounts):
    account = copy.deepcopy(accounts[0])
    rows = account.probe["layers"]
    rows.insert(1, {**rows[0], "layer": "0.mlp", "accuracy": 61.0, "interval": [50.0, 70.0]})
    account.probe |= {"seeds": [{}, {}], "accuracy_mean": 70.0, "accuracy_deviation": 2.5}
    rows[0] |= {"accuracy_mean": 66.0, "accuracy_deviation": 1.5}
    shown = page([account])
    Reader(shown)
    chart = section(shown, "layers")
    assert "<title>a, mlp within blocks, layer 0.mlp: 61.0% (95%: 50.0 to 70.0)</title>" in chart
    assert "<title>a, layer 0: 66.0% (std of the seeds: 64.5 to 67.5)</title>" in chart
    assert 'data-key="0.5">0.mlp</td>' in chart
    assert "where there were several seeds, one standard deviation on each side of their mean" in chart
    assert "a was probed with 2 seeds: 70.0% on average, standard deviation 2.5; the table has the first" in shown


def test_runs_are_compared_only_on_the_same_images(accounts):
    ((first, second),) = probe_groups(accounts)
    assert (first[1], second[1]) == ("a", NASTY)
    other = copy.deepcopy(accounts[1])
    other.probe["images_sha256"] = "0"
    assert len(probe_groups([accounts[0], other])) == 2
    shown = page([accounts[0], other])
    assert "the probes are of different images or protocols" in shown
    assert len(re.findall(r'id="layers-\d"', shown)) == 2
    assert "The highest linear probe" not in shown
    # A floor that differs is told for each.
    other = copy.deepcopy(accounts[1])
    other.probe["floors"]["raw pixels"]["accuracy"] = 12.25
    assert f"raw pixels as {NASTY} sees them, 12.2%" in html.unescape(section(page([accounts[0], other]), "layers"))


def test_confusion_of_many_classes_is_a_list(accounts):
    account = copy.deepcopy(accounts[0])
    counts = (np.eye(100, dtype=int) * 5).tolist()
    counts[3][7] = 4
    account.probe["details"] = {"classes": [f"class {i}" for i in range(100)], "confusion": counts}
    shown = section(page([account]), "confusion")
    assert "matrix" not in shown
    assert "class 7" in shown
    account.probe["details"] = {"classes": ["a", "b"], "confusion": [[3, 0], [0, 3]]}
    assert "No test image was classified wrongly." in section(page([account]), "confusion")


def test_palettes_of_any_size(accounts):
    centers = np.random.default_rng(0).uniform(0, 255, (3000, 3)).astype(np.float32)

    def drawn(palette: Palette) -> str:
        return section(page([replace(accounts[0], palette=palette)]), "palette")

    assert drawn(Palette(centers, np.arange(3000))).count("<rect") == 2048
    known = drawn(Palette(centers[:5]))
    assert (known.count("<rect"), "strip" in known) == (5, False)
    shares = drawn(Palette(centers[:4], np.array([1, 1, 1, 1])))
    assert shares.count('width="180.00"') == 4


# A real browser.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def load(path: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The page's document once its script has run, and what the console said."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--no-first-run"),
            *("--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"),
            *(*options, "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_it_loads_without_errors_and_lets_no_other_script_run(made, tmp_path):
    (tmp_path / "r.html").write_text(made, encoding="utf-8")
    document, console = load(tmp_path / "r.html", tmp_path / "profile")
    assert console == []
    # The script has run: it takes the titles of the points over.
    assert made.count('r="4"><title>') > 100
    assert 'r="4"><title>' not in document
    assert f"<title>{html.escape(f'igpt report: a, {NASTY}', quote=False)}</title>" in document
    planted = made.replace("</main>", "<script>document.title = 'planted'</script><img src=http://127.0.0.1:9/></main>")
    (tmp_path / "planted.html").write_text(planted, encoding="utf-8")
    document, console = load(tmp_path / "planted.html", tmp_path / "profile")
    assert "<title>planted</title>" not in document
    assert sum("Content Security Policy" in line for line in console) == 2


#: Clicks, presses keys, and writes what happened into the document.
PLAY = """
const told = {};
const table = document.querySelector("#comparison");
const heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex(h => h.textContent === "images seen");
const cells = () => [...table.tBodies[0].rows].map(r => r.cells[column].textContent);
const button = heads[column].querySelector("button");
told.before = cells();
button.click();
told.first = [heads[column].getAttribute("aria-sort"), ...cells()];
button.focus();
button.click();
told.second = [heads[column].getAttribute("aria-sort"), ...cells()];
heads[0].querySelector("button").click();
told.third = [heads[0].getAttribute("aria-sort"), heads[column].getAttribute("aria-sort"), ...cells()];
told.focus = document.activeElement === button;
const chart = document.querySelector("#layers svg.chart");
const tip = document.querySelector("#layers .tip");
const press = key => { chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true })); return tip.textContent; };
told.keys = [tip.hidden, press("ArrowRight"), press("ArrowRight"), tip.hidden];
press("Escape");
told.escaped = tip.hidden;
const dot = chart.querySelector("circle").getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: dot.x + 5, clientY: dot.y + 3, bubbles: true }));
told.hover = tip.textContent;
dispatchEvent(new Event("beforeprint"));
told.print = document.querySelectorAll("details:not([open])").length;
dispatchEvent(new Event("afterprint"));
told.wide = document.documentElement.scrollWidth - innerWidth;
told.after = document.querySelectorAll("details[open]").length;
const pre = document.createElement("pre");
pre.id = "told";
pre.textContent = JSON.stringify(told);
document.body.append(pre);
"""


@browser
def test_tables_sort_and_charts_speak(made, accounts, tmp_path):
    played = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", made)
    played = played.replace("</body>", f"<script>{PLAY}</script></body>")
    (tmp_path / "r.html").write_text(played, encoding="utf-8")
    document, console = load(tmp_path / "r.html", tmp_path / "profile", "--window-size=500,900")
    assert console == []
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', document, re.DOTALL)[1]))
    assert told["before"] == ["1,600", "400"]
    assert told["first"] == ["descending", "1,600", "400"]
    assert told["second"] == ["ascending", "400", "1,600"]
    assert told["third"] == ["ascending", None, "1,600", "400"]
    assert told["focus"]
    rows = accounts[0].probe["layers"]
    says = [
        f"a, layer {r['layer']}: {r['accuracy']:.1f}% (95%: {r['interval'][0]:.1f} to {r['interval'][1]:.1f})"
        for r in rows
    ]
    assert told["keys"] == [True, says[0], says[1], False]
    assert told["escaped"]
    assert told["hover"] == says[0]
    assert (told["print"], told["after"]) == (0, 0)
    assert told["wide"] <= 0  # nothing sticks out on a small screen
