"""Typed recipes: every setting of a run, its default, and what it means.

The schema alone: values are checked one by one in their sections and against each other in `Recipe`; `recipes` reads
the files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from lbr_dist.config.base import Place, Positive, PositiveFloat, Section
from lbr_dist.config.data import Data, DataSet
from lbr_dist.config.model import Bottleneck, Lora, Model
from lbr_dist.config.objectives import Contrastive, Generative, Joint
from lbr_dist.config.training import Batch, Checkpoint, Duration, Optim, Tracking

__all__ = [
    "Batch",
    "Bottleneck",
    "Checkpoint",
    "Contrastive",
    "Data",
    "DataSet",
    "Duration",
    "Generative",
    "Joint",
    "Lora",
    "Model",
    "Optim",
    "Recipe",
    "Section",
    "Tracking",
]


class Recipe(Section):
    """A whole run."""

    stage: Literal["generative", "contrastive", "joint"]
    """Stage 1 (generative), stage 2 (contrastive), or both losses in every step (joint)."""
    output: Place
    """Run folder: recipe, metrics and checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the data order, of dropout and of newly made parameters."""
    model: Model
    data: Data
    bottleneck: Bottleneck = Bottleneck()
    generative: Generative = Generative()
    contrastive: Contrastive = Contrastive()
    joint: Joint = Joint()
    batch: Batch
    optim: Optim = Optim()
    duration: Duration
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    deepspeed: Place = "auto"
    """A name in ds_configs/ (zero3, zero2, zero3_offload, cpu ...) or the path of a DeepSpeed JSON file. `auto`: zero3
    on several GPUs, cpu (also stage 3) on several CPU processes, and on one of either, where there is nothing to
    partition, zero0 (with bfloat16: zero2)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop and dump the step's sample ids, or skip the step."""
    max_skips: Positive = 10
    """Skipped steps after which the run stops all the same."""
    step_timeout: PositiveFloat = 1800.0
    """Seconds without a finished step after which every rank writes its Python stacks and ends (a hung rank). Two hours
    at least while a checkpoint is waited for, ten minutes while it is copied to host memory."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Recipe:
        other = [f"joint.{name}" for name, value in self.joint if value != getattr(Joint(), name)]
        if other and self.stage != "joint" and not (info.context or {}).get("kept"):
            raise ValueError(
                f"{', '.join(other)}: has no effect with stage {self.stage!r}: set stage: joint, or leave it out"
            )
        for number, data_set in enumerate(self.data.sets):
            learned = self.stage == "generative" or (self.stage == "joint" and data_set.split != "cl")
            if data_set.target is not None and not learned and not (info.context or {}).get("kept"):
                raise ValueError(
                    f"data.sets.{number}.target: has no effect on a set that the generative loss does not read: leave "
                    "it out"
                )
        if self.stage != "generative" and self.contrastive.pooling == "bottleneck" and not self.bottleneck.enabled:
            raise ValueError(
                "contrastive.pooling is 'bottleneck' but bottleneck.enabled is false: "
                "set contrastive.pooling=last or mean, or enable the bottleneck"
            )
        if self.stage != "generative" and self.contrastive.pooling == "last" and self.bottleneck.enabled:
            raise ValueError(
                "contrastive.pooling is 'last' but bottleneck.enabled is true, and the last token would be the last Z: "
                "set bottleneck.enabled=false, or contrastive.pooling=bottleneck"
            )
        if self.stage != "contrastive" and self.data.max_x_tokens + self.data.max_y_tokens > self.data.bin_tokens:
            raise ValueError(
                f"data.bin_tokens ({self.data.bin_tokens}) cannot hold a sample of data.max_x_tokens + "
                f"data.max_y_tokens ({self.data.max_x_tokens + self.data.max_y_tokens}) tokens: "
                "raise bin_tokens or lower the two"
            )
        if self.stage != "generative":
            for field in ("query_instruction", "passage_instruction"):
                text = getattr(self.contrastive, field)
                if text and not text.endswith("\n"):
                    raise ValueError(f"contrastive.{field} must end in a line break (\\n)")
        for task in self.tasks:
            if not self.part(task).data.sets:
                raise ValueError(f"no set of data.sets serves the {task} loss: leave out split, or add a set")
        return self

    @property
    def pooling(self) -> Literal["bottleneck", "last", "mean"]:
        """Pooling that the run's embeddings have; a stage 1 run without bottleneck gets `last`."""
        if self.contrastive.pooling == "bottleneck" and not self.bottleneck.enabled:
            return "last"
        return self.contrastive.pooling

    def split_of(self, data_set: DataSet) -> str:
        """Split that this run reads from `data_set`; a joint run is read as its two `part`s."""
        return data_set.split or ("gl" if self.stage == "generative" else "cl")

    @property
    def tasks(self) -> tuple[Literal["generative", "contrastive"], ...]:
        """The losses of each step."""
        return ("generative", "contrastive") if self.stage == "joint" else (self.stage,)

    def part(self, task: Literal["generative", "contrastive"]) -> Recipe:
        """The recipe of one of this run's losses by itself: stage, batch, and the sets that it reads.

        In a joint run a set without `split` serves both losses (`gl` the one, `cl` the other), one with `split: gl` the
        generative, with `split: cl` the contrastive.
        """
        if self.stage == task:
            return self
        other = "cl" if task == "generative" else "gl"
        sets = [data_set for data_set in self.data.sets if data_set.split != other]
        bins = {"global_batch": self.joint.bins} if task == "generative" else {}
        changes = {"stage": task, "batch": self.batch.model_copy(update=bins)}
        return self.model_copy(update=changes | {"data": self.data.model_copy(update={"sets": sets})})

    def target_of(self, data_set: DataSet) -> str:
        """Stage 1 target of `data_set`."""
        return data_set.target or self.generative.target
