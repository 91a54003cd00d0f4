"""Where the weights that a run begins with come from, and whether they are of its recipe: those it is resumed from, or
`model.start_from`.

A checkpoint holds every weight, but what a model computes with them is also said by its configuration, its bottleneck
and the scale of its adapters; another one fits the same shapes and would train on in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_dist.config import Lora, Recipe
from lbr_dist.errors import UserError
from lbr_dist.training.run_recipe import covered, differences, load_run_recipe

NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Entries of a config.json that change nothing about the function that is trained."""


def check_resumed_model(recipe: Recipe, resume: str, allow_change: Sequence[str]) -> str:
    """A resumed run has its weights from the checkpoint, but its rotary base, norms, tokenizer and the like from
    `model.path`.

    Returns:
        In words, what differs there and is allowed: for the log.

    Raises:
        UserError: the model there is not the one in the checkpoint.
    """
    sound = _with_model(Path(recipe.output) if resume == "auto" else Path(resume)) if resume != "never" else None
    other = changed_model(sound / "model", recipe) if sound is not None else ""
    if not other:
        return ""
    found = f"model {recipe.model.path}: is not that of {sound} ({other})"
    if not covered("model.path", allow_change):
        raise UserError(f"{found}: restore it, choose another output, or allow it with --allow-change model.path")
    return found


def same_model(folder: Path, recipe: Recipe) -> bool:
    """Whether a run folder, or a checkpoint, has a copy of what `model.path` holds, wherever that lies."""
    sound = _with_model(folder)
    return sound is not None and not changed_model(sound / "model", recipe)


def _with_model(folder: Path) -> Path | None:
    """A checkpoint, or the newest one of a run, if its copy of the model is as it was written.

    A damaged one is passed over, or refused, when all of it is read.
    """
    from lbr_dist.training.checkpoint.format import MANIFEST, is_sound
    from lbr_dist.training.checkpoint.listing import list_checkpoints

    known = [folder] if (folder / MANIFEST).is_file() else [path for path, _ in list_checkpoints(folder)]
    return next((path for path in known if is_sound(path, "model")), None)


def changed_model(before: Path, recipe: Recipe) -> str:
    """In words, how `model.path` differs from an earlier folder in its configuration, or in the tokens that its
    tokenizer puts around a text; "" where it does not.
    """
    from lbr_dist.model.backbone import load_config
    from lbr_dist.model.tokenizer import Tokenization

    paths = str(before), recipe.model.path
    old, new = (load_config(path, 0).to_dict() for path in paths)
    with contextlib.suppress(UserError):  # a checkpoint lacks files that only some tokenizers have
        first, second = (Tokenization.load(path) for path in paths)
        for name in ("bos", "eos_id"):
            old[f"tokenizer: {name}"], new[f"tokenizer: {name}"] = getattr(first, name), getattr(second, name)
    changed = [key for key in sorted({*old, *new} - set(NOT_THE_MODEL)) if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed)


def check_start(recipe: Recipe, allow_change: Sequence[str] = ()) -> None:
    """Check that the run or checkpoint in `model.start_from` suits this recipe.

    Raises:
        UserError: it is missing, or its model's configuration or tokenizer is another, or see `check_settings`.
    """
    from lbr_dist.training.checkpoint.chosen import with_checkpoint

    def check(start: Path) -> None:
        before = load_run_recipe(start)
        if not covered("model.path", allow_change) and (other := changed_model(start / "model", recipe)):
            raise UserError(
                f"model {recipe.model.path}: is not that of {start} ({other}): set model.path as there, or allow it "
                "with --allow-change model.path"
            )
        check_settings(before, recipe, str(start))

    assert recipe.model.start_from is not None
    with_checkpoint(recipe.model.start_from, check, kinds={"extra"})  # on every rank; one of them reads it all later


