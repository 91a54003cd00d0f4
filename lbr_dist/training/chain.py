"""Two runs, the second of which begins with the first's weights: what is known of it before the first one begins.

It would find out itself, days later. What recipes say is read without torch: jobs may be submitted where there is none.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.recipes import load_recipe, override
from lbr_dist.training.origin import changed_model, check_settings

if TYPE_CHECKING:
    from lbr_dist.training.preflight import Job

log = logging.getLogger("lbr")


def load_next(first: Recipe, name: str, following: str) -> Recipe:
    """Read the recipe of a run that begins with another's weights, whatever its own `model.start_from` says.

    Args:
        first: the other's recipe.
        name: of its file, for messages.
        following: file of the recipe to read.

    Raises:
        UserError: it is no recipe, not of stage 2 (or joint) after stage 1, both have one output, or their bottlenecks,
            adapters or temperatures do not fit.
    """
    second = load_recipe(following, [override("model.start_from", first.output)])
    if first.stage != "generative":
        raise UserError(f"recipe {name}: stage is {first.stage}: the first of the two has to be generative")
    if second.stage == "generative":
        raise UserError(f"recipe {following}: stage is generative: the second of the two has to be contrastive")
    if Path(first.output).resolve() == Path(second.output).resolve():
        raise UserError(f"recipe {following}: its output is also that of {name}: set another one")
    check_settings(first, second, name)
    return second


def check_ahead(job: Job, *, resumes: bool) -> None:
    """Check all that the run after this one names, but for the weights: its model (which has to be this one's), sets,
    DeepSpeed file and folder.

    Args:
        job: of this run.
        resumes: whether this run goes on from a checkpoint: then what is wrong is a warning, since whatever came over
            the next run's files is no reason to leave this one half done.

    Raises:
        UserError: the next run could not start.
    """
    from lbr_dist.training.preflight import check

    if job.then is None:
        return
    try:
        if other := changed_model(Path(job.recipe.model.path), job.then):
            raise UserError(f"model {job.then.model.path}: is not that of this run ({other})")
        check(job.then, job.environment, ahead=True)
    except UserError as error:
        found = f"the run after this one, {job.then.output}, could not start: {error}"
        if not resumes:
            raise UserError(found) from None
        log.warning("%s", found)
