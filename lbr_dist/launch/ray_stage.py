"""The command line of `ray_jobs/stage1.py` and `stage2.py`: arguments in, exit code out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lbr_dist.config import Recipe, Section
from lbr_dist.config.base import is_place
from lbr_dist.data.remote import is_url
from lbr_dist.errors import UserError, told
from lbr_dist.launch.ray_cluster import Bundle, Node
from lbr_dist.launch.ray_train import MAX_FAILURES, Request, run_stage
from lbr_dist.launch.slurm_words import FINISHED, leave
from lbr_dist.recipes import load_recipe, parse_recipe
from lbr_dist.training.chain import load_next

UNPACKED = "working_dir_files"
"""Ray unpacks a job's working directory into a folder of this name on each node, and removes it afterwards."""
MADE = ("output", "cache_dir")
"""Paths of a recipe that are made where they do not exist."""


def main(stage: str, arguments: Sequence[str] | None = None) -> int:
    """Run one stage (`generative` or `contrastive`); a mistake of the user is one line on stderr and exit code 2."""
    options = parser(stage).parse_intermixed_args(arguments)
    try:
        here = Path.cwd()
        recipe = absolute(load_recipe(options.recipe, options.overrides), here)
        check_stage(recipe, stage, options.recipe)
        then = absolute(load_next(recipe, options.recipe, options.then), here) if options.then else None
        changes = tuple(options.allow_change)
        code = run_stage(recipe, requested(options), resume=options.resume, allow_change=changes, then=then)
        if code == 0:
            leave(Path(recipe.output), FINISHED)
        return code
    except (UserError, PermissionError) as error:
        return told(error)


def parser(stage: str) -> argparse.ArgumentParser:
    """The options of a stage's driver."""
    made = argparse.ArgumentParser(
        description=f"Train a {stage} recipe on Ray: on the cluster of RAY_ADDRESS, else on this machine. Exit codes: "
        "0 done, 2 a mistake that a restart cannot mend, 75 stopped on request (run again), 1 anything else."
    )
    made.add_argument("recipe", type=os.path.expanduser, help="YAML file, or the name of a shipped recipe")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="as optim.lr=1e-4")
    add_cluster_options(made)
    made.add_argument(
        "--resume", type=os.path.expanduser, default="auto", help="auto, never, or the path of a checkpoint"
    )
    made.add_argument(
        "--allow-change", action="append", default=[], help="recipe field that may differ from the run that is resumed"
    )
    made.add_argument(
        "--then",
        type=os.path.expanduser,
        help="recipe of the stage 2 that is to follow: checked before this run begins",
    )
    return made


def add_cluster_options(made: argparse.ArgumentParser) -> None:
    """The options that say what is asked of the cluster."""
    made.add_argument(
        "--num-workers",
        type=_range,
        metavar="N|MIN:MAX",
        help="ranks; MIN:MAX follows the nodes that there are. Default: one per GPU of the cluster, or one per node",
    )
    made.add_argument("--gpus-per-worker", type=int, choices=(0, 1), help="default: 1 if the cluster has GPUs")
    made.add_argument("--cpus-per-worker", type=int, default=1, help="default: 1")
    made.add_argument(
        "--max-failures", type=int, default=MAX_FAILURES, help=f"in a row, without a checkpoint; {MAX_FAILURES}"
    )


def requested(options: argparse.Namespace) -> Callable[[list[Node]], Request]:
    """What the options ask of a cluster, once its nodes are known."""
    if options.cpus_per_worker < 1:
        raise UserError(f"--cpus-per-worker {options.cpus_per_worker}: expected at least 1")
    if options.max_failures < 0:
        raise UserError(f"--max-failures {options.max_failures}: expected at least 0")

    def of(nodes: list[Node]) -> Request:
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = int(any(node.gpus >= 1 for node in nodes))
        bundle = Bundle(options.cpus_per_worker, gpus)
        low, high = options.num_workers or (None, None)
        if low is None or high is None:
            low = high = sum(node.room(bundle) if gpus else min(1, node.room(bundle)) for node in nodes) or 1
        return Request(low, high, bundle, options.max_failures)

    return of


def check_stage(recipe: Recipe, stage: str, name: str) -> None:
    """Check that a driver was given a recipe of its stage; that of stage 2 runs joint recipes too."""
    if stage != ("contrastive" if recipe.stage == "joint" else recipe.stage):
        other = "stage1.py" if recipe.stage == "generative" else "stage2.py"
        raise UserError(f"recipe {name}: its stage is {recipe.stage}, this driver's is {stage}: use {other}")


def absolute(recipe: Recipe, here: Path) -> Recipe:
    """A recipe that means the same from any folder: what it writes, and its relative paths that exist, made absolute.

    Raises:
        UserError: the output is relative to a working directory that Ray has unpacked and will remove.
    """
    check_kept(recipe.output, here, "output ")

    def found(path: str) -> str:
        return str(here / path) if not is_url(path) and (here / path).exists() else path

    def moved(value: Any, name: str) -> Any:
        if name in MADE:
            return str(here / value)
        return value if name == "deepspeed" and not value.endswith(".json") else found(value)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        if not isinstance(value, Section):
            return value
        fields = type(value).model_fields
        return {
            name: moved(inner, name) if is_place(fields[name]) and inner is not None else placed(inner)
            for name, inner in value
        }

    return parse_recipe(placed(recipe), f"of {recipe.output}")


def check_kept(path: str, here: Path, what: str = "") -> None:
    """Check that what a job writes is not lost with it.

    Args:
        path: of the output.
        here: the job's working directory.
        what: names the output in the message.

    Raises:
        UserError: it is relative to a working directory that Ray has unpacked and will remove.
    """
    if UNPACKED in here.parts and not Path(path).is_absolute():
        raise UserError(
            f"{what}{path}: is relative to the job's working directory, a copy that each node removes: name an "
            "absolute path on storage that all nodes share"
        )


def _range(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        pair = int(low), int(high if colon else low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected N or MIN:MAX") from None
    if not 1 <= pair[0] <= pair[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 <= MIN <= MAX")
    return pair
