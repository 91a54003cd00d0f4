"""From planned samples to tensors: read the records, tokenize, lay out as `[X ; Z ; Y]`.

The plan fixed every length from the index. Here the text is tokenized for the first time, and a length that differs
from the index is an error, not a truncation: it means another tokenizer or a changed shard, and the run would silently
be another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import SIDES, PlannedSample, Source, Task
from lbr_dist.data.record import normalised_hash
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.errors import UserError
from lbr_dist.model.layout import PackedBatch, Sample, pack
from lbr_dist.model.tokenizer import Tokenization


@dataclass
class LocalBatch:
    """One micro-batch of one rank. S samples in order; a dummy batch has S = 1 and no `samples`.

    Attributes:
        packed: token stream, segments, targets.
        samples: what the plan asked for.
        ids: record id of each sample, for the audit.
        side_S: code of the sample's role (`SIDES`); of a dummy's one sample -1.
        pair_S: stage 2: pair among the rank's own pairs, from 0; -1 in stage 1 and in a dummy.
        answer_hash_S: hash of the record's normalised answer; a hard negative's own text. Equal: counts as the same.
        question_hash_S: of a query: hash of the normalised question; else 0.
        known_M2: stage 2: (pair as in `pair_S`, hash as in `answer_hash_S`) of each further text that is known to
            answer the micro-batch's queries (the records' `positives`).
        task: which loss it is for.
    """

    packed: PackedBatch
    samples: list[PlannedSample]
    ids: list[str]
    side_S: Tensor
    pair_S: Tensor
    answer_hash_S: Tensor
    question_hash_S: Tensor
    known_M2: Tensor
    task: Task = "contrastive"

    @property
    def is_dummy(self) -> bool:
        """Whether this pass only keeps the ranks in step: its sample must not count."""
        return not self.samples

    @property
    def tokens(self) -> int:
        """Useful tokens; 0 in a dummy batch."""
        return sum(sample.tokens for sample in self.samples)

    def to(self, device: torch.device | str) -> Self:
        """Copy with all tensors on `device`."""
        tensors: dict[str, Any] = {"packed": self.packed.to(device)}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                tensors[item.name] = value.to(device, non_blocking=True)
        return replace(self, **tensors)


class Job(NamedTuple):
    """One micro-batch to make."""

    samples: list[PlannedSample]
    first_pair: int
    """Stage 2: the rank's first pair in the step."""
    task: Task


class _Text(NamedTuple):
    """A text to tokenize, and the number of tokens that the index gives it."""

    text: str
    tokens: int


