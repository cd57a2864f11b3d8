"""Places inside a transformer block that a probe can read (arXiv 2603.05280).

A layer is a number, the normed input of a block, or a block and a site: "20.attention" is what attention gives in block
20, before it is added to what it came from; "20.mlp" the activations of its MLP, after the nonlinearity.

>>> parse_places("0-1,20.mlp,all.attention", n_layers=3)
[0, 1, '20.mlp', '0.attention', '1.attention', '2.attention']
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from igpt_cli.errors import InputError
from igpt_cli.model_dir import ModelDir
from igpt_cli.models.contract import POOLS

SITES = ("attention", "mlp")
#: A number of 0..L, or "<block>.<site>" with a block of 0..L - 1.
Layer = int | str


def place(layer: Layer) -> tuple[int, str]:
    """The block and the site of a layer, "" for its input: layers are in the order of these.

    >>> place(20), place("20.mlp")
    ((20, ''), (20, 'mlp'))
    """
    block, _, site = str(layer).partition(".")
    return int(block), site


def in_order(layers: Iterable[Layer]) -> list[Layer]:
    """Each layer once, from the first to the deepest."""
    return sorted(set(layers), key=place)


def parse_places(text: str, n_layers: int) -> list[Layer]:
    """The layers that a text names: "all", "20", "0,12,24" or "10-14", each also with a site, ".mlp"; others raise
    InputError.
    """
    out: list[Layer] = []
    for part in text.split(","):
        where, dot, site = part.strip().partition(".")
        if dot and site not in SITES:
            raise InputError(f"layers {text!r} cannot be read; behind a dot comes {' or '.join(SITES)}, as in 20.mlp")
        numbers = parse_layers(where)
        if numbers is None:
            numbers = list(range(n_layers if site else n_layers + 1))
        out += [f"{n}.{site}" for n in numbers] if site else numbers
    return out


def parse_layers(text: str) -> list[int] | None:
    """ "all" -> None, "20" -> [20], "0,12,24" and "10-14" -> the numbers named; others raise InputError."""
    if text.strip() == "all":
        return None
    out: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if not (1 <= len(ends) <= 2 and all(e.strip().isdecimal() for e in ends)):
            raise InputError(f"layers {text!r} cannot be read; write all, 20, 0,12,24 or 10-14")
        out += range(int(ends[0]), int(ends[-1]) + 1)
    if not out:
        raise InputError(f"layers {text!r} names none; write the lower end first, as in 10-14")
    return out


def check_layers(run: ModelDir, layers: Sequence[Layer] | None) -> list[Layer]:
    """The layers in rising order; None means all of 0..n_layers. Raises InputError for layers that the model does
    not have.
    """
    n_layers: Any = run.model.n_layers
    wanted = in_order(range(n_layers + 1) if layers is None else layers)
    outside = [layer for layer in wanted if not 0 <= place(layer)[0] <= n_layers - bool(place(layer)[1])]
    if outside or not wanted:
        asked = ", ".join(map(str, outside)) or "none"
        raise InputError(
            f"layer {asked} asked for; {run.name} has the layers 0 to {n_layers} ({n_layers} = final norm)"
        )
    if sites := [layer for layer in wanted if place(layer)[1]]:
        unknown = [layer for layer in sites if place(layer)[1] not in SITES]
        if unknown or not _has_sites(run.model):
            why = f"the sites of a block are {', '.join(SITES)}" if unknown else "its blocks are not such as have sites"
            raise InputError(f"layer {(unknown or sites)[0]} asked for, and {run.name} has none: {why}")
    return wanted


def whole_layers(layers: Iterable[Layer], why: str) -> list[int]:
    """The layers. Raises InputError with `why` if one lies within a block."""
    whole = []
    for layer in layers:
        if not isinstance(layer, int):
            raise InputError(f"layer {layer} lies within a block; {why} whole layers only")
        whole.append(layer)
    return whole


@contextmanager
def recorded(model: Any, layers: Sequence[Layer], pool: str) -> Iterator[dict[Layer, torch.Tensor]]:
    """A dict in which a forward pass of the model leaves {layer: (B, W) float32} of those layers that are sites.

    Places are pooled as the model's own `features` pools them: class tokens are not among those of "mean" and "max".
    """
    found: dict[Layer, torch.Tensor] = {}
    before = getattr(getattr(model, "config", None), "n_prefix", 0)  # class and distillation token

    def keep(layer: Layer, values: torch.Tensor) -> None:
        x = values.float()  # (B, T, W)
        if pool == "last":
            x = x[:, 0 if before else -1]
        elif pool != "none":
            x = POOLS[pool](x[:, before:])
        found[layer] = x

    with ExitStack() as hooks:
        for layer in layers:
            number, site = place(layer)
            if site == "attention":
                module = model.blocks[number].attn
                hook = module.register_forward_hook(lambda _, args, out, layer=layer: keep(layer, out))
            elif site == "mlp":
                *_, last = model.blocks[number].mlp.children()  # the map back to D: what enters it
                hook = last.register_forward_pre_hook(lambda _, args, layer=layer: keep(layer, args[0]))
            else:
                continue
            hooks.callback(hook.remove)
        yield found


def _has_sites(model: Any) -> bool:
    """Whether blocks are attention and then an MLP of linear maps, each over all places (B, T, D) at once."""
    blocks = getattr(model, "blocks", None) or ()
    grids = getattr(model, "pyramid", None)  # maps (B, H, W, D), cut into windows
    return bool(len(blocks)) and not grids and all(hasattr(b, "attn") and hasattr(b, "mlp") for b in blocks)
