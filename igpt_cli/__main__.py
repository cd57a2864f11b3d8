"""python -m igpt_cli, which is also what `torchrun -m igpt_cli` starts."""

from __future__ import annotations


def main() -> None:
    """The `igpt` program."""
    from igpt_cli.cli.app import app

    app(prog_name="igpt")


if __name__ == "__main__":
    main()
