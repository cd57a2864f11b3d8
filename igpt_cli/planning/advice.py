"""A plan in a sentence, and the command that starts the run."""

from __future__ import annotations

from typing import Any

from igpt_cli.planning.plan import Column, Layout, Plan

#: GPUs in one machine, as most have them; more are several machines.
NODE = 8


def conclusion(found: Plan) -> str:
    """A plain sentence: whether it fits, how, and if not, what does."""
    chosen, begun = found.chosen.layout, started(found).layout
    alone = found.columns[0].layout  # the whole model on each GPU
    what, one = f"{found.model} at {found.resolution}x{found.resolution}", f"one {found.gpu}"
    sharded = f"{begun.gpus} with --shard full: {_steps(begun)}."
    again = "only if its activations are computed again, a third more arithmetic"
    if not chosen.fits:
        if chosen.shard == "full":
            one = f"{chosen.gpus} {found.gpu} even with --shard full"
        else:
            one += " without sharding"
        if found.fewest_gpus is None:
            return f"{what} does not fit {one}, nor any number of them with {found.batch_size} images in a step."
        return f"{what} does not fit {one}; {sharded}"
    if chosen.shard == "none" and not chosen.recompute:
        where = one if chosen.gpus == 1 else f"each of {chosen.gpus} {found.gpu} without sharding"
        return f"{what} fits {where}: {_steps(chosen)}."
    if begun.shard == "none":
        where = one if chosen.gpus == 1 else f"each of {chosen.gpus} {found.gpu} without sharding"
        return f"{what} fits {where} {again}: {_steps(chosen)}."
    if not alone.fits:
        return f"{what} does not fit {one} without sharding; {sharded}"
    return f"{what} fits {one} without sharding{f' {again}' if alone.recompute else ''}; {sharded}"


def _steps(layout: Layout) -> str:
    """How a step is computed."""
    parts = f"accumulated {layout.accumulate} times" if layout.accumulate > 1 else "no accumulation"
    return f"micro-batch {layout.micro_batch}, {parts}" + (", activations recomputed" if layout.recompute else "")


def started(found: Plan) -> Column:
    """What the command at the end starts: what was requested, or, if that is too small or slow, more GPUs."""
    better = found.columns[-1]
    more_gpus = better.layout.gpus != found.gpus and better.layout.fits
    return better if more_gpus else found.chosen


def start_command(found: Plan, given: dict[str, Any]) -> list[str] | None:
    """The command that starts the run, in words; None where nothing fits."""
    layout = started(found).layout
    if not layout.fits:
        return None
    words = ["igpt", "pretrain"]
    if layout.gpus > 1:
        nodes, each = (layout.gpus // NODE, NODE) if layout.gpus % NODE == 0 else (1, layout.gpus)
        many = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"] if nodes > 1 else []
        words = ["torchrun", *many, "--nproc-per-node", str(each), "-m", "igpt_cli", "pretrain"]
    words += [f"data/tokens-{found.resolution}.h5", "-m", found.model]
    if found.objective != "ar":
        words += ["--objective", found.objective]
    for option, value in given.items():
        words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words + (["--shard", "full"] if layout.shard == "full" else [])
