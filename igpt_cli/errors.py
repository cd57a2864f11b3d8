"""Errors that the user can fix: the command line shows their text, without a traceback.

The text says what failed, with the names and numbers that disagree, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


class IgptError(Exception):
    """Something asked for cannot be done; the message says why and what to do."""


class InputError(IgptError):
    """An input is missing, broken, or of another kind than was asked for."""


class FormatError(InputError):
    """A file is not what its place in the pipeline needs: wrong kind, version, shape, dtype or range."""


class MismatchError(IgptError):
    """Two inputs that must agree do not: palette, resolution, vocabulary, preparation."""


class OutputError(IgptError):
    """A result cannot be written: it exists already, or its folder cannot be used."""


class NonFiniteError(IgptError):
    """A training loss became NaN or infinite."""


class ElsewhereError(IgptError):
    """Another rank failed and shows why; this one ends with it."""


class LostRankError(IgptError):
    """The connection to another rank broke: it failed and shows why, or its machine or the network did."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during long work, after what was done so far has been kept; the message says where."""


def unknown(kind: str, name: str, known: Collection[str], listed: str | None = None) -> InputError:
    """The error for a name that is none of those known: what is near, and all of them, or where they are `listed`.

    >>> str(unknown("recipe", "diet", ["plain", "deit"]))
    "there is no recipe 'diet'; did you mean deit? known: plain, deit"
    """
    near = get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"there is no {kind} {name!r}; {hint}{listed or 'known: ' + ', '.join(known)}")
