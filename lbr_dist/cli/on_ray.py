"""The command line of `ray_jobs/prepare.py`, `encode.py` and `mine.py`: the `lbr` command's own, on a Ray cluster."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lbr_dist.errors import EXIT_USER_ERROR, UserError, told

USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""Of the click that typer uses: newer ones have a copy of their own, whose errors are not those of the package."""


def main(command: Callable[..., None], arguments: Sequence[str] | None = None) -> int:
    """Run a command of `lbr_dist.cli` with its blocks on Ray; a mistake of the user is exit code 2.

    Args:
        command: one that takes `out`.
        arguments: the command's own, and those of `cluster_options`.
    """
    from lbr_dist.cli import quiet

    quiet()
    options, rest = cluster_options().parse_known_args(arguments)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=cluster_options().format_usage())(_on_cluster(command, options))
    try:
        return app(rest, standalone_mode=False) or 0  # what typer ends with: 130 after Ctrl-C
    except (UserError, PermissionError) as error:
        return told(error)
    except USAGE_ERROR as error:
        error.show()
        return EXIT_USER_ERROR


def cluster_options() -> argparse.ArgumentParser:
    """The options that say what is asked of the cluster."""
    made = argparse.ArgumentParser(add_help=False, usage="on Ray also: [--num-workers N] [--cpus-per-worker N] "
                                                         "[--gpus-per-worker N]", allow_abbrev=False)  # fmt: skip
    made.add_argument("--num-workers", type=_positive)
    made.add_argument("--cpus-per-worker", type=_positive, default=1)
    made.add_argument("--gpus-per-worker", type=_whole)
    return made


def _on_cluster(command: Callable[..., None], options: argparse.Namespace) -> Callable[..., None]:
    """The command on a cluster, which is there once the command's own options are known to be right.

    Output that Ray would remove with the job's working directory is refused.
    """
    from lbr_dist.data.execute import executing
    from lbr_dist.launch.ray_cluster import cluster
    from lbr_dist.launch.ray_stage import check_kept

    @functools.wraps(command)
    def run(**values: Any) -> None:
        check_kept(str(values["out"]), Path.cwd())
        with cluster(dashboard=False):
            from lbr_dist.launch.ray_data import RayData

            executor = RayData(
                workers=options.num_workers,
                cpus_per_worker=options.cpus_per_worker,
                gpus_per_worker=options.gpus_per_worker,
            )
            with executing(executor):
                command(**values)

    return run


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)
