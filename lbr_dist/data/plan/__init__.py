"""Which samples form each optimizer step: the one place from which plans are made.

A plan is a pure function of the indexes, the settings that change order or content, the seed and the step number. So
the data state of a checkpoint is one integer and a fingerprint, a resumed run continues exactly at any number of ranks
or loader processes, and every rank knows without asking how many forward passes the others make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lbr_dist.config import Recipe
from lbr_dist.data.information import read_information
from lbr_dist.data.plan.base import (
    EpochSummary,
    MicroPlan,
    Plan,
    PlannedSample,
    SampleRef,
    Source,
    StepPlan,
    TooLong,
)
from lbr_dist.data.plan.contrastive import ContrastivePlan
from lbr_dist.data.plan.generative import GenerativePlan
from lbr_dist.data.plan.joint import JointPlan
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import check_tokenizer, open_set
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.model.tokenizer import Tokenization

__all__ = [
    "ContrastivePlan",
    "EpochSummary",
    "GenerativePlan",
    "JointPlan",
    "MicroPlan",
    "Plan",
    "PlannedSample",
    "SampleRef",
    "Source",
    "StepPlan",
    "TooLong",
    "make_plan",
    "open_data",
]


def open_data(recipe: Recipe, tokenization: Tokenization) -> tuple[Plan, list[ShardReader]]:
    """Open the recipe's sets and plan the run.

    Returns:
        The plan, and a reader for each of its sources: the sets of the mixture in the recipe's order (in a joint run,
        those of the generative loss and then those of the contrastive one).

    Raises:
        UserError: a set is missing, damaged, empty, of another tokenizer, or does not suit the settings.
    """
    readers = []
    for task in recipe.tasks:
        part = recipe.part(task)
        for data_set in part.data.sets:
            opened = open_set(data_set.path)
            check_tokenizer(opened, tokenization)
            readers.append(ShardReader(opened, part.split_of(data_set), recipe.data.cache_dir, recipe.data.cache_gib))
    plan = make_plan(recipe, readers, tokenization)
    plan.notes += [
        f"{root} (eval): is the side that `lbr eval` asks about, and this run learns it"
        for root in sorted({reader.opened.root for reader in readers if reader.split == "eval"})
    ]
    return plan, readers


def make_plan(recipe: Recipe, readers: Sequence[ShardReader], tokenization: Tokenization) -> Plan:
    """Plan a run over opened sets, one for each of `recipe.data.sets`; of a joint run, of its two parts.

    Raises:
        UserError: a set does not suit its target or the limits, or has no usable sample.
    """
    if recipe.stage == "joint":
        generative, contrastive = recipe.part("generative"), recipe.part("contrastive")
        count = len(generative.data.sets)
        first = make_plan(generative, readers[:count], tokenization)
        return JointPlan(first, make_plan(contrastive, readers[count:], tokenization))
    surprisal = recipe.bottleneck.by_surprisal
    sources = [
        Source(
            name=f"{data_set.path} ({reader.split})",
            fingerprint=f"{reader.opened.fingerprint}/{reader.split}",
            index=reader.index,
            weight=data_set.weight,
            target=recipe.target_of(data_set) if recipe.stage == "generative" else "pairs",
            information=read_information(reader.opened, reader.split, surprisal.model) if surprisal else None,
        )
        for data_set, reader in zip(recipe.data.sets, readers, strict=True)
    ]
    bos = len(tokenization.bos)
    if recipe.stage == "generative":
        learns = GenerativePlan(recipe, sources, bos=bos, eos=int(tokenization.eos_id is not None))
        if tokenization.eos_id is None:
            learns.notes.append(
                f"model {tokenization.path}: its tokenizer names no end-of-sequence token, so answers end without one, "
                "and generation runs to its limit"
            )
        return learns
    query, passage = tokenization.encode([recipe.contrastive.query_instruction, recipe.contrastive.passage_instruction])
    for name, ids in (("query_instruction", query), ("passage_instruction", passage)):
        if ids and bos + len(ids) >= recipe.data.max_x_tokens:
            raise UserError(
                f"contrastive.{name}: its {bos + len(ids)} tokens leave none of data.max_x_tokens="
                f"{recipe.data.max_x_tokens} to a text, so that all would be the same: shorten it, or raise that"
            )
    plan = ContrastivePlan(recipe, sources, query_extra=bos + len(query), passage_extra=bos + len(passage))
    for name in ("query_instruction", "passage_instruction"):
        if not tokenization.begins_anew_after(getattr(recipe.contrastive, name)):
            plan.notes.append(
                f"contrastive.{name}: behind it this tokenizer gives a text other tokens than alone, so `lbr export` "
                "would refuse the run, and `lbr train` does where its first texts show it: leave it out"
            )
    return plan
