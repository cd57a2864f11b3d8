"""igpt models"""

from __future__ import annotations

from typing import Annotated

import typer

from igpt_cli.cli.options import Json
from igpt_cli.cli.output import result, result_json, table


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One model instead of all.")] = None,
    resolution: Annotated[int, typer.Option("--resolution", "-r", min=1, help="Side of the images in pixels.")] = 32,
    json: Json = False,
) -> None:
    """List the models with their parameters, FLOPs and memory.

    \b
    Examples:
      igpt models
      igpt models igpt-s --resolution 64
      igpt models --json | jq '.[].name'
    """
    from igpt_cli.models.cost import describe_models

    rows = describe_models([name] if name else None, resolution)
    if json:
        result_json(rows)
        return
    header = ["name", "layers", "width", "heads", "parameters", "GFLOPs/image", "training GB", "about"]
    cells = [
        [
            r["name"],
            r["n_layer"],
            r["n_embd"],
            r["n_head"],
            r["parameters"],
            round(r["train_flops_per_image"] / 1e9, 1),
            round(r["training_state_bytes"] / 1e9, 2),
            r["about"],
        ]
        for r in rows
    ]
    result(table(cells, header))
