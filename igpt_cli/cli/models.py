"""igpt models"""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from igpt_cli.cli.candidates import all_models
from igpt_cli.cli.options import Json
from igpt_cli.cli.output import result, result_json, table


def models(
    name: Annotated[
        str | None, Argument(metavar="NAME", autocompletion=all_models, help="One model instead of all.")
    ] = None,
    resolution: Annotated[
        int | None,
        Option("--resolution", "-r", min=1, help="Image side in pixels.  [default: 32; RGB models: their own]"),
    ] = None,
    flops: Annotated[bool, Option("--flops", help="Count FLOPs in the list, too, which takes some seconds.")] = False,
    json: Json = False,
) -> None:
    """List the models with their parameters and memory; of one model also FLOPs and sizes.

    \b
    Examples:
      igpt models
      igpt models igpt-s --resolution 64
      igpt models vit-b16
      igpt models --flops
      igpt models --json | jq -r '.[] | select(.input == "rgb") | .name'

    Those called igpt learn pixels (igpt pretrain), the others classes (igpt train). `igpt models NAME` says more.

    GFLOPs are of one image going forward; a multiply-add is two FLOPs, and papers on models of RGB images count it as
    one. Training takes three times as many. "training GB" are weights, gradients and Adam's moments; activations come
    on top.
    """
    from igpt_cli.planning.cost import describe_models

    flops = flops or name is not None
    rows = describe_models([name] if name else None, resolution, flops=flops)
    if json:
        result_json(rows)
        return
    if name:
        result(_one(rows[0]))
        return
    header = ["name", "pixels", "layers", "parameters", "training GB", *(["GFLOPs/image"] if flops else [])]
    cells = [
        [
            r["name"],
            r["resolution"],
            r["n_layers"],
            r["parameters"],
            round(r["training_state_bytes"] / 1e9, 2),
            *([round(r["forward_flops_per_image"] / 1e9, 1)] if flops else []),
        ]
        for r in rows
    ]
    result(table(cells, header))


def _one(row: dict[str, Any]) -> str:
    """A model, a line for each thing there is to say of it."""
    costs = [
        ("about", row["about"]),
        ("input", "tokens of pixels" if row["input"] == "tokens" else "RGB images"),
        ("layers", row["n_layers"]),
        ("parameters", f"{row['parameters']:,}"),
        ("GFLOPs/image", f"{row['forward_flops_per_image'] / 1e9:,.2f} forward"),
        ("", f"{row['forward_multiply_adds_per_image'] / 1e9:,.2f} G multiply-adds, as papers on RGB models count"),
        ("", f"{row['train_flops_per_image'] / 1e9:,.2f} in training"),
        ("training GB", f"{row['training_state_bytes'] / 1e9:,.2f} and activations"),
    ]
    shown = {"name", "backend", "input", "n_layers", "parameters", "recipe", "learning_rates", "about"}
    sizes = [
        (k, ", ".join(map(str, v)) if isinstance(v, list) else str(v))
        for k, v in row.items()
        if k not in shown and not k.endswith(("_image", "_token", "_bytes"))
    ]
    recipe = [("recipe", ", ".join(f"{k} {v}" for k, v in row["recipe"].items()))] if row["recipe"] else []
    rates = [
        ("learning rate", f"{r['learning_rate']:g} for {r['objective']} at {r['resolution']}x{r['resolution']}")
        for r in row["learning_rates"]
    ]
    return table([*costs, *sizes, *recipe, *rates], ["", row["name"]])
