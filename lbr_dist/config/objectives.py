"""Settings of the two objectives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lbr_dist.config.base import Positive, PositiveFloat, Section, Share


class Generative(Section):
    """Stage 1 (paper section 3.2)."""

    target: Literal["sft", "reconstruct", "prefix"] = "sft"
    """sft: X = question, Y = answer; reconstruct: X = Y = document; prefix: X = D[:k], Y = D[k:], k drawn per row."""
    prefix_min: Share = 0.2
    """Smallest share of the document that becomes X with target `prefix`."""
    prefix_max: Share = 0.8
    """Largest share."""

    @model_validator(mode="after")
    def _order(self) -> Generative:
        if self.prefix_min > self.prefix_max:
            raise ValueError("generative.prefix_min is larger than generative.prefix_max")
        return self


class Matryoshka(Section):
    """Embeddings whose first dimensions are embeddings too (Kusupati et al. 2022)."""

    dims: Annotated[list[Positive], Field(min_length=1)]
    """Sizes that are trained, the full width among them if it is to stay usable."""
    weights: list[PositiveFloat] | None = None
    """Weight of each size's loss in their mean; default: all alike."""

    @model_validator(mode="after")
    def _pairs(self) -> Matryoshka:
        if len(set(self.dims)) != len(self.dims):
            raise ValueError("contrastive.matryoshka.dims names a size twice")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(
                f"contrastive.matryoshka.weights has {len(self.weights)} values, dims has {len(self.dims)}: one each"
            )
        return self

    @property
    def pairs(self) -> list[tuple[int, float]]:
        """(dimensions, weight) of each size."""
        return list(zip(self.dims, self.weights or [1.0] * len(self.dims), strict=True))


class LearnedTemperature(Section):
    """A temperature that is trained with the weights (as CLIP's; Radford et al. 2021), from `temperature` on."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of the temperature's logarithm; it follows the schedule of `optim`, without weight decay."""
    lowest: PositiveFloat = 0.01
    """The temperature stays above; an update that would go on below is not made."""
    highest: PositiveFloat = 1.0
    """The temperature stays below."""


class Contrastive(Section):
    """Stage 2 (paper section 3.3)."""

    temperature: PositiveFloat = 0.05
    """Softmax temperature tau on cosine similarities."""
    temperature_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the temperature moves to `final_temperature` over the run."""
    final_temperature: PositiveFloat | None = None
    """Temperature of the last step, with a schedule."""
    learn_temperature: LearnedTemperature | None = None
    """Train the temperature, from `temperature` on. Excludes a schedule."""
    pooling: Literal["bottleneck", "last", "mean"] = "bottleneck"
    """Hidden state that represents a text: the last Z (LBR), the last token (without a bottleneck), or the
    mean over tokens (baselines; with a bottleneck it is over X alone, and a causal Z then takes no part)."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """Causal is the paper's; bidirectional is its ablation (paper section 5.1)."""
    query_instruction: str = ""
    """Text put before every query; it must end in a line break, where most tokenizers begin anew. With one that does
    not (Llama 2) the run could not be exported: `lbr plan` says so, and `lbr train` refuses it where its first texts
    show it."""
    passage_instruction: str = ""
    """Text put before every passage; likewise."""
    hard_negatives: Annotated[int, Field(ge=0)] = 0
    """Hard negatives used per record, of those that the record carries in `negatives`."""
    two_way: bool = False
    """Add the passage-to-query loss (symmetric InfoNCE)."""
    query_query: bool = False
    """The batch's other queries are negatives of a query too (an extra term of Qwen3-Embedding)."""
    passage_passage: bool = False
    """The batch's other passages are negatives of a pair's passage too (the other extra term)."""
    matryoshka: Matryoshka | None = None
    """Train the first dimensions of the embedding as embeddings of their own."""
    homogeneous: Literal["none", "set", "domain"] = "none"
    """Take each batch from one set of the mixture, or from the records of one `domain`; none: from everything. A group
    is cut into equal batches of at most `batch.global_batch` pairs, so nothing is left out and no batch is tiny."""
    positives: Literal["answer", "draw"] = "answer"
    """Passage of a record that has `positives`: its answer, or in each epoch another one drawn from the answer and
    `positives`. What is not drawn is never a negative of its query (with `mask_same_answer`)."""
    mask_same_answer: bool = True
    """Do not count as negatives: passages of the query's own record id, with its own (normalised) answer, or with one
    of the record's `positives`."""
    margin: float | None = None
    """Do not count as negatives passages that score above the positive plus this margin (cosine); None: off."""
    tile: Positive = 4096
    """Tile squared scores are held at a time: the loss's memory grows with that, not with the batch squared."""

    @model_validator(mode="after")
    def _temperature(self) -> Contrastive:
        if (self.temperature_schedule != "constant") != (self.final_temperature is not None):
            raise ValueError(
                "contrastive.temperature_schedule (linear or cosine) and contrastive.final_temperature go together: "
                "set both or none"
            )
        learned = self.learn_temperature
        if learned is not None:
            if self.final_temperature is not None:
                raise ValueError(
                    "contrastive.learn_temperature and contrastive.temperature_schedule exclude each other"
                )
            if not learned.lowest <= self.temperature <= learned.highest:
                raise ValueError(
                    f"contrastive.temperature ({self.temperature:g}) is outside contrastive.learn_temperature's lowest "
                    f"({learned.lowest:g}) and highest ({learned.highest:g})"
                )
        return self


class Joint(Section):
    """Both losses in every step (the paper's future work; this form is ours): (1 - w) generative + w contrastive."""

    bins: Positive = 64
    """Packed bins of the generative loss in each step; `batch.global_batch` counts the pairs of the contrastive one."""
    weight: Share = 0.5
    """w in the first step."""
    final_weight: Share | None = None
    """w in the last step; default: `weight`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How w moves over the run."""

    @model_validator(mode="after")
    def _moves(self) -> Joint:
        if (self.schedule != "constant") != (self.final_weight is not None):
            raise ValueError("joint.schedule (linear or cosine) and joint.final_weight go together: set both or none")
        return self
