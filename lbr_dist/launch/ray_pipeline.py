"""The whole path as one Ray job: stage 1, stage 2 from its weights, evaluation, export.

Each part is finished before the next begins, and each can be repeated: a stage that is complete ends at once, so a
job submitted again after a stop or a failure goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lbr_dist.config import Recipe
from lbr_dist.errors import EXIT_RUN_AGAIN, UserError, told
from lbr_dist.launch.delivery import check_delivery
from lbr_dist.launch.ray_cluster import cluster, living_nodes
from lbr_dist.launch.ray_stage import absolute, add_cluster_options, check_kept, requested
from lbr_dist.launch.ray_train import Stop, run_stage
from lbr_dist.recipes import load_recipe
from lbr_dist.training.chain import load_next
from lbr_dist.training.signals import stop_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the path; a mistake of the user is one line on stderr and exit code 2."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("stage1", type=os.path.expanduser, help="recipe of stage 1")
    made.add_argument(
        "stage2", type=os.path.expanduser, help="recipe of stage 2; its model.start_from is stage 1's run"
    )
    made.add_argument(
        "out", type=os.path.expanduser, nargs="?", help="exported model; default: model/ in stage 2's run"
    )
    made.add_argument("--tokens", type=int, help="bottleneck tokens of every text of the export, as for `lbr export`")
    made.add_argument("--generate", type=int, default=100, help="questions answered in the evaluation; default: 100")
    add_cluster_options(made)
    options = made.parse_args(arguments)
    try:
        if options.generate < 0:
            raise UserError(f"--generate {options.generate}: expected at least 0")
        one, two, out = parts(options.stage1, options.stage2, Path.cwd(), options.out, options.tokens)
        with cluster() as where:
            stop = Stop()
            stop.listen()  # once for both stages: a signal that comes as the first one ends would be lost
            for recipe, then in ((one, two), (two, None)):
                code = run_stage(recipe, requested(options), resume="auto", allow_change=(), then=then, stop=stop)
                if code or stop.asked:
                    return code or EXIT_RUN_AGAIN
            print(f"evaluating and exporting {two.output} on {where}", file=sys.stderr, flush=True)
            print(finish(two, out, options))
        return 0
    except (UserError, PermissionError) as error:
        return told(error)


def parts(
    first: str, second: str, here: Path, out: str | None = None, tokens: int | None = None
) -> tuple[Recipe, Recipe, Path]:
    """Both recipes, the second starting from the first's run, and the folder of the export.

    Raises:
        UserError: either is wrong, or what follows them could not be done (see `check_delivery`), which is found before
            anything starts.
    """
    one = absolute(load_recipe(first), here)
    two = absolute(load_next(one, first, second), here)
    if out is not None:
        check_kept(out, here, "OUT ")
    return one, two, check_delivery(two, out, tokens, here)


def finish(recipe: Recipe, out: Path, options: argparse.Namespace) -> str:
    """Evaluate the run on the first set of its recipe and export it, on a node that has what a worker has."""
    import ray

    for number in stop_signals():
        signal.signal(number, lambda *_: os._exit(EXIT_RUN_AGAIN))  # nothing here that cannot be done again
    bundle = requested(options)(living_nodes()).bundle
    task = ray.remote(num_cpus=bundle.cpus, num_gpus=bundle.gpus, max_retries=1)(deliver)
    data, (generate, tokens) = recipe.data.sets[0].path, (options.generate, options.tokens)
    try:
        written: str = ray.get(task.remote(recipe.output, data, str(out), generate, tokens))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    return written


def deliver(run: str, data: str, out: str, generate: int, tokens: int | None) -> str:
    """What the task does: `lbr eval` and `lbr export`; returns what to print."""
    from lbr_dist.evaluation.evaluate import default_out, evaluate
    from lbr_dist.export.export import export

    folder = default_out([run])
    evaluate([run], data, folder, generate=generate, progress=False)
    if Path(out).is_dir() and any(Path(out).iterdir()):  # an empty folder is as good as none, as for `lbr export`
        kept = f"{out} is there already: nothing is exported; move it away to export anew"
        return f"written: {folder}/eval.json; {kept}"
    return f"written: {folder}/eval.json, {export(run, out, tokens=tokens)}"
