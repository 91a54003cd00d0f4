"""What was mined, for people: counts, and examples to read.

Whether mined negatives are hard or simply right is seen by reading them, and by nothing else; so the report shows
questions with their answer, what was taken, and what was thought too near to the answer to be taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lbr_dist.mining.choose import Chosen

EXAMPLES = 20
TEXT = 300
"""Characters of a text that an example shows."""


@dataclass
class Counts:
    """Totals over all queries."""

    queries: int = 0
    negatives: int = 0
    without_enough: int = 0
    """Queries with fewer negatives than asked for."""
    without_any: int = 0
    too_near: int = 0
    """Passages of the rank window that scored too near to the positive."""
    known_answers: int = 0
    """Known answers among the passages searched."""
    present_negatives: int = 0
    """Negatives that the records had, among the passages searched."""
    negative_positives: int = 0
    """Queries whose own answer scores below 0."""
    zero_positives: int = 0
    """Queries whose own answer scores 0: to BM25, it shares no word with them."""
    mean_positive_score: float = 0.0
    mean_negative_score: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0], repr=False)

    def add(self, chosen: Chosen) -> None:
        """Count a block."""
        found_Q = chosen.found_Q
        self.queries += len(found_Q)
        self.negatives += int(found_Q.sum())
        self.without_enough += int((found_Q < chosen.passage_QN.shape[1]).sum())
        self.without_any += int((found_Q == 0).sum())
        self.too_near += int(chosen.near_Q.sum())
        self.known_answers += int(chosen.known_Q.sum())
        self.present_negatives += int(chosen.present_Q.sum())
        self.negative_positives += int((chosen.positive_Q < 0).sum())
        self.zero_positives += int((chosen.positive_Q == 0).sum())
        self._sums[0] += float(np.nansum(chosen.positive_Q, dtype=np.float64))
        self._sums[1] += float(np.nansum(chosen.score_QN, dtype=np.float64))
        self.mean_positive_score = self._sums[0] / max(1, self.queries)
        self.mean_negative_score = self._sums[1] / max(1, self.negatives)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Text:
    """A passage in an example."""

    id: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Example:
    """One query: its question, its answer, what was taken and what was left."""

    id: str
    question: str
    positive: Text
    negatives: list[Text]
    too_near: list[Text]


def example_queries(queries: int) -> set[int]:
    """Queries that are shown, spread evenly over the side."""
    return set(np.linspace(0, queries - 1, min(EXAMPLES, queries)).astype(int).tolist())


def markdown(facts: dict[str, Any], counts: Counts, examples: list[Example]) -> str:
    """The report as Markdown; `facts` are settings to show first."""
    lines = ["# Mined hard negatives", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| | |", "| --- | ---: |"]
    for name, value in counts.as_dict().items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    lines += ["", "## Examples", "", "Read some: a negative that answers its question is a false one."]
    for example in examples:
        lines += ["", f"### {_cell(example.question)}", "", "| | score | passage |", "| --- | ---: | --- |"]
        lines.append(_row("positive", example.positive))
        lines += [_row(f"negative {rank}", text) for rank, text in enumerate(example.negatives, 1)]
        lines += [_row("too near", text) for text in example.too_near]
    return "\n".join(lines) + "\n"


def _row(role: str, text: Text) -> str:
    score = "–" if text.score is None else f"{text.score:.3f}"
    return f"| {role} | {score} | {_cell(text.text)} (`{_cell(text.id)}`) |"


def _cell(text: str) -> str:
    flat = " ".join(text.split())
    cut = flat if len(flat) <= TEXT else flat[:TEXT].rstrip() + " …"
    return cut.replace("|", "\\|")
