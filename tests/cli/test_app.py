"""The root of the command line: help, start-up, errors, exit codes, pipes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt_cli import __version__
from igpt_cli.cli.reference import commands

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
COMMANDS = commands()
HELP = """
import sys
from igpt_cli.__main__ import main
sys.argv = ["igpt", "--help"]
try:
    main()
except SystemExit:
    pass
"""


def python(code: str, *args: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, **more)


def igpt_process(*args: object, **more) -> subprocess.Popen:
    """The program in a process of its own, with pipes."""
    command = [sys.executable, "-m", "igpt_cli", *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**pipes, **more})


# Start-up.


def test_help_loads_no_heavy_library():
    heavy = ("torch", "numpy", "h5py", "sklearn", "PIL", "matplotlib", "igpt_cli.images.sources", "igpt_cli.model_dir")
    done = python(f"{HELP}\nprint([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)")
    assert done.stdout.startswith("Usage: igpt [OPTIONS] COMMAND")
    assert done.stderr.strip() == "[]"


def test_help_takes_at_most_twice_the_time_of_its_libraries():
    """Minima of several runs, as a ratio; more runs are made while another process disturbs them."""
    fastest = {"import typer, rich": float("inf"), HELP: float("inf")}
    for _ in range(4):
        for _ in range(5):
            for code in fastest:
                started = time.perf_counter()
                python(code)
                fastest[code] = min(fastest[code], time.perf_counter() - started)
        libraries, shown = fastest.values()
        if shown <= 2.0 * libraries:
            return
    assert shown <= 2.0 * libraries, f"igpt --help takes {shown:.3f} s, import typer, rich {libraries:.3f} s"


# Help.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name, igpt):
    done = igpt(*name.split()[1:], "--help")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert done.code == 0
    assert lines[0].startswith(f"Usage: {name} ")
    assert lines[1] == ""
    assert lines[2].endswith((".", ",")) or len(lines[2]) > 40, "the first line says what the command does"
    examples = lines[lines.index("Examples:") + 1 :]
    examples = examples[: examples.index("")]
    assert any(line.startswith("igpt ") for line in examples), f"{name} --help shows no line that begins with igpt"
    assert any(name in line for line in examples), f"{name} --help shows no example of itself"


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_has_help(name):
    silent = [p.name for p in COMMANDS[name].params if not (p.help or "").strip()]
    assert not silent, f"{name}: no help for {', '.join(silent)}"


def test_commands_are_listed_in_the_order_of_the_road(igpt):
    shown = igpt("--help").stdout.split("Commands:")[1].split("\n\n")[0].split("\n")
    names = [line.split()[0] for line in shown if line.startswith("  ") and not line.startswith("   ")]
    assert names == [
        "demo", "data", "palette", "tokenize", "tokens", "models", "plan", "pretrain", "evaluate", "sample", "complete",
        "features", "probe", "compare", "report", "attention", "finetune", "train", "ablate", "import", "export", "bench",
        "doctor", "completion",
    ]  # fmt: skip


def test_version(igpt):
    done = igpt("--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"igpt {__version__}\n", "")


def test_python_m():
    process = igpt_process("--version")
    assert process.communicate(timeout=60) == (f"igpt {__version__}\n", "")
    assert process.returncode == 0


# Errors.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["pallete"], "palette"),
        (["palette", "fitt"], "fit"),
        (["models", "--jsn"], "--json"),
        (["palette", "fit", "--clusters", "many"], "--clusters"),
        (["palette", "fit", "--clusters", "1"], "--clusters"),
        (["tokens", "merge"], "T"),
        (["palette", "convert", "a.npy"], "OUT"),
    ],
    ids=" ".join,
)
def test_wrong_usage(args, said, igpt):
    done = igpt(*args)
    assert done.code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("Usage: igpt")


def test_an_error_is_one_line(igpt, workspace):
    done = igpt("palette", "show", "nowhere.npz")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere.npz does not exist; a palette was expected there\n"


@pytest.fixture
def broken(monkeypatch):
    """igpt models raises what it is given."""

    def set_error(error: BaseException) -> None:
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("igpt_cli.planning.cost.describe_models", fail)

    return set_error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("odd"), 1, "error: internal: RuntimeError: odd; --debug shows where, please report it\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (MemoryError(), 1, "error: out of memory: an allocation failed\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("kept in runs/x"), 130, "kept in runs/x\n"),
    ],
    ids=["bug", "system", "memory", "interrupt", "interrupt with words"],
)
def test_what_goes_wrong_is_said_in_one_line(error, code, said, broken, igpt):
    broken(error)
    done = igpt("models")
    assert (done.code, done.stdout, done.stderr) == (code, "", said)


@pytest.mark.parametrize("args", [["--debug", "models"], ["models", "--debug"]], ids=" ".join)
def test_debug_raises_it(args, broken, igpt):
    broken(RuntimeError("odd"))
    with pytest.raises(RuntimeError, match="odd"):
        igpt(*args)


def test_debug_shows_the_traceback():
    process = igpt_process("palette", "show", "nowhere.npz", "--debug")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert "Traceback (most recent call last)" in stderr
    assert "InputError: nowhere.npz does not exist" in stderr


def test_debug_after_two_dashes_is_an_argument(igpt, workspace):
    assert igpt("palette", "show", "--", "--debug").stderr.startswith("error: --debug does not exist")


# Pipes and signals.

UNBUFFERED = {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_a_pipe_that_ends_early():
    process = igpt_process("models", env=UNBUFFERED)
    head = subprocess.run(["head", "-1"], stdin=process.stdout, capture_output=True, text=True, timeout=60)
    process.stdout.close()
    assert head.stdout.split() == [*("name", "pixels", "layers", "parameters", "training", "GB")]
    assert process.stderr.read() == ""
    process.communicate(timeout=60)


def test_a_pipe_that_nobody_reads():
    """The same where the reader is gone before the first word, which `head` seldom is."""
    reader, writer = os.pipe()
    os.close(reader)
    process = igpt_process("data", "info", SAMPLES / "photos", stdout=writer, env=UNBUFFERED)
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert stderr == ""
    assert process.returncode in (0, 1, 141)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal(number, workspace):
    process = igpt_process("palette", "fit", "-")
    assert process.stderr.readline() == "out: data/palette.npz (default)\n"
    time.sleep(0.2)  # until it waits for paths on stdin
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert list(workspace.rglob("*.npz")) == []


# JSON.


def small_vit(path: Path) -> Path:
    """A model directory of a ViT with random weights and no palette."""
    from igpt_cli.model_dir import new_config, write_model
    from igpt_cli.models.registry import build_model, model_config

    model = model_config("vit-ti-32", embed_dim=12, depth=1, num_heads=3, n_classes=2)
    prepared = {"size": 32, "crop": 1.0, "filter": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    return write_model(path, build_model(model).state_dict(), None, new_config(model, preparation=prepared))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with what the commands below work on."""
    from typer.testing import CliRunner

    from igpt_cli.cli.app import app

    folder = tmp_path_factory.mktemp("json")
    size = ["--views", 8, "-r", 4, "-j", 1]
    for args in (
        ["palette", "fit", SAMPLES / "photos", *size, "-k", 8, "-o", folder / "p.npz"],
        ["tokenize", SAMPLES / "photos", *size, "--allow-size", "-p", folder / "p.npz", "-o", folder / "t.h5"],
        ["pretrain", folder / "t.h5", "--steps", 1, "-b", 2, "-o", folder / "run", "--device", "cpu"],
        ["export", "huggingface", folder / "run", "-o", folder / "theirs"],
        ["export", "timm", small_vit(folder / "vit"), "-o", folder / "timm"],
    ):
        done = CliRunner().invoke(app, list(map(str, args)))
        assert done.exit_code == 0, done.output
    return folder


