"""`lbr ray start`: a node of a Ray cluster."""

from __future__ import annotations

import typer

app = typer.Typer(help="Nodes of a Ray cluster.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start(context: typer.Context) -> None:
    """Start Ray on this node with the options of `ray start`, a token, and every port on --node-ip-address alone."""
    from lbr_dist.launch.ray_start import start as run

    raise typer.Exit(run(context.args))
