"""`lbr train`, `plan`, `audit`, `recipes` and `settings`: runs and what they are made from."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from lbr_dist.cli.options import place
from lbr_dist.errors import UserError


def train(
    recipe: Annotated[
        str, typer.Argument(callback=place, help="YAML file, or the name of a shipped recipe (`lbr recipes`).")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optim.lr=1e-4.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine.")] = None,
    resume: Annotated[str, typer.Option(callback=place, help="auto, never, or the path of a checkpoint.")] = "auto",
    allow_change: Annotated[
        list[str] | None, typer.Option(help="Recipe field that may differ from the run that is resumed. Repeatable.")
    ] = None,
    then: Annotated[
        str | None,
        typer.Option(
            callback=place, help="Recipe of the stage 2 that is to follow: checked before this run begins, and not run."
        ),
    ] = None,
) -> None:
    """Train stage 1, stage 2, or both in every step (joint), from a recipe."""
    from lbr_dist.recipes import load_recipe

    loaded, following = load_recipe(recipe, overrides), None
    if then is not None:
        from lbr_dist.training.chain import load_next

        following = load_next(loaded, recipe, then)
    if nproc is not None:
        from lbr_dist.launch.local import launch

        sys.exit(launch(loaded, nproc, resume=resume, allow_change=allow_change or (), then=following))
    from lbr_dist.launch.slurm_words import FINISHED, leave, left
    from lbr_dist.training.faults import FaultError
    from lbr_dist.training.run import train as run

    try:
        with left(Path(loaded.output)):
            outcome = run(loaded, resume=resume, allow_change=allow_change or (), then=following)
        if outcome.finished:
            leave(outcome.run_dir, FINISHED)
        sys.exit(outcome.exit_code)
    except FaultError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def plan(
    recipe: Annotated[
        str, typer.Argument(callback=place, help="YAML file, or the name of a shipped recipe (`lbr recipes`).")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optim.lr=1e-4.")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or cpu.")] = "h100",
) -> None:
    """Check a recipe without starting it: steps, tokens, memory per rank, time."""
    from lbr_dist.recipes import load_recipe
    from lbr_dist.training.cost.estimate import estimate

    print("\n".join(estimate(load_recipe(recipe, overrides), world=world_size, gpu=gpu).lines))


def audit(run: Annotated[Path, typer.Argument(callback=place, help="Run folder.")]) -> None:
    """Prove from a run's logs that every sample was used exactly once per epoch, in plan order."""
    from lbr_dist.training.audit import audit as check

    found = check(run)
    print(f"{run}: {found}")
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        raise typer.Exit(1)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy.")] = None,
    out: Annotated[Path | None, typer.Argument(callback=place, help="Where to; default: NAME.yaml here.")] = None,
) -> None:
    """List the recipes that ship, or copy one to start from."""
    from lbr_dist.recipes import FOLDER, shipped

    known = shipped()
    if name is None:
        width = max(map(len, known))
        print("\n".join(f"{recipe:<{width}}  {line}" for recipe, line in known.items()))
        return
    if name not in known:
        raise UserError(f"recipe {name}: not one that ships; they are {', '.join(known)}")
    target = out or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise UserError(f"{target}: exists; name another file")
    try:
        shutil.copyfile(FOLDER / f"{name}.yaml", target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); name another file") from None
    print(f"written: {target}")


def settings(
    prefix: Annotated[str, typer.Argument(help="Only names that begin like this, as optim or data.sets.")] = "",
) -> None:
    """List every setting of a recipe: name, type, default, meaning."""
    from lbr_dist.recipes.settings import settings as every

    found = [setting for setting in every() if setting.name.startswith(prefix)]
    if not found:
        raise UserError(f"settings {prefix}: no setting begins like this; `lbr settings` lists all")
    width = min(shutil.get_terminal_size().columns, 120)
    for setting in found:
        default = "must be given" if setting.default is None else f"default {setting.default}"
        print(f"{setting.name} ({setting.type}; {default})")
        meaning = textwrap.fill(setting.meaning, width - 4, break_long_words=False, break_on_hyphens=False)
        print(textwrap.indent(meaning, "    "))