#: A model that `igpt bench` times at once.
TINY = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "-r", "4", "--repeats", "1"]
WITH_JSON = {
    "igpt data info": ["{samples}/photos"],
    "igpt palette fit": ["{samples}/photos", "-k", "8", "-r", "4", "-o", "new.npz"],
    "igpt palette count": ["{samples}/photos", "-r", "4", "-o", "new.npz"],
    "igpt palette show": ["{made}/p.npz"],
    "igpt palette convert": ["{made}/p.npz", "new.npy"],
    "igpt tokenize": ["{samples}/photos", "-p", "{made}/p.npz", "-r", "4", "--allow-size", "-o", "new.h5", "-j", "1"],
    "igpt tokens info": ["{made}/t.h5"],
    "igpt tokens verify": ["{made}/t.h5"],
    "igpt models": [],
    "igpt plan": [],
    "igpt pretrain": ["{made}/t.h5", "--steps", "1", "-b", "2", "-o", "new", "--device", "cpu"],
    "igpt evaluate": ["{made}/run", "{made}/t.h5", "--split", "train", "--device", "cpu"],
    "igpt sample": ["{made}/run", "-n", "2", "-o", "new.png", "--device", "cpu"],
    "igpt complete": ["{made}/run", "{made}/t.h5", "-n", "1", "--limit", "1", "-o", "new.png", "--device", "cpu"],
    "igpt features": ["{made}/run", "{made}/t.h5", "--layers", "0,1", "-o", "new.h5", "--device", "cpu"],
    "igpt finetune": ["{made}/run", "{made}/t.h5", "--steps", "1", "-b", "2", "-o", "new", "--device", "cpu"],
    "igpt import huggingface": ["{made}/theirs", "-o", "new"],
    "igpt import timm": ["{made}/timm", "-o", "new"],
    "igpt export timm": ["{made}/vit", "-o", "new"],
    "igpt export huggingface": ["{made}/run", "-o", "new"],
    "igpt bench sample": [*TINY, "-b", "1", "--device", "cpu"],
    "igpt bench train": [*TINY, "--steps", "1"],
    "igpt bench probe": TINY,
    "igpt ablate": [],
    "igpt compare": ["{made}/run", "{made}/t.h5", "-o", "new", "--device", "cpu"],
    "igpt report": ["{made}/run", "--no-probe", "--no-samples", "-o", "new.html", "--device", "cpu"],
    "igpt attention": ["{made}/run", "{made}/t.h5", "-o", "new.png", "--device", "cpu"],
    "igpt probe": ["{made}/run", "{made}/t.h5", "--layer", "1", "--no-floors", "--device", "cpu"],
}


@pytest.mark.parametrize("name", WITH_JSON)
def test_json_is_one_document_and_nothing_else(name, made, igpt, workspace):
    args = [a.format(samples=SAMPLES, made=made) for a in WITH_JSON[name]]
    done = igpt(*name.split()[1:], *args, "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    assert document
    assert done.stdout == json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def test_every_json_is_tried():
    """Four have tests of their own: igpt demo takes minutes, igpt import openai needs TensorFlow or a stand-in, igpt
    train a model that is small enough, and igpt doctor processes of its own."""
    offered = {n for n, c in COMMANDS.items() if any("--json" in p.opts for p in c.params)}
    assert offered == {*WITH_JSON, "igpt demo", "igpt import openai", "igpt train", "igpt doctor"}
