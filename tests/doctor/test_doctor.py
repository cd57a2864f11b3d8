"""igpt_cli.doctor: what is found, and what is said of things that fail (simulated, for here they work)."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from igpt_cli.doctor import examine as examination
from igpt_cli.doctor import machine, trials, versions, workspace
from igpt_cli.doctor.examine import FAILS, NOTE, OK, Finding, examine, works
from igpt_cli.doctor.trials import TrialResult

#: How the trials end where all is well.
WELL = {
    "imports": TrialResult(dict.fromkeys(("torch", "numpy", "h5py"), ""), "", 1.0),
    "compute": TrialResult(1e-8, "", 1.0),
    "compile": TrialResult(9.0, "", 10.0),
    "attention": TrialResult({"flash": "", "math": ""}, "", 1.0),
}


@pytest.fixture
def ends(monkeypatch):
    """Let trials end otherwise: ends(compile=TrialResult(None, "...", 1.0)); none is really run."""

    def set_ends(**how: TrialResult) -> None:
        monkeypatch.setattr(examination, "run_trial", lambda name, *_, **__: {**WELL, **how}[name])

    set_ends()
    return set_ends


@pytest.fixture
def versions_are(monkeypatch):
    """Let a library have another version, or None: versions_are(torch="1.0")."""
    real = metadata.version

    def set_versions(**others: str | None) -> None:
        def version(name: str) -> str:
            if (found := others.get(name.replace("-", "_"), "")) is None:
                raise metadata.PackageNotFoundError(name)
            return found or real(name)

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


def finding(name: str, tmp_path: Path, **how) -> Finding:
    return next(f for f in examine(tmp_path, **how) if f.name == name)


# Where all is well.


def test_everything_is_looked_at(ends, tmp_path):
    found = examine(tmp_path)
    assert works(found)
    assert [f.name for f in found if f.state == FAILS] == []
    assert list(dict.fromkeys(f.group for f in found)) == [
        *("software", "machine", "computing", "workspace", "extras", "shell")
    ]
    names = {f.name for f in found}
    assert names >= {"igpt", "Python", "torch", "numpy", "h5py", "pillow", "scikit-learn", "processor", "memory"}
    assert names >= {"training", "torch.compile", "attention", "writing", "HDF5 locks", "mapping", "parquet"}
    assert all(f.advice for f in found if f.state != OK)
    assert list(tmp_path.iterdir()) == []


def test_compile_can_be_left_out(ends, tmp_path):
    assert "torch.compile" not in {f.name for f in examine(tmp_path, compile=False)}


def test_what_takes_a_while_is_said_before(ends, tmp_path):
    said: list[str] = []
    examine(tmp_path, progress=said.append)
    assert [line.split()[0] for line in said] == ["loading", "trying", "trying", "trying"]


# Versions.


@pytest.mark.parametrize(
    ("version", "wanted", "right"),
    [
        ("2.13.0+cpu", ">=2.9,<2.14", True),
        ("2.14.0", ">=2.9,<2.14", False),
        ("2.9", ">=2.9.0", True),
        ("2.10.0", ">=2.9", True),
        ("10.1.0.dev3", ">=10.1", True),
        ("1.4", "==1.5", False),
        ("1.4", "", True),
    ],
)
def test_satisfies(version, wanted, right):
    assert versions.satisfies(version, wanted) is right


def test_requirements_are_those_of_pyproject():
    found = {r.name: r for r in versions.requirements()}
    assert found["torch"].extra is None
    assert found["torch"].version == metadata.version("torch")
    assert found["pyarrow"].extra in ("parquet", "test")
    assert versions.requirements("no-such-thing") == []


@pytest.mark.parametrize(
    ("version", "said"), [("1.13.1", "1.13.1 is installed, "), ("2.99", "2.99 is installed, "), (None, "not installed")]
)
def test_a_library_that_is_too_old_too_new_or_missing(version, said, ends, versions_are, tmp_path):
    versions_are(torch=version)
    f = finding("torch", tmp_path)
    assert (f.state, f.found.startswith(said)) == (FAILS, True)
    assert f.advice.startswith("pip install 'torch")
    assert not works(examine(tmp_path))


def test_a_library_that_does_not_load(ends, tmp_path):
    ends(imports=TrialResult({"torch": "OSError: libcudart.so.12: cannot open shared object file"}, "", 1.0))
    f = finding("torch", tmp_path)
    assert f.state == FAILS
    assert "does not load: OSError: libcudart.so.12" in f.found
    assert "--force-reinstall" in f.advice
    groups = {f.group for f in examine(tmp_path)}
    assert not groups & {"machine", "computing", "workspace"}, "nothing is tried that needs torch"


def test_libraries_whose_loading_crashes(ends, tmp_path):
    ends(imports=TrialResult(None, "ended by SIGILL", 1.0))
    f = finding("loading", tmp_path)
    assert (f.state, f.found) == (FAILS, "ended by SIGILL")


def test_an_igpt_that_is_not_installed(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(examination, "requirements", list)
    assert finding("libraries", tmp_path).state == NOTE


# The machine.


def test_memory_is_read_as_linux_tells_it(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:     2048 kB\n", encoding="ascii")
    (tmp_path / "max").write_text("max\n", encoding="ascii")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "max")
    assert (machine.memory()["available"], machine.memory()["limit"]) == (2048 * 1024, None)
    (tmp_path / "max").write_text("4096\n", encoding="ascii")
    assert machine.memory()["limit"] == 4096
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    assert machine.memory()["available"] is None


def test_little_memory(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "memory", lambda: {"total": 8 * 10**9, "available": 10**8, "limit": None})
    f = finding("memory", tmp_path)
    assert (f.state, f.found) == (NOTE, "8.0 GB total, 0.1 GB available")
    assert "--micro-batch" in f.advice


@pytest.mark.parametrize(
    ("driver", "built", "state", "said"),
    [
        (None, "no CUDA", OK, ""),
        ("550.54", "no CUDA", NOTE, "PyTorch's build for CUDA"),
        ("390.10", "CUDA 12.8", NOTE, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_gpu(driver, built, state, said, ends, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "has_apple_gpu", lambda: False)
    monkeypatch.setattr(machine, "driver", lambda: driver)
    monkeypatch.setattr(machine, "built_for", lambda: built)
    f = finding("GPU", tmp_path)
    assert f.state == state
    assert said in f.advice


def test_a_gpu_is_told(ends, monkeypatch, tmp_path):
    gpu = {"device": "cuda:0", "name": "NVIDIA H200", "memory": 150 * 10**9, "free": 149 * 10**9}
    monkeypatch.setattr(machine, "gpus", lambda: [{**gpu, "capability": "9.0", "peak_flops": 989e12}])
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    monkeypatch.setattr(machine, "built_for", lambda: "CUDA 12.8")
    f = finding("cuda:0", tmp_path)
    assert f.found == (
        "NVIDIA H200, 150.0 GB, 149.0 GB free, compute capability 9.0, peak 989 TFLOP/s; CUDA 12.8, driver 580.1"
    )


# Trials.


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        ("InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')", "C++ compiler"),
        ("not done after 180 s", "--limit"),
        ("TritonMissing: Cannot find a working triton installation", "triton that"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("RuntimeError: odd", "--no-compile"),
    ],
)
def test_why_compile_does_not_work(problem, advice, ends, tmp_path):
    ends(compile=TrialResult(None, problem, 1.0))
    f = finding("torch.compile", tmp_path)
    assert (f.state, f.found) == (NOTE, problem), "on a CPU nothing is compiled unless asked for"
    assert advice in f.advice
    assert "--no-compile" in f.advice


def test_on_a_gpu_compile_is_needed(ends):
    ends(compile=TrialResult(None, "odd", 1.0))
    found = {f.name: f for f in examination._trials("cuda:0", True, 1.0, print)}
    assert found["torch.compile"].state == FAILS


def test_a_device_that_does_not_compute(ends, tmp_path):
    ends(compute=TrialResult(None, "AcceleratorError: no kernel image is available", 1.0))
    assert finding("training", tmp_path).state == FAILS
    (f, *_) = examination._trials("cuda:0", False, 1.0, print)
    assert "--device cpu" in f.advice


def test_an_old_gpu_has_no_flash_attention(ends):
    ends(attention=TrialResult({"flash": "needs sm80", "cudnn": "no", "efficient": "", "math": ""}, "", 1.0))
    *_, f = examination._trials("cuda:0", False, 1.0, print)
    assert f.state == NOTE
    assert f.found == "efficient, math work on cuda:0; flash not (needs sm80); cudnn not (no)"
    assert "8.0" in f.advice


def test_attention_that_does_not_work_at_all(ends, tmp_path):
    ends(attention=TrialResult({"flash": "x", "math": "RuntimeError: y"}, "", 1.0))
    assert finding("attention", tmp_path).state == FAILS


def fake(monkeypatch, code: str) -> None:
    """Let the process of a trial run this code."""
    real = subprocess.Popen
    monkeypatch.setattr(trials.subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", code], **how))


def test_a_trial_that_hangs_is_ended_with_its_children(monkeypatch):
    """A child that lived on would hold the pipe open, and so the caller up."""
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys, time\nsubprocess.Popen({child})\ntime.sleep(60)"
    fake(monkeypatch, code)
    t = trials.run_trial("compile", limit=1.0)
    assert (t.value, t.problem) == (None, "not done after 1 s")
    assert t.seconds < 30


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("raise ImportError('libx.so')", "ImportError: libx.so"),
    ],
)
def test_a_trial_that_crashes(code, problem, monkeypatch):
    fake(monkeypatch, code)
    assert trials.run_trial("compute").problem == problem


def test_an_answer_is_found_among_what_libraries_print(monkeypatch):
    said = trials.ANSWER + '{"value": 3, "problem": ""}'
    fake(monkeypatch, f"print('a banner'); print({said!r}); print('bye')")
    assert trials.run_trial("compute").value == 3


def test_the_trials_that_need_no_compiler_work_here():
    """In this process, which has torch already; `test_cli_doctor` has them in their own."""
    assert set(trials.imports("cpu").values()) == {""}
    assert trials.compute("cpu") == 0
    assert trials.attention("cpu")["math"] == ""


# The workspace.


def test_a_folder_that_cannot_be_written(ends, tmp_path):
    f = finding("writing", tmp_path / "none")
    assert f.state == FAILS
    assert "No such file" in f.found


def test_a_full_disk(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "free_disk", lambda folder: 10**8)
    f = finding("writing", tmp_path)
    assert f.state == NOTE
    assert "0.1 GB free" in f.found


def test_a_file_system_without_locks(ends, monkeypatch, tmp_path):
    real = workspace.h5py.File

    def file(name, mode, locking=None):
        if locking is True:
            raise OSError("Unable to synchronously create file (unable to lock file, errno = 95)\nmore")
        return real(name, mode, locking=locking)

    monkeypatch.setattr(workspace.h5py, "File", file)
    f = finding("HDF5 locks", tmp_path)
    assert f.state == NOTE
    assert f.found.endswith("errno = 95)")
    assert "HDF5_USE_FILE_LOCKING" in f.advice
    assert works(examine(tmp_path))


def test_a_file_system_without_mapping(ends, monkeypatch, tmp_path):
    def memmap(*_, **__):
        raise OSError(19, "No such device")

    monkeypatch.setattr(workspace.np, "memmap", memmap)
    assert finding("mapping", tmp_path).state == FAILS


# Extras and shell.


def test_extras(ends, versions_are, tmp_path):
    versions_are(pyarrow="26.0", tensorboard=None, tensorflow=None, tensorflow_cpu="2.18")
    found = {f.name: f for f in examine(tmp_path) if f.group == "extras"}
    assert {n: f.state for n, f in found.items()} == {"parquet": OK, "tensorboard": NOTE, "openai": OK}
    assert "igpt-cli[tensorboard]" in found["tensorboard"].advice


@pytest.mark.parametrize(
    ("shell", "state", "advice"),
    [
        ("/bin/bash", NOTE, "`igpt completion install`"),
        ("/bin/dash", NOTE, "`igpt completion install --shell bash`, zsh or fish"),
    ],
)
def test_completion(shell, state, advice, ends, monkeypatch, tmp_path):
    monkeypatch.setenv("SHELL", shell)
    monkeypatch.setenv("HOME", str(tmp_path))
    f = finding("completion", tmp_path)
    assert (f.state, f.advice) == (state, advice)


def test_a_terminal_without_utf8(ends, monkeypatch, tmp_path):
    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(examination.sys, "stdout", Ascii())
    assert "PYTHONUTF8" in finding("terminal", tmp_path).advice
