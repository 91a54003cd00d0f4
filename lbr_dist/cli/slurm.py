"""`lbr slurm check`: the allocation, before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_dist.cli.options import place
from lbr_dist.errors import EXIT_USER_ERROR

app = typer.Typer(help="Jobs under Slurm.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def check(
    shared: Annotated[
        list[Path] | None,
        typer.Option(callback=place, help="Folder that all nodes must see; default: this one. Repeatable."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Without GPUs and bandwidth: a second instead of half a minute.")] = False,
) -> None:
    """Check the nodes of an allocation from inside: srun --ntasks-per-node=1 lbr slurm check. Names the bad node."""
    from lbr_dist.launch.slurm_check import check as run
    from lbr_dist.launch.slurm_words import leave

    folders = shared or [Path.cwd()]
    if not run(folders, quick=quick):
        for folder in folders:
            leave(folder)
        raise typer.Exit(EXIT_USER_ERROR)
