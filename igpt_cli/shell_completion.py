"""Completion scripts for bash, zsh and fish, and where shells look for them.

The scripts know nothing of igpt: at each Tab they ask `igpt completion candidates`, which prints "files" or "words",
then a candidate a line, with a tab and a few words of help behind it. Where there is no candidate, "files" lets the
shell complete names of files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from igpt_cli.errors import InputError, OutputError
from igpt_cli.files import check_output, replacing

#: The beginning of every script, by which ours are recognised.
MARK = "# Completion of igpt"

_BASH = r"""
_igpt() {
    local kind value igpt="${1/#\~/$HOME}"
    COMPREPLY=()
    {
        read -r kind
        while IFS=$'\t' read -r value _; do
            COMPREPLY+=("$(printf %q "$value")")
        done
    } < <("$igpt" completion candidates --line "${COMP_LINE:0:COMP_POINT}" --breaks "$COMP_WORDBREAKS" 2>/dev/null)
    if [ "$kind" = files ] && [ "${#COMPREPLY[@]}" -eq 0 ]; then
        compopt -o default 2>/dev/null
    fi
    return 0
}
complete -F _igpt igpt
"""

_ZSH = r"""
_igpt() {
    local igpt=${(Q)words[1]} kind line
    local -a lines offered
    lines=("${(@f)$("${igpt/#\~/$HOME}" completion candidates -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    kind=$lines[1]
    for line in "${(@)lines[2,-1]}"; do
        offered+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    if (( $#offered )); then
        _describe -V igpt offered
    elif [[ $kind == files ]]; then
        _files
    fi
}
if (( ! $+functions[compdef] )); then
    autoload -Uz compinit && compinit
fi
compdef _igpt igpt
"""

_FISH = r"""
function __igpt_candidates
    set -l words (commandline -opc) (commandline -ct)
    set -l igpt (string replace -r '^~' $HOME -- $words[1])
    set -l lines ($igpt completion candidates -- $words[2..] 2>/dev/null)
    if test (count $lines) -gt 1
        printf '%s\n' $lines[2..]
    else if test "$lines[1]" = files
        __fish_complete_path (commandline -ct)
    end
end
complete --command igpt --no-files --keep-order --arguments '(__igpt_candidates)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
SHELLS = tuple(_SCRIPTS)


class Installed(NamedTuple):
    """A shell's completion: the script, and the startup file that reads it (None for fish)."""

    shell: str
    script: Path
    startup: Path | None

    @property
    def line(self) -> str:
        """The line in the startup file."""
        quoted = "'" + str(self.script).replace("'", "'\\''") + "'"
        return f"[ -r {quoted} ] && . {quoted}  {MARK.lower()}"


def script(shell: str) -> str:
    """What a shell reads to complete igpt's command line. Raises InputError: there is no script for this shell."""
    if shell not in SHELLS:
        raise InputError(f"there is no completion for {shell!r}; give --shell bash, zsh or fish")
    return f"{MARK} in {shell}, made by `igpt completion show --shell {shell}`.{_SCRIPTS[shell]}"


def login_shell() -> str:
    """The name of the shell in $SHELL, such as "zsh".

    Raises:
        InputError: it is none of `SHELLS`.
    """
    path = os.environ.get("SHELL", "")
    if (name := Path(path).name) not in SHELLS:
        raise InputError(f"$SHELL is {path!r}, none of {', '.join(SHELLS)}; say which with --shell")
    return name


def places(shell: str) -> Installed:
    """The files of a shell's completion, installed or not."""
    if shell == "fish":
        return Installed(shell, _folder("XDG_CONFIG_HOME", ".config") / "fish" / "completions" / "igpt.fish", None)
    at = _folder("XDG_DATA_HOME", ".local/share") / "igpt" / f"completion.{shell}"
    home = _folder("ZDOTDIR", "") if shell == "zsh" else Path.home()
    return Installed(shell, at, home / f".{shell}rc")


def is_installed(shell: str) -> bool:
    """Whether `install` has installed the completion for this shell."""
    at = places(shell)
    return at.script.is_file() and (at.startup is None or at.line in _read(at.startup))


def install(shell: str, force: bool = False) -> Installed:
    """Write the script, and for bash and zsh one line at the end of their startup file. It is safe to install again.

    Args:
        force: replace a file that is not ours.

    Raises:
        InputError: there is no script for this shell.
        OutputError: the file exists and is not ours, or cannot be written.
    """
    text, at = script(shell), places(shell)
    check_output(at.script, force or _read(at.script).startswith(MARK))
    with replacing(at.script) as part:
        part.write_text(text, encoding="utf-8")
    if at.startup is not None and at.line not in (before := _read(at.startup)):
        try:
            # Appended, not replaced: the file may be a link.
            with at.startup.open("a", encoding="utf-8") as file:
                file.write(("" if before.endswith("\n") or not before else "\n") + at.line + "\n")
        except OSError as e:
            raise OutputError(f"cannot write {at.startup}: {e.strerror}; write this line there: {at.line}") from e
    return at


def _folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or one below the home folder."""
    return Path(os.environ.get(variable) or Path.home() / default)


def _read(path: Path) -> str:
    """The text of a file, or ""."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