def check_settings(before: Recipe, recipe: Recipe, start: str) -> None:
    """Check that a run of the recipe `before` is one that a run of `recipe` can begin with.

    Raises:
        UserError: bottleneck, adapters or base of a learned temperature are others; both values are named, and `start`
            names the first one.
    """
    lora, old = recipe.model.lora, before.model.lora
    if other := _other_adapters(old, lora):
        raise UserError(f"model.lora {other} {start}: set it as there")
    if lora and old and lora.alpha != old.alpha:
        raise UserError(
            f"model.lora.alpha is {lora.alpha:g} with r {lora.r}, but {start} has adapters of {old.alpha:g} with r "
            f"{old.r}, which would count {lora.alpha / old.alpha:g} times: set them as there"
        )
    now = recipe.contrastive
    learned = [made.stage != "generative" and made.contrastive.learn_temperature for made in (before, recipe)]
    if all(learned) and before.contrastive.temperature != now.temperature:
        raise UserError(
            f"contrastive.temperature is {now.temperature}, but {start} learned its own as a factor of "
            f"{before.contrastive.temperature}: set it as there"
        )
    if not before.bottleneck.enabled:
        return  # a plain run: Z, if this one has it, is new
    if not recipe.bottleneck.enabled:
        if recipe.contrastive.pooling == "bottleneck" or recipe.stage != "contrastive":
            raise UserError(
                f"bottleneck.enabled is false, but {start} was trained with {before.bottleneck.count} bottleneck "
                "tokens: set the bottleneck as there"
            )
        return
    changed = differences(
        before,
        before.model_copy(update={"bottleneck": recipe.bottleneck}),
    )
    if changed and _how_many(before) != _how_many(recipe):
        listed = "; ".join(f"{field} is {new!r} here and {old!r} there" for field, (old, new) in changed.items())
        raise UserError(f"model.start_from {start}: other bottleneck settings ({listed}): set them as there")


def other_attention(recipe: Recipe) -> str:
    """In words, that the weights a run begins with have learned with another attention; "" where they have not.

    A causal base under `contrastive.attention: bidirectional` is what the paper's ablation asks for.
    """
    from lbr_dist.model.backbone import load_config
    from lbr_dist.training.checkpoint.chosen import with_checkpoint

    pairs, start = "contrastive" in recipe.tasks, recipe.model.start_from
    now = recipe.contrastive.attention if pairs else "causal"
    if start is not None:
        before = with_checkpoint(start, load_run_recipe, kinds={"extra"})
        was = before.contrastive.attention if "contrastive" in before.tasks else now
        found = f"model.start_from {start}: was trained with contrastive.attention={was}"
        remedy = f"set contrastive.attention={was}" if pairs else "name the run before it"
    else:
        was = now if getattr(load_config(recipe.model.path, 0), "is_causal", True) else "bidirectional"
        found = f"model {recipe.model.path}: its attention is {was} (is_causal: false in its config.json)"
        remedy = f"{f'set contrastive.attention={was}, or ' * pairs}name the model that it was trained from"
    return "" if was == now else f"{found}, and is {now} in this run: {remedy}, unless that is meant"


def _other_adapters(before: Lora | None, now: Lora | None) -> str:
    """In words, up to the name of the run before, why adapters have other weights; "" where they have the same."""
    if before is None or now is None:
        return "" if before is now else f"is {'not ' * (now is None)}set, and it is {'not ' * (before is None)}in"
    if before.r != now.r:
        return f"has r {now.r}, and r {before.r} in"
    for field in ("target_modules", "train_modules"):
        old, new = getattr(before, field), getattr(now, field)
        # All layers can be listed by name, too, and a name can be longer than it has to
        if not isinstance(old, str) and not isinstance(new, str) and _last_names(old) != _last_names(new):
            return f"has {field} {new!r}, and {field} {old!r} in"
    return ""


def _last_names(modules: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


def origin(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from others, wherever it lies: its step, and the start of the run that wrote it."""
    from lbr_dist.training.checkpoint.format import read_manifest

    manifest = read_manifest(checkpoint)
    return {"step": manifest.step, "attempt": manifest.attempt}


def outdated(recipe: Recipe, checkpoint: Path) -> str:
    """In words, that `model.start_from` is no longer what a run began with; "" where it is, is gone, or is not known.

    Args:
        recipe: of the run.
        checkpoint: one of its own.
    """
    from lbr_dist.training.checkpoint.format import read_manifest
    from lbr_dist.training.checkpoint.listing import resolve

    began_with, start = read_manifest(checkpoint).state.get("began_with"), recipe.model.start_from
    if began_with is None or start is None:
        return ""
    try:
        now = origin(resolve(Path(start), kinds={"extra"}))
    except UserError:
        return ""
    if now == began_with:
        return ""
    return (
        f"{recipe.output}: began with step {began_with['step']} of {start}, which was trained on or anew since, and is "
        f"at step {now['step']}: for a run that begins with that, choose another output"
    )


def _how_many(recipe: Recipe) -> tuple[object, ...]:
    """What decides the bottleneck tokens; a moved surprisal model is the same one."""
    bottleneck = recipe.bottleneck
    surprisal = bottleneck.by_surprisal
    return bottleneck.count, bottleneck.effective_ratio, surprisal and surprisal.bits
