"""The rules between the rooms, read from the imports of every module (docs/architecture.md states them).

Each rule is a function from the package's modules to a list of what breaks it; the last test plants one breach of
each and sees that it is found.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "igpt_cli"

#: From the ground up; rooms of one floor do not know each other.
FLOORS = (
    {"errors", "statistics"},
    {"files"},
    {"documents"},
    {"hdf5_probe"},
    {"hdf5", "workspace", "shell_completion"},
    {"images"},
    {"palette"},
    {"tokens", "models", "device"},
    {"model_dir", "planning"},
    {"model_input"},
    {"training", "probing", "sampling", "interop"},
    {"evaluation"},
    {"report", "bench"},
    {"ablations", "doctor"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

WITHOUT_TORCH = {
    "errors",
    "statistics",
    "files",
    "documents",
    "hdf5",
    "workspace",
    "shell_completion",
    "images",
    "palette",
    "tokens",
}
HEAVY = {"torch", "numpy", "h5py", "sklearn", "PIL", "matplotlib", "safetensors", "pyarrow", "scipy"}
#: What a command's module may import of the library before the command is called.
LIGHT = {
    *("igpt_cli.errors", "igpt_cli.workspace", "igpt_cli.files", "igpt_cli.cli", "igpt_cli.__version__"),
    "igpt_cli.training.settings",
}
OF_MODELS = {
    "torch",
    "__future__",
    "abc",
    "contextlib",
    "math",
    "typing",
    "collections",
    "dataclasses",
    "difflib",
    "functools",
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NETWORK = {"urllib", "http", "socket", "ssl", "requests", "httpx", "ftplib", "huggingface_hub"}


@dataclass(frozen=True)
class Import:
    """`target` is dotted and ends with the name imported; `top` tells whether importing the module runs it."""

    target: str
    line: int
    top: bool

    def of(self, *names: str) -> bool:
        """Whether this imports one of these modules, or something in them."""
        return any(self.target == n or self.target.startswith(n + ".") for n in names)


@dataclass(frozen=True)
class Module:
    """`name` is dotted, without __init__."""

    name: str
    tree: ast.Module
    imports: list[Import]

    @property
    def room(self) -> str:
        return room_of(self.name)


def room_of(dotted: str) -> str:
    """The room of a module, or of what is imported from it; "" for the package itself and for other packages."""
    first, *rest = dotted.split(".")
    return rest[0] if first == "igpt_cli" and rest and rest[0] in FLOOR else ""


def read_modules(package: Path) -> list[Module]:
    out = []
    for path in sorted(package.rglob("*.py")):
        parts = ("igpt_cli", *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        out.append(Module(name, tree, list(_imports(tree, name if is_package else name.rpartition(".")[0]))))
    return out


def _imports(tree: ast.Module, parent: str) -> Iterator[Import]:
    inside = set()
    for node in ast.walk(tree):
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            inside.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(name, node.lineno, id(node) not in inside) for name in names)


def said(module: Module, found: Import, why: str) -> str:
    return f"{module.name}, line {found.line}, imports {found.target}: {why}"


# The rules.


def library_knows_no_command_line(modules):
    return [
        said(m, i, "the command line calls the library, never the reverse")
        for m in modules
        if m.room not in ("cli", "__main__")
        for i in m.imports
        if i.of("igpt_cli.cli", "igpt_cli.__main__")
    ]


def typer_and_rich_stay_in_cli(modules):
    return [
        said(m, i, "only igpt_cli.cli speaks to a terminal")
        for m in modules
        if m.room not in ("cli", "__main__")
        for i in m.imports
        if i.of("typer", "rich", "click", "argparse")
    ]


def lower_rooms_know_no_torch(modules):
    return [
        said(m, i, f"{m.room} works without torch")
        for m in modules
        if m.room in WITHOUT_TORCH
        for i in m.imports
        if i.of("torch", "torchvision", "safetensors.torch", "transformers")
    ]


def models_know_torch_and_nothing_else(modules):
    return [
        said(m, i, "models know torch; no files, flags, devices or printing")
        for m in modules
        if m.room == "models"
        for i in m.imports
        if not i.of("igpt_cli.errors", "igpt_cli.models", *OF_MODELS)
    ] + [
        f"{m.name}, line {call.lineno}, calls {call.func.id}(): models do not print and open no files"
        for m in modules
        if m.room == "models"
        for call in _calls(m)
        if isinstance(call.func, ast.Name) and call.func.id in ("print", "open", "input")
    ]


def imports_go_down(modules):
    return [
        said(m, i, f"an import goes down or stays in the room; {room_of(i.target)} is not below {m.room or 'igpt_cli'}")
        for m in modules
        for i in m.imports
        if room_of(i.target) and room_of(i.target) != m.room
        if FLOOR[room_of(i.target)] >= FLOOR.get(m.room, 0)
    ]


def every_module_has_a_room(modules):
    return [f"{m.name} is in no room of FLOORS; give it one" for m in modules if not m.room and m.name != "igpt_cli"]


def no_import_runs_in_a_circle(modules):
    """Of modules that import each other when they are loaded; a deferred import inside a function does not count."""
    names = {m.name for m in modules}
    below = {m.name: {_module(i.target, names) for i in m.imports if i.top} - {None, m.name} for m in modules}
    found: list[str] = []
    state: dict[str, bool] = {}  # False while a module is being visited, then True

    def visit(name: str, trail: list[str]) -> None:
        if name in state:
            if not state[name]:
                found.append(f"imports run in a circle: {' -> '.join([*trail[trail.index(name) :], name])}")
            return
        state[name] = False
        for other in sorted(below[name]):
            visit(other, [*trail, name])
        state[name] = True

    for name in sorted(below):
        visit(name, [])
    return found


def heavy_libraries_wait_for_a_command(modules):
    return [
        said(m, i, "help must be instant: import this inside the command's function")
        for m in modules
        if m.room in ("cli", "__main__") or m.name == "igpt_cli"
        for i in m.imports
        if i.top and (i.of(*HEAVY) or (i.of("igpt_cli") and not i.of(*LIGHT)))
    ]


def models_are_seen_through_the_contract(modules):
    return [
        said(m, i, f"{m.room} sees any model through the contract, never by its class")
        for m in modules
        if m.room in ("probing", "report")
        for i in m.imports
        if i.of("igpt_cli.models")
        and not i.of("igpt_cli.models.contract", "igpt_cli.models.registry", "igpt_cli.planning.cost")
    ]


def nothing_is_unpickled_or_unpacked(modules):
    """CIFAR's pickles go through images/restricted.py, weights in interop through torch's; archives are streamed."""
    found = []
    for m in modules:
        if m.name == "igpt_cli.images.restricted":
            continue
        found += [said(m, i, "only images/restricted.py unpickles") for i in m.imports if i.of(*UNPICKLERS)]
        found += [said(m, i, "call it torch.load, so that it is seen") for i in m.imports if i.of("torch.load")]
        for call in _calls(m):
            text = ast.unparse(call.func)
            truthy = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            if m.room == "interop" and text == "torch.load" and "weights_only=True" in map(ast.unparse, call.keywords):
                continue
            if truthy or text in ("torch.load", "eval", "exec") or text.endswith((".extractall", ".unpack_archive")):
                found.append(f"{m.name}, line {call.lineno}, calls {ast.unparse(call)[:60]}: files are not trusted")
    return found


def only_fetch_uses_the_network(modules):
    return [
        said(m, i, "only images/fetch.py uses the network")
        for m in modules
        if m.name != "igpt_cli.images.fetch"
        for i in m.imports
        if i.of(*NETWORK)
    ]


def no_import_by_name(modules):
    """Such an import would pass these rules unseen; the root command loads nothing but the modules of cli/."""
    return [
        f"{m.name}, line {call.lineno}, calls {ast.unparse(call)[:60]}: write an import statement"
        for m in modules
        for call in _calls(m)
        if m.name != "igpt_cli.cli.app"
        and ast.unparse(call.func) in ("__import__", "import_module", "importlib.import_module")
    ]


def _calls(module: Module) -> list[ast.Call]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]


def _module(target: str, names: set[str]) -> str | None:
    """The module that an import loads: `target` itself, or the one that it is a name in."""
    return target if target in names else target.rpartition(".")[0] if target.rpartition(".")[0] in names else None


RULES = (
    library_knows_no_command_line,
    typer_and_rich_stay_in_cli,
    lower_rooms_know_no_torch,
    models_know_torch_and_nothing_else,
    imports_go_down,
    every_module_has_a_room,
    no_import_runs_in_a_circle,
    heavy_libraries_wait_for_a_command,
    models_are_seen_through_the_contract,
    nothing_is_unpickled_or_unpacked,
    only_fetch_uses_the_network,
    no_import_by_name,
)


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    found = read_modules(PACKAGE)
    assert len(found) > 50
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, modules):
    found = rule(modules)
    assert not found, "\n".join(found)


def test_palette_and_tokens_load_without_torch(modules):
    """What the rules say of the text, seen in a process, with whatever the libraries import in turn."""
    names = [m.name for m in modules if m.room in WITHOUT_TORCH]
    code = f"import sys\nfor n in {names!r}: __import__(n)\nprint([m for m in ('torch', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


#: A breach of each rule: the module it is planted in, the source, and a part of what must be said.
BREACHES = [
    (library_knows_no_command_line, "tokens/x.py", "from igpt_cli.cli.output import Voice", "igpt_cli.cli.output"),
    (library_knows_no_command_line, "tokens/x.py", "from ..cli import output", "igpt_cli.tokens.x, line 1"),
    (typer_and_rich_stay_in_cli, "report/x.py", "def f():\n    import rich.table", "line 2, imports rich.table"),
    (lower_rooms_know_no_torch, "palette/x.py", "def f():\n    from torch import nn", "palette works without torch"),
    (models_know_torch_and_nothing_else, "models/x.py", "from pathlib import Path", "imports pathlib.Path"),
    (models_know_torch_and_nothing_else, "models/x.py", "from igpt_cli.files import replacing", "igpt_cli.files"),
    (models_know_torch_and_nothing_else, "models/x.py", "print(1)", "calls print()"),
    (imports_go_down, "palette/x.py", "def f():\n    import igpt_cli.tokens.store", "tokens is not below palette"),
    (imports_go_down, "images/x.py", "from igpt_cli import palette", "palette is not below images"),
    (imports_go_down, "training/x.py", "from igpt_cli.probing import probe", "probing is not below training"),
    (imports_go_down, "__init__.py", "from igpt_cli.errors import IgptError", "errors is not below igpt_cli"),
    (every_module_has_a_room, "helpers/x.py", "", "igpt_cli.helpers.x is in no room"),
    (no_import_runs_in_a_circle, "images/x.py", "from igpt_cli.images import y", "images.x -> igpt_cli.images.y"),
    (heavy_libraries_wait_for_a_command, "cli/x.py", "import numpy as np", "imports numpy"),
    (heavy_libraries_wait_for_a_command, "cli/x.py", "from igpt_cli.tokens import store", "igpt_cli.tokens.store"),
    (
        heavy_libraries_wait_for_a_command,
        "__init__.py",
        "try:\n    import torch\nfinally:\n    pass",
        "igpt_cli, line 2",
    ),
    (
        models_are_seen_through_the_contract,
        "probing/x.py",
        "from igpt_cli.models.igpt import IGPT",
        "never by its class",
    ),
    (nothing_is_unpickled_or_unpacked, "images/x.py", "import pickle", "imports pickle"),
    (nothing_is_unpickled_or_unpacked, "images/x.py", "a = np.load(f, allow_pickle=True)", "allow_pickle=True"),
    (nothing_is_unpickled_or_unpacked, "training/x.py", "torch.load(f)", "torch.load(f)"),
    (nothing_is_unpickled_or_unpacked, "training/x.py", "torch.load(f, weights_only=True)", "torch.load(f"),
    (nothing_is_unpickled_or_unpacked, "interop/x.py", "torch.load(f)", "torch.load(f)"),
    (nothing_is_unpickled_or_unpacked, "interop/x.py", "torch.load(f, weights_only=False)", "torch.load(f"),
    (nothing_is_unpickled_or_unpacked, "interop/x.py", "torch.load(f, weights_only=x)", "torch.load(f"),
    (nothing_is_unpickled_or_unpacked, "interop/x.py", "from torch import load\nload(f)", "imports torch.load"),
    (nothing_is_unpickled_or_unpacked, "images/x.py", "tar.extractall('.')", "tar.extractall"),
    (only_fetch_uses_the_network, "images/x.py", "from urllib.request import urlopen", "urllib.request.urlopen"),
    (no_import_by_name, "tokens/x.py", "importlib.import_module('torch')", "import_module('torch')"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text", "message"), BREACHES, ids=[f"{b[0].__name__}-{b[1]}" for b in BREACHES]
)
def test_a_breach_is_found(rule, path, text, message, tmp_path):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text, encoding="utf-8")
    (planted.parent / "y.py").write_text("from igpt_cli.images.x import f", encoding="utf-8")
    found = [f for f in rule(read_modules(tmp_path)) if message in f]
    assert len(found) == 1, f"{rule.__name__} does not see {text!r}"


def test_every_rule_has_a_breach():
    assert {rule for rule, *_ in BREACHES} == set(RULES)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "cli/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from igpt_cli.tokens.store import TokenFile",
        ),
        ("cli/x.py", "def f():\n    import torch, h5py\n    from igpt_cli.report import demo"),
        ("images/restricted.py", "import pickle"),
        ("interop/x.py", "import torch\na = torch.load(f, map_location='cpu', weights_only=True)"),
        ("images/fetch.py", "import urllib.request"),
        ("images/x.py", "a = np.load(f, allow_pickle=False)"),
        ("images/x.py", "def f():\n    from igpt_cli.images import y"),
        ("probing/x.py", "from igpt_cli.models.registry import build_model"),
        ("cli/x.py", "from igpt_cli import __version__"),
    ],
)
def test_what_is_allowed_is_not_reported(path, text, tmp_path):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text, encoding="utf-8")
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "y.py").write_text("from igpt_cli.images import x", encoding="utf-8")
    assert [f for rule in RULES for f in rule(read_modules(tmp_path))] == []
