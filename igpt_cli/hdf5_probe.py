"""Read an HDF5 file's structure in a child process first, since a damaged one can hang or crash the library."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from igpt_cli.errors import FormatError
from igpt_cli.files import proc_bytes

#: Limits of the child: seconds of CPU (it takes milliseconds), seconds in all, bytes of memory.
CPU_SECONDS, WALL_SECONDS, MEMORY = 2, 60.0, 2**29

#: Probed files: {path: device, inode, size and times of the last change}.
_sound: dict[Path, tuple[int, ...]] = {}


def probe(path: Path, read: Callable[[], None]) -> None:
    """Call `read` in a forked child, which takes a few milliseconds, once for each version of a file.

    Exceptions of `read` are ignored: this process meets them, too. Without `os.fork`, nothing is probed.

    Raises:
        FormatError: the child crashed or did not end.
    """
    if not hasattr(os, "fork"):
        return
    import resource  # not on Windows; before the fork, so that the child imports nothing

    now = path.stat()
    state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    if _sound.get(path) == state:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no other thread
        child = os.fork()
    if child == 0:
        code = 0
        try:
            before = _limit(resource)
            read()
        except BaseException as e:
            code = int("alloc" in str(e) or isinstance(e, MemoryError) or _virtual("VmPeak") - before > MEMORY // 2)
        finally:
            os._exit(code)
    status = _wait(child)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise FormatError(f"{path} is damaged: reading its structure takes more than {MEMORY / 1e6:.0f} MB of memory")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        looped = number in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
        how = "reading its structure does not end" if looped else f"HDF5 crashes on it ({signal.Signals(number).name})"
        raise FormatError(f"{path} is damaged: {how}; copy or download it again, or make it anew")
    _sound[path] = state


def _limit(resource: Any) -> int:
    """In the child: silence stderr, reset signals, limit time and memory; return the memory in use."""
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if before := _virtual("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, before + MEMORY))
    return before


def _virtual(name: str) -> int:
    """Bytes of this process's address space, "VmSize" now or "VmPeak" at most; 0 if the system does not say."""
    return proc_bytes("/proc/self/status", name) or 0


def _wait(child: int) -> int:
    """The child's exit status; it is killed if it takes too long or this process is interrupted."""
    end, pause = time.monotonic() + WALL_SECONDS, 0.0005
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            if time.monotonic() > end:
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
