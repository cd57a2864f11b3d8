"""All checks of the installation, with fixes.

What needs torch, NumPy or h5py is loaded once it has been found that they load.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from igpt_cli import __version__, shell_completion
from igpt_cli.doctor.trials import run_trial
from igpt_cli.doctor.versions import requirements, satisfies
from igpt_cli.errors import InputError

OK, NOTE, FAILS = "ok", "note", "fails"
PYTHON = ">=3.10"
#: Extras of those who work on igpt itself.
OF_DEVELOPERS = ("test", "docs")
#: What a command says when an extra is missing for it.
EXTRAS = {
    "parquet": "images in Parquet files",
    "tensorboard": "igpt pretrain --tensorboard",
    "openai": "igpt import openai",
}
INSTALL = "pip install {} in the environment of igpt"


@dataclass(frozen=True)
class Finding:
    """One result: state "ok"; "note" where igpt works without it, or more slowly; "fails" where it is needed.

    `advice` says what to do, or ""; `details` are the same facts for a program.
    """

    group: str
    name: str
    state: str
    found: str
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return asdict(self)


#: Called with what is being tried, before it takes a while.
Progress = Callable[[str], None]


def examine(
    workspace: Path | str = ".", compile: bool = True, limit: float = 180.0, progress: Progress | None = None
) -> list[Finding]:
    """Check everything and suggest fixes; files written for a trial are removed again.

    Where a library is missing or does not load, trials that need it are left out.

    Args:
        workspace: the folder in which igpt is to work.
        compile: also try torch.compile, which takes longest.
        limit: seconds that each trial may take.
        progress: called with what is being tried.
    """
    say = progress or (lambda what: None)
    found = [*_software(limit, say)]
    if works(found):
        from igpt_cli.device import choose_device

        found += [*_machine(), *_trials(str(choose_device("auto")), compile, limit, say), *_workspace(Path(workspace))]
    return [*found, *_extras(), *_shell()]


def works(findings: list[Finding]) -> bool:
    """Whether nothing fails that igpt needs."""
    return all(f.state != FAILS for f in findings)


def _software(limit: float, say: Progress) -> Iterator[Finding]:
    python = platform.python_version()
    right = satisfies(python, PYTHON)
    advice = "" if right else f"make a virtual environment with Python {PYTHON.strip('>=')} or newer"
    yield Finding("software", "igpt", OK, __version__, details={"version": __version__})
    yield Finding("software", "Python", OK if right else FAILS, python, advice, {"version": python})
    wanted = [r for r in requirements() if r.extra is None]
    if not wanted:
        where = "igpt is not installed here, so nothing tells which versions it needs"
        yield Finding("software", "libraries", NOTE, where, "pip install -e . in igpt's folder")
        return
    say("loading every library")
    loaded = run_trial("imports", limit=limit)
    for r in wanted:
        broken = (loaded.value or {}).get(r.name, "")
        trouble = r.trouble or (broken and f"{r.version} does not load: {broken}")
        quoted = f"'{r.name}{r.wanted}'"
        advice = (
            INSTALL.format(f"--force-reinstall {quoted}" if broken and not r.trouble else quoted) if trouble else ""
        )
        details = {"version": r.version, "wanted": r.wanted}
        yield Finding("software", r.name, FAILS if trouble else OK, trouble or str(r.version), advice, details)
    if loaded.value is None:
        yield Finding("software", "loading", FAILS, loaded.problem, "install igpt into a new virtual environment")


def _machine() -> Iterator[Finding]:
    from igpt_cli.doctor.machine import memory, processor

    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Finding("machine", "system", OK, system, details={"system": system})
    cpu = processor()
    cores = f"{cpu['usable_cores']} of {cpu['cores']}" if cpu["usable_cores"] != cpu["cores"] else f"{cpu['cores']}"
    bfloat16 = "bfloat16 natively" if cpu["bfloat16"] else "bfloat16 only emulated"
    threads = f"{cpu['threads']} thread{'s' if cpu['threads'] != 1 else ''}"
    found = f"{cpu['name']}, {cores} cores, {threads}, {cpu['instructions']}, {bfloat16}"
    yield Finding("machine", "processor", OK, found, details=cpu)
    yield _memory(memory())
    yield from _gpus()


def _memory(m: dict[str, int | None]) -> Finding:
    known = [f"{_gb(m[k])} {k}" for k in ("total", "available") if m[k] is not None]
    known += [f"{_gb(m['limit'])} allowed to this container"] if m["limit"] is not None else []
    least = min((b for b in m.values() if b is not None), default=None)
    few = least is not None and least < 2**30
    advice = "end other programs; a smaller --micro-batch, --workers 1 and --limit take less" if few else ""
    return Finding("machine", "memory", NOTE if few else OK, ", ".join(known) or "unknown", advice, m)


def _gpus() -> Iterator[Finding]:
    from igpt_cli.doctor.machine import built_for, driver, gpus, has_apple_gpu

    found, version, built = gpus(), driver(), built_for()
    for gpu in found:
        peak = f", peak {gpu['peak_flops'] / 1e12:.0f} TFLOP/s" if gpu["peak_flops"] else ""
        text = (
            f"{gpu['name']}, {_gb(gpu['memory'])}, {_gb(gpu['free'])} free, compute capability {gpu['capability']}"
            f"{peak}; {built}, driver {version or 'unknown'}"
        )
        yield Finding("machine", gpu["device"], OK, text, details={**gpu, "driver": version})
    if found:
        return
    details = {"driver": version, "built_for": built}
    if has_apple_gpu():
        yield Finding("machine", "GPU", OK, "Apple's, as --device mps", details=details)
    elif version is None:
        yield Finding("machine", "GPU", OK, "none; the processor computes", details=details)
    elif not built.startswith("CUDA"):
        advice = "install PyTorch's build for CUDA, by the line that its installation page gives"
        yield Finding("machine", "GPU", NOTE, f"NVIDIA's driver {version}, but PyTorch has {built}", advice, details)
    else:
        advice = f"see that CUDA_VISIBLE_DEVICES hides none, and that nvidia-smi shows a driver for {built} or newer"
        text = f"NVIDIA's driver {version}, but PyTorch with {built} sees no GPU"
        yield Finding("machine", "GPU", NOTE, text, advice, details)


def _trials(device: str, compile: bool, limit: float, say: Progress) -> Iterator[Finding]:
    on_gpu = device.startswith("cuda")
    say(f"trying a training step on {device}")
    t = run_trial("compute", device, limit)
    advice = "use --device cpu, and install the PyTorch that fits the device" if device != "cpu" else ""
    found = t.problem or f"a training step on {device} gives the numbers of the CPU"
    advice = (advice or "install PyTorch anew: it cannot compute on this processor") if t.problem else ""
    yield Finding("computing", "training", FAILS if t.problem else OK, found, advice, {"seconds": t.seconds})
    if compile:
        say("trying torch.compile, which may take a minute")
        t = run_trial("compile", device, limit)
        found = t.problem or f"works on {device}, {t.value:.0f} s for the first function"
        bad = FAILS if on_gpu else NOTE
        details = {"seconds": t.seconds}
        yield Finding("computing", "torch.compile", bad if t.problem else OK, found, _about_compile(t.problem), details)
    say("trying the kernels of attention")
    yield _attention(device, limit)


def _about_compile(problem: str) -> str:
    """What to do where torch.compile does not work."""
    if not problem:
        return ""
    if "compiler" in problem.lower():
        return "install a C++ compiler (`apt install g++`, `xcode-select --install`), or train with --no-compile"
    if "not done" in problem:
        return "try again with a higher --limit on a machine that is less busy, or train with --no-compile"
    if "triton" in problem.lower():
        return "install the triton that PyTorch asks for, or train with --no-compile"
    if "Python.h" in problem:
        return "install Python's headers (`apt install python3-dev`), or train with --no-compile"
    return "train with --no-compile"


def _attention(device: str, limit: float) -> Finding:
    t = run_trial("attention", device, limit)
    kernels: dict[str, str] = t.value or {}
    if t.problem or kernels.get("math"):
        advice = "install PyTorch anew: scaled_dot_product_attention does not work"
        return Finding("computing", "attention", FAILS, t.problem or kernels["math"], advice, {"kernels": kernels})
    work, rest = [k for k, e in kernels.items() if not e], [f"{k} not ({e})" for k, e in kernels.items() if e]
    slow = not {"flash", "cudnn"} & {*work}
    advice = (
        "training works, more slowly; flash attention wants a GPU of compute capability 8.0 or newer" if slow else ""
    )
    found = f"{', '.join(work)} work on {device}" + (f"; {'; '.join(rest)}" if slow else "")
    return Finding("computing", "attention", NOTE if slow else OK, found, advice, {"kernels": kernels})


def _workspace(folder: Path) -> Iterator[Finding]:
    from igpt_cli.doctor.workspace import free_disk, lock_trouble, map_trouble, write_trouble

    where = str(folder.resolve())
    if trouble := write_trouble(folder):
        advice = "go to a folder that you may write in, and that has space left"
        yield Finding("workspace", "writing", FAILS, f"{where}: {trouble}", advice, {"path": where})
        return
    free = free_disk(folder)
    advice = "free some space: tokens of 60,000 images take 0.1 GB, a run of igpt-s 3 GB" if free < 2 * 10**9 else ""
    found = f"{where}, {free / 1e9:,.1f} GB free"
    yield Finding("workspace", "writing", NOTE if advice else OK, found, advice, {"path": where, "free": free})
    lock, mapping = lock_trouble(folder), map_trouble(folder)
    advice = "let one command at a time write a file here; if one says that a file is locked, set "
    advice = advice + "HDF5_USE_FILE_LOCKING=FALSE" if lock else ""
    yield Finding("workspace", "HDF5 locks", NOTE if lock else OK, lock or "files can be locked", advice)
    advice = "keep token files on a local disk" if mapping else ""
    found = mapping or "token files can be mapped into memory"
    yield Finding("workspace", "mapping", FAILS if mapping else OK, found, advice)


def _extras() -> Iterator[Finding]:
    extras = [r for r in requirements() if r.extra and r.extra not in OF_DEVELOPERS]
    for extra in dict.fromkeys(r.extra for r in extras):
        those = [r for r in extras if r.extra == extra]
        there = [r for r in those if not r.trouble]  # more than one are for different platforms
        use = f", for {EXTRAS[extra]}" if extra in EXTRAS else ""
        found = f"{there[0].name} {there[0].version}" if there else f"{those[0].name}: {those[0].trouble}"
        advice = "" if there else f"pip install 'igpt-cli[{extra}]'{use}, if you want that"
        yield Finding("extras", str(extra), OK if there else NOTE, found, advice, {"installed": bool(there)})


def _shell() -> Iterator[Finding]:
    terminal, width = sys.stderr.isatty(), shutil.get_terminal_size().columns
    colour = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") not in (None, "dumb")
    encoding = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    text = f"{width} columns, {'colour' if colour else 'no colour'}" if terminal else "none; bars are plain lines"
    utf8 = encoding.replace("-", "") == "utf8"
    advice = "" if utf8 else "set PYTHONUTF8=1, or a locale with UTF-8"
    details = {"terminal": terminal, "width": width, "colour": colour, "encoding": encoding}
    yield Finding("shell", "terminal", OK if utf8 else NOTE, f"{text}, {encoding}", advice, details)
    try:
        shell = shell_completion.login_shell()
    except InputError as e:
        yield Finding("shell", "completion", NOTE, str(e), "`igpt completion install --shell bash`, zsh or fish")
        return
    there = shell_completion.is_installed(shell)
    found, advice = (f"{shell}: installed", "") if there else (f"{shell}: not installed", "`igpt completion install`")
    yield Finding("shell", "completion", OK if there else NOTE, found, advice, {"shell": shell, "installed": there})


def _gb(n: int | None) -> str:
    return f"{(n or 0) / 1e9:,.1f} GB"
