"""Trials that may hang or crash, in a process of their own: `python -m igpt_cli.doctor.trials NAME DEVICE`.

Each trial returns what JSON can hold, or raises; `run_trial` starts the process and says how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

#: What stands before the answer, so that it is found whatever libraries print.
ANSWER = "igpt-doctor: "


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: with its `value`, or with a `problem` in one line."""

    value: Any
    problem: str
    seconds: float


def run_trial(name: str, device: str = "cpu", limit: float = 180.0) -> TrialResult:
    """Run a trial of `TRIALS` in a process of its own, which is killed with all its children after `limit` seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:  # an old cache would hide that nothing can be compiled any more
        process = subprocess.Popen(
            [sys.executable, "-m", "igpt_cli.doctor.trials", name, device],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            out, said = "", f"not done after {limit:.0f} s"
        finally:
            _end(process)
    seconds = time.monotonic() - started
    answer = next((line.removeprefix(ANSWER) for line in out.splitlines() if line.startswith(ANSWER)), None)
    if answer is not None:
        document = json.loads(answer)
        return TrialResult(document["value"], document["problem"], seconds)
    if process.returncode < 0 and not said.startswith("not done"):
        said = f"ended by {signal.Signals(-process.returncode).name}"
    return TrialResult(None, _last_line(said) or f"ended with exit code {process.returncode}", seconds)


def _end(process: subprocess.Popen) -> None:
    """End the process and what it started, which is a session of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def imports(device: str) -> dict[str, str]:
    """{library: what is wrong with it, or ""}: a version can be there and still not load."""
    found: dict[str, str] = {}
    with _noted(found, "torch"):
        import torch  # noqa: F401
    with _noted(found, "numpy"):
        import numpy  # noqa: F401
    with _noted(found, "scikit-learn"):
        import sklearn.linear_model  # noqa: F401
    with _noted(found, "pillow"):
        import PIL.Image  # noqa: F401
    with _noted(found, "h5py"):
        import h5py  # noqa: F401
    with _noted(found, "safetensors"):
        import safetensors  # noqa: F401
    with _noted(found, "matplotlib"):
        import matplotlib.backends.backend_agg  # noqa: F401
    return found


@contextmanager
def _noted(found: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
        found[name] = ""
    except Exception as e:
        found[name] = _one_line(e)


def compute(device: str) -> float:
    """A training step of a toy iGPT; the greatest difference between the gradients here and on the CPU."""
    import torch

    from igpt_cli.models.igpt import IGPT, IGPTConfig

    torch.manual_seed(0)
    model = IGPT(IGPTConfig(n_layer=1, n_head=2, n_embd=32, resolution=4, n_vocab=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(8, (2, 16))
    gradients = []
    for where in ("cpu", device):
        model.zero_grad()
        model.to(where)
        logits = model(tokens.to(where))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.to(where).flatten()).backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    difference = float((gradients[0] - gradients[1]).abs().max())
    if not difference < 1e-2:
        raise ArithmeticError(f"gradients differ from those of the CPU by {difference:.2g}")
    return difference


def compiled(device: str) -> float:
    """Seconds that torch.compile took for a small function, which then gave the right numbers."""
    import torch

    def wave(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 2 + x).relu().sum(-1)

    x = torch.linspace(-3, 3, 256, device=device).reshape(4, 64)
    started = time.monotonic()
    y = torch.compile(wave, dynamic=False)(x)
    seconds = time.monotonic() - started
    if not torch.allclose(y, wave(x), atol=1e-4):
        raise ArithmeticError("the compiled function gave other numbers")
    return seconds


def attention(device: str) -> dict[str, str]:
    """{kernel of scaled_dot_product_attention: why it does not work for our shapes, or ""}, in bfloat16 and causal."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if not device.startswith("cuda"):  # the other two are for GPUs of NVIDIA and AMD
        kernels = {k: kernels[k] for k in ("flash", "math")}
    q = torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    found: dict[str, str] = {}
    for name, kernel in kernels.items():
        with _noted(found, name), warnings.catch_warnings(record=True) as said, sdpa_kernel([kernel]):
            warnings.simplefilter("always")
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        if found[name] and (reasons := [str(w.message).split(" (Triggered")[0] for w in said]):
            found[name] = reasons[-1]
    return found


TRIALS: dict[str, Callable[[str], Any]] = {
    "imports": imports,
    "compute": compute,
    "compile": compiled,
    "attention": attention,
}


def _one_line(e: BaseException) -> str:
    """An error in one line; of a long one the line that names the cause."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0]}"[:300] if lines else type(e).__name__


def main(name: str, device: str) -> None:
    """Run one trial and print its answer."""
    value, problem = None, ""
    try:
        value = TRIALS[name](device)
    except Exception as e:
        problem = _one_line(e)
    print(f"\n{ANSWER}{json.dumps({'value': value, 'problem': problem})}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