class Assembler:
    """Makes micro-batches; picklable, so that loader processes can have one each."""

    def __init__(
        self, recipe: Recipe, readers: Sequence[ShardReader], sources: Sequence[Source], tokenization: Tokenization
    ) -> None:
        self._recipe, self._readers, self._tokenization = recipe, list(readers), tokenization
        self._names = [source.name for source in sources]
        self._targets = [source.target for source in sources]
        contrastive = recipe.contrastive
        query, passage = tokenization.encode([contrastive.query_instruction, contrastive.passage_instruction])
        bos = list(tokenization.bos)
        self._before = {"x": bos, "query": bos + query, "passage": bos + passage, "negative": bos + passage}
        self._eos = [] if tokenization.eos_id is None else [tokenization.eos_id]

    def batch(self, job: Job) -> LocalBatch:
        """Make one micro-batch.

        Raises:
            UserError: a shard is damaged or gone, or a text has not the number of tokens that the index says.
        """
        if not job.samples:
            return self._dummy(job.task)
        records = self._records(job.samples)
        texts = [self._texts(sample, record) for sample, record in zip(job.samples, records, strict=True)]
        samples = [
            self._layout(planned, tokens) for planned, tokens in zip(job.samples, self._encode(job, texts), strict=True)
        ]
        ids = [record["id"] for record in records]
        answers = [self._answer_hash(s, record) for s, record in zip(job.samples, records, strict=True)]
        questions = [
            normalised_hash(record["question"]) if planned.side == "query" else 0
            for planned, record in zip(job.samples, records, strict=True)
        ]
        known = [
            (planned.pair - job.first_pair, normalised_hash(text))
            for planned, record in zip(job.samples, records, strict=True)
            if planned.side == "query"
            for text in self._known(record)
        ]
        return LocalBatch(
            packed=self._pack(samples, job.task),
            samples=job.samples,
            ids=ids,
            side_S=torch.tensor([SIDES[s.side] for s in job.samples]),
            pair_S=torch.tensor([s.pair - job.first_pair if s.pair >= 0 else -1 for s in job.samples]),
            answer_hash_S=torch.tensor(answers),
            question_hash_S=torch.tensor(questions),
            known_M2=torch.tensor(known, dtype=torch.int64).view(-1, 2),
            task=job.task,
        )

    def check(self, samples: Sequence[PlannedSample]) -> None:
        """Check on some samples that instruction and text tokenize together as they do apart.

        Otherwise the exported model, which gets the two as one string, would read other tokens than training did. White
        space in front of a text, which many tokenizers join to the instruction's line break, is left out.

        Raises:
            UserError: they do not; the setting is named.
        """
        contrastive = self._recipe.contrastive
        instructions = {"query": contrastive.query_instruction, "passage": contrastive.passage_instruction}
        records = self._records(samples)
        for side, instruction in instructions.items():
            if not instruction:
                continue
            chosen = [(s, r) for s, r in zip(samples, records, strict=True) if s.side == side]
            texts = [self._texts(sample, record)[0].text.lstrip() for sample, record in chosen]
            apart = self._tokenization.encode([instruction, *texts])
            together = self._tokenization.encode([instruction + text for text in texts])
            for text, alone, both in zip(texts, apart[1:], together, strict=True):
                if apart[0] + alone != both:
                    raise UserError(
                        f"contrastive.{side}_instruction: with this tokenizer its tokens change with the text after it "
                        f"(for example {text[:40]!r}), so `lbr export` would refuse the run: leave the instruction "
                        "out, or take another base"
                    )

    def _known(self, record: dict[str, Any]) -> list[str]:
        """Texts that answer a record's question beside the one it is paired with."""
        further = record.get("positives", [])
        return [*further, record["answer"]] if further and self._recipe.contrastive.positives == "draw" else further

    def _records(self, samples: Sequence[PlannedSample]) -> list[dict[str, Any]]:
        """The record of each sample; a record that serves several samples is read once."""
        found: dict[Any, dict[str, Any]] = {}
        for number, reader in enumerate(self._readers):
            rows = sorted({s.ref.row for s in samples if s.ref.set == number})
            found.update(((number, row), record) for row, record in zip(rows, reader.read(rows), strict=True))
        return [found[s.ref] for s in samples]

    def _texts(self, planned: PlannedSample, record: dict[str, Any]) -> list[_Text]:
        """What has to be tokenized for a sample."""
        index, row = self._readers[planned.ref.set].index, planned.ref.row
        question = _Text(record.get("question", ""), int(index.question_tokens[row]))
        answer = _Text(record.get("answer", ""), int(index.answer_tokens[row]))
        if planned.side == "query":
            return [question]
        if planned.side == "passage" and planned.choice < 0:
            return [answer]
        if planned.side == "passage":
            drawn = index.positive_tokens
            assert drawn is not None
            return [_Text(record["positives"][planned.choice], int(drawn[row][planned.choice]))]
        if planned.side == "negative":
            counts = index.negative_tokens[row]
            return [_Text(record["negatives"][planned.choice], int(counts[planned.choice]))]
        if self._targets[planned.ref.set] == "sft":
            return [question, answer]
        return [_Text(record["text"], int(index.text_tokens[row]))] if "text" in record else [answer]

    def _encode(self, job: Job, texts: list[list[_Text]]) -> list[list[list[int]]]:
        """Tokens of each text of each sample, checked against the index."""
        flat = iter(self._tokenization.encode([text.text for of_sample in texts for text in of_sample]))
        encoded = [[next(flat) for _ in of_sample] for of_sample in texts]
        for planned, of_sample, tokens in zip(job.samples, texts, encoded, strict=True):
            for text, ids in zip(of_sample, tokens, strict=True):
                if len(ids) != text.tokens:
                    reader = self._readers[planned.ref.set]
                    shard = reader.opened.urls(reader.split)[int(reader.index.shard[planned.ref.row])]
                    raise UserError(
                        f"{shard}: row {planned.ref.row} of {self._names[planned.ref.set]} has a text of {len(ids)} "
                        f"tokens, of {text.tokens} by the index: the index is of another tokenizer, or the shard was "
                        "changed; prepare the set again with --overwrite"
                    )
        return encoded

    def _layout(self, planned: PlannedSample, tokens: list[list[int]]) -> Sample:
        """X, |Z| and Y with exactly the planned lengths: X is cut at its end, Y before its end-of-sequence token."""
        before = self._before[planned.side]
        x = (before + tokens[0])[: planned.x_len]
        if planned.side != "x":
            return Sample(x, planned.z_len)
        target = self._targets[planned.ref.set]
        if target == "prefix":
            y = tokens[0][planned.x_len - len(before) :]
        else:
            y = tokens[1] if target == "sft" else tokens[0]
        return Sample(x, planned.z_len, y[: planned.y_len - len(self._eos)] + self._eos)

    def _answer_hash(self, planned: PlannedSample, record: dict[str, Any]) -> int:
        if planned.side == "negative":
            return normalised_hash(record["negatives"][planned.choice])
        if planned.side == "passage" and planned.choice >= 0:
            return normalised_hash(record["positives"][planned.choice])
        return int(self._readers[planned.ref.set].index.answer_hash[planned.ref.row])

    def _pack(self, samples: Sequence[Sample], task: Task) -> PackedBatch:
        generative = task == "generative"
        return pack(
            samples,
            bottleneck_vectors=self._recipe.bottleneck.count,
            hide_x=generative and self._recipe.bottleneck.enabled,
            causal=generative or self._recipe.contrastive.attention == "causal",
        )

    def _dummy(self, task: Task) -> LocalBatch:
        """One token, no target."""
        none = torch.tensor([-1])
        packed = self._pack([Sample([0], self._recipe.bottleneck.length(1))], task)
        known = torch.empty((0, 2), dtype=torch.int64)
        return LocalBatch(packed, [], [], none, none, none, none, known, task)
