"""Installed libraries against the versions that igpt's metadata require."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from importlib import metadata

_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Requirement:
    """A library that igpt, or the `extra` of that name, asks for; `wanted` is such as ">=2.9,<2.14"."""

    name: str
    wanted: str
    extra: str | None

    @property
    def version(self) -> str | None:
        """The version that is installed; None where none is."""
        return version_of(self.name)

    @property
    def trouble(self) -> str:
        """What is wrong with the version; "" where nothing is."""
        if self.version is None:
            return "not installed"
        return "" if satisfies(self.version, self.wanted) else f"{self.version} is installed, {self.wanted} is needed"


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements(distribution: str = "igpt-cli") -> list[Requirement]:
    """What a distribution asks for, by its metadata, each library once an extra; [] where it is not installed."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    found: dict[tuple[str, str | None], Requirement] = {}
    for line in lines:
        name, wanted, extra = parsed(line)
        found.setdefault((name, extra), Requirement(name, wanted, extra))
    return list(found.values())


def parsed(line: str) -> tuple[str, str, str | None]:
    """
    >>> parsed('pyarrow>=14; extra == "parquet"'), parsed("torch<2.14,>=2.9")
    (('pyarrow', '>=14', 'parquet'), ('torch', '<2.14,>=2.9', None))
    """
    before, _, marker = line.partition(";")
    match = re.match(r"\s*([\w.-]+)(?:\[.*?\])?\s*\(?([^)]*)\)?", before)
    assert match is not None, line
    extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", marker)
    return match[1], match[2].replace(" ", ""), extra[1] if extra else None


def satisfies(version: str, wanted: str) -> bool:
    """Whether the numbers of a version fulfil every clause.

    >>> satisfies("2.13.0+cpu", "<2.14,>=2.9"), satisfies("1.9", ">=1.10")
    (True, False)
    """
    clauses = [re.fullmatch(r"(>=|<=|==|!=|>|<)([\w.+-]+)", clause) for clause in wanted.split(",") if clause]
    return all(_OPERATORS[c[1]](*_padded(version, c[2])) for c in clauses if c is not None)


def _padded(*versions: str) -> list[tuple[int, ...]]:
    """Their numbers, of one length: 2.9 is 2.9.0."""
    numbers = [[int(n) for n in re.match(r"\d+(\.\d+)*", v)[0].split(".")] for v in versions]  # type: ignore[index]
    longest = max(map(len, numbers))
    return [(*n, *[0] * (longest - len(n))) for n in numbers]
