"""Time training steps: igpt's own, and other implementations of the model.

What is timed is `training.loop.TrainStep` and all that belongs to it: the batch's way to the device, forward and
backward passes, the gradient's norm, the optimizer. The tokens are random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from igpt_cli.bench.benchmarked import ATTENTION, BenchmarkedModel, TrainingSpeed
from igpt_cli.bench.timing import in_turn
from igpt_cli.bench.transformers_peer import PEERS, require_transformers
from igpt_cli.device import choose_device, choose_precision
from igpt_cli.errors import InputError
from igpt_cli.models.registry import find_preset, model_config
from igpt_cli.planning.cost import parameters
from igpt_cli.training.distributed import Ranks
from igpt_cli.training.memory import plan_memory
from igpt_cli.training.optim import OPTIMIZERS
from igpt_cli.training.settings import Execution

#: Images in a step on a CPU, unless told otherwise.
CPU_BATCH = 4
#: A timing is of as many steps as take about this long, in seconds, unless their number is given.
TIMING_SECONDS = 2.0


def bench_train(
    model: str = "igpt-tiny",
    *,
    resolution: int = 32,
    n_vocab: int = 512,
    sizes: dict[str, int] | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    compile: bool | None = None,
    recompute: bool | None = None,
    attention: str = "auto",
    optimizer: str = "adamw",
    update: bool = True,
    steps: int | None = None,
    repeats: int = 5,
    warmup: int = 2,
    against: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[TrainingSpeed]:
    """Time training steps of a model: one row for igpt, then one for each of `against`.

    On a CPU, whose speed may drift, the implementations take turns. On a GPU each has the memory to itself; where a
    micro-batch does not fit, it is halved until it does.

    Args:
        sizes: n_layer, n_head, n_embd in place of the preset's.
        batch_size: images in a step; the preset's, on a CPU 4.
        micro_batch: images at a time; the most that fit by the model's cost, as in training.
        compile: compile igpt's blocks; None does so on a GPU, as training does.
        recompute: activations again in the backward pass; None where they do not fit.
        attention: a key of `ATTENTION`, for igpt.
        optimizer: "adamw" or "muon"; with `update` false, there is none.
        steps, repeats, warmup: steps in a timing (None: two seconds' worth), timings, untimed steps after the first.
        against: names in `PEERS`.
        progress: called with (timings done, timings in all).
        on_event: called with a sentence when something differs from the options.

    Raises:
        InputError: an unknown name, numbers out of range, a kernel that is not there, or transformers not installed.
        IgptError: torch.compile does not work here.
    """
    chosen = choose_device(device)
    config = model_config(model, resolution=resolution, n_vocab=n_vocab, **(sizes or {}))
    batch = batch_size
    if batch is None:
        batch = CPU_BATCH if chosen.type == "cpu" else find_preset(model).recipe["batch_size"]
    _check(batch, micro_batch, steps, repeats, warmup, attention, optimizer, against)
    precision = choose_precision(precision, chosen)
    planned = plan_memory(
        config,
        batch,
        optimizer,
        Execution(micro_batch=micro_batch, recompute=recompute),
        precision,
        chosen,
        Ranks(),
    )
    row = TrainingSpeed(
        model=model,
        implementation="igpt",
        **{k: config[k] for k in ("n_layer", "n_embd", "n_head", "resolution")},
        parameters=parameters(config),
        batch_size=batch,
        micro_batch=planned.micro_batch,
        precision=precision,
        compile=chosen.type == "cuda" if compile is None else compile,
        recompute=planned.recompute,
        attention=attention,
        optimizer=optimizer if update else None,
        repeats=repeats,
    )
    say = on_event or (lambda text: None)
    models = [BenchmarkedModel(row, config, chosen, say)]
    for name in against:
        kind = PEERS[name]
        plain = replace(
            row,
            implementation=name,
            precision=kind.precision or precision,
            compile=kind.compiled,
            recompute=False,
        )
        models.append(BenchmarkedModel(plain, config, chosen, say))
    with torch.random.fork_rng(devices=[]):
        return _measure(models, steps, repeats, warmup, progress)


def _check(batch, micro_batch, steps, repeats, warmup, attention, optimizer, against) -> None:
    numbers = {"batch_size": batch, "micro_batch": micro_batch, "steps": steps, "repeats": repeats}
    problems = [f"{k} is {v}, expected at least 1" for k, v in numbers.items() if v is not None and v < 1]
    if warmup < 0:
        problems.append(f"warmup is {warmup}, expected 0 or more")
    named = [("attention", attention, ATTENTION), ("optimizer", optimizer, OPTIMIZERS)]
    for what, value, known in named + [("against", name, PEERS) for name in against]:
        if value not in known:
            problems.append(f"{what} is {value!r}, expected one of {', '.join(known)}")
    if problems:
        raise InputError("; ".join(problems))
    if against:
        require_transformers()
        if optimizer != "adamw":
            raise InputError(f"transformers is measured with AdamW; leave out the optimizer {optimizer!r}, or against")


def _measure(models: list[BenchmarkedModel], steps: int | None, repeats: int, warmup: int, progress) -> list:
    def prepare(model: BenchmarkedModel) -> None:
        model.prepare(warmup, alone=model is models[0] and model.device.type == "cpu")
        if model.row.failed is None:
            model.steps = steps or max(1, min(50, round(TIMING_SECONDS / model.step_seconds)))

    torch.compiler.reset()
    return in_turn(models, prepare, repeats, progress, prepared=False)
