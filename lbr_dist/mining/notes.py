"""What is taken down while the mined set is written: counts, examples, and the ids with their scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import PreparedSet
from lbr_dist.mining.candidates import SIDE, Candidates
from lbr_dist.mining.choose import Chosen
from lbr_dist.mining.report import Counts, Example, Text
from lbr_dist.mining.write import Mined


class Notes:
    """Goes through the chosen negatives in their files, in step with the writer."""

    def __init__(
        self,
        files: list[Path],
        shown: set[int],
        candidates: Candidates,
        opened: PreparedSet,
        write: Callable[[str], int],
        advance: Callable[[int], None],
    ) -> None:
        self.counts, self.examples = Counts(), list[Example]()
        self._files, self._shown, self._candidates, self._opened = files, shown, candidates, opened
        self._write, self._advance, self._first = write, advance, 0

    def passages(self) -> Iterator[np.ndarray]:
        """The negatives of the queries in order, a file at a time."""
        for file in self._files:
            with np.load(file) as arrays:
                self._chosen = Chosen(**arrays)
            self.counts.add(self._chosen)
            yield self._chosen.passage_QN
            self._first += len(self._chosen.passage_QN)

    def note(self, mined: Mined) -> None:
        """Take down one record."""
        place = mined.query - self._first
        positive = _number(self._chosen.positive_Q[place])
        texts = [
            Text(record.id, str(record.answer), _number(score))
            for record, score in zip(mined.negatives, self._chosen.score_QN[place].tolist(), strict=False)
        ]
        line = {
            "id": mined.record.id,
            "positive": positive,
            "negatives": [{"id": text.id, "score": text.score} for text in texts],
        }
        self._write(json.dumps(line, ensure_ascii=False) + "\n")
        self._advance(1)
        if mined.query in self._shown:
            answer = Text(mined.record.id, str(mined.record.answer), positive)
            self.examples.append(
                Example(mined.record.id, str(mined.record.question), answer, texts, self._too_near(place))
            )

    def _too_near(self, place: int) -> list[Text]:
        passage_R = self._chosen.rejected_QR[place]
        rows = self._candidates.passage_rows_P[passage_R[passage_R >= 0]]
        scores = self._chosen.rejected_score_QR[place].tolist()
        records = ShardReader(self._opened, SIDE).read(rows)
        return [Text(r["id"], r["answer"], _number(s)) for r, s in zip(records, scores, strict=False)]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
