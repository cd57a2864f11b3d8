"""igpt doctor: its text, its JSON, its exit code."""

from __future__ import annotations

import json

import pytest

from igpt_cli.cli.doctor import report
from igpt_cli.doctor import examine as examination
from igpt_cli.doctor.examine import Finding

FOUND = [
    Finding("software", "torch", "ok", "2.13.0", details={"version": "2.13.0"}),
    Finding("software", "h5py", "ok", "3.16.0"),
    Finding("computing", "torch.compile", "note", "no C++ compiler", "install one, or train with --no-compile"),
]
BROKEN = Finding("workspace", "writing", "fails", "/x: Permission denied", "go to another folder")


@pytest.fixture
def found(monkeypatch):
    """What the examination finds; with which arguments it was called is kept."""
    calls: list[tuple] = []

    def set_found(findings: list[Finding]) -> list[tuple]:
        monkeypatch.setattr(examination, "examine", lambda *args: calls.append(args) or findings)
        return calls

    return set_found


def test_text(found, igpt):
    calls = found(FOUND)
    done = igpt("doctor", "--no-compile", "--limit", "5")
    assert (done.code, done.stderr) == (0, "all that igpt needs works\n")
    assert done.stdout == (
        "software\n"
        "  ok     torch          2.13.0\n"
        "  ok     h5py           3.16.0\n"
        "\n"
        "computing\n"
        "  note   torch.compile  no C++ compiler\n"
        "                        -> install one, or train with --no-compile\n"
    )
    assert calls[0][:3] == (".", False, 5.0)


def test_what_fails_is_named_and_ends_with_1(found, igpt):
    found([*FOUND, BROKEN])
    done = igpt("doctor")
    assert (done.code, done.stderr) == (1, "does not work: writing\n")
    assert "  FAILS  writing        /x: Permission denied\n" in done.stdout
    assert igpt("doctor", "-q").stderr == ""


def test_json(found, igpt):
    found([*FOUND, BROKEN])
    done = igpt("doctor", "--json")
    document = json.loads(done.stdout)
    assert (done.code, document["works"]) == (1, False)
    assert document["findings"][0] == {
        "group": "software",
        "name": "torch",
        "state": "ok",
        "found": "2.13.0",
        "advice": "",
        "details": {"version": "2.13.0"},
    }
    assert done.stdout == json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def test_long_lines_are_broken_where_they_begin():
    text = report([Finding("machine", "cpu", "ok", "word " * 30)], width=60)
    first, *rest = text.splitlines()[1:]
    assert max(map(len, text.splitlines())) <= 60
    assert {len(line) - len(line.lstrip()) for line in rest} == {first.index("word")}


@pytest.mark.slow
def test_here(igpt, workspace):
    """For real, with every trial in its own process."""
    done = igpt("doctor", "--json", "--limit", "500")
    document = json.loads(done.stdout)
    states = {f["name"]: f["state"] for f in document["findings"]}
    assert done.code == 0, done.stderr
    assert {states[n] for n in ("torch", "numpy", "h5py", "training", "attention", "writing", "mapping")} == {"ok"}
    assert list(workspace.iterdir()) == []
