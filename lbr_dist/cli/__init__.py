"""The `lbr` command: parse, call, print. Nothing else happens here.

One file holds the commands of one concern. Every command imports its part of the package when it is called, so that
`lbr --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lbr_dist import __version__
from lbr_dist.cli import checkpoint, data, models, ray, slurm, training
from lbr_dist.errors import UserError, told

app = typer.Typer(
    help="Learn Before Represent: train, evaluate and export domain-specific embedding models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(data.prepare)
app.command()(data.mine)
app.command()(data.surprisal)
app.command()(training.train)
app.command()(training.plan)
app.command("eval")(models.evaluate)
app.command()(models.export)
app.command()(models.encode)
app.command()(models.search)
app.command()(models.report)
app.command()(training.audit)
app.command()(training.recipes)
app.command()(training.settings)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(slurm.app, name="slurm")
app.add_typer(ray.app, name="ray")


def main() -> None:
    """Entry point: a mistake of the user is one line on stderr and exit code 2; so is storage that fails, with 1."""
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a command
    try:
        try:
            app()
        except BaseException as left:
            _flush("\n" if isinstance(left, OSError) and left.filename is None else "")  # it may be of a print
            raise
    except (UserError, PermissionError) as error:
        sys.exit(told(error))
    except OSError as error:
        from lbr_dist.disk import BROKEN

        if error.errno not in BROKEN:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}: see to it that the storage works, and run again", file=sys.stderr)
        sys.exit(1)


def _flush(more: str) -> None:
    """Write what was printed, and `more`; Python itself would do so too late to say that it could not.

    Raises:
        UserError: nothing takes it.
    """
    try:
        print(end=more, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail once more at the end
        if error.errno != errno.EPIPE:
            raise UserError(f"standard output: {error.strerror}: send it elsewhere") from None


def quiet() -> None:
    """Keep other libraries from talking; to be called before they are imported."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, Path(os.devnull).open("w", errors="backslashreplace"))  # noqa: SIM115
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # their bars; ours look for the terminal themselves


def _version(value: bool) -> None:
    if value:
        print(f"lbr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
