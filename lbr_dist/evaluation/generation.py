"""What the model can say about a question: answers generated through the bottleneck, and with the question in sight.

The gap between the two is what the bottleneck loses. Decoding is greedy: a model's scores are numbers, not
distributions. BLEU-4 is sacrebleu's (Post 2018) and ROUGE-L the F measure of rouge-score (Lin 2004), both 0 to 100;
ROUGE-L's words are runs of letters and digits of any script, because rouge-score's own are ASCII only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lbr_dist.data.record import SPACELESS
from lbr_dist.evaluation.held_out import HeldOut
from lbr_dist.inference.bm25 import words
from lbr_dist.inference.encoder import PackedEncoder

_SPACELESS = re.compile(f"[{SPACELESS}]")

NEW_TOKENS = 256
"""Most tokens of an answer; fewer where no reference is as long, or the run learned none as long."""


def generation_scores(encoder: PackedEncoder, data: HeldOut, questions: int) -> dict[str, dict[str, float]]:
    """Answer held-out questions and compare with their references.

    Args:
        encoder: a trained run.
        data: the held-out set.
        questions: how many to answer, spread evenly over the set.

    Returns:
        `bottleneck` (Y sees Z and earlier Y; only where the run has a bottleneck) and `full` (Y sees X too), each with
        `bleu4` and `rouge_l`.
    """
    rows = np.unique(np.linspace(0, len(data.queries) - 1, min(questions, len(data.queries))).astype(int))
    references = [data.references[row] for row in rows]
    asked = [data.queries[row] for row in rows]
    modes = {"bottleneck": True, "full": False} if encoder.recipe.bottleneck.enabled else {"full": False}
    return {
        mode: text_scores(answers(encoder, asked, references, hide_x), references) for mode, hide_x in modes.items()
    }


def answers(encoder: PackedEncoder, questions: Sequence[str], references: Sequence[str], hide_x: bool) -> list[str]:
    """Greedy answers, no longer than the longest reference and than the run's `data.max_y_tokens`, beyond which it has
    not learned to go on; a question is cut to what they leave it of the model's positions or window."""
    from lbr_dist.model.backbone import longest_context
    from lbr_dist.model.decoding import generate_answers

    tokenization = encoder.tokenization
    longest = max(len(ids) for ids in tokenization.encode(references)) + 1
    most = min(longest, NEW_TOKENS, encoder.recipe.data.max_y_tokens)
    room = longest_context(encoder.model.causal_lm.config) - most
    generated = generate_answers(
        encoder.model,
        [replace(sample, x=sample.x[: max(1, room - sample.z)]) for sample in encoder.samples(questions, None)],
        eos_id=tokenization.eos_id,
        max_new_tokens=most,
        hide_x=hide_x,
    )
    return [tokenization.decode(ids) for ids in generated]


def text_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU-4 and mean ROUGE-L F, both 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, hypotheses, strict=True)
    rouge = [scorer.score(reference, hypothesis)["rougeL"].fmeasure for reference, hypothesis in pairs]
    apart = [[_SPACELESS.sub(r" \g<0> ", text) for text in texts] for texts in (hypotheses, references)]
    bleu = BLEU().corpus_score(apart[0], [apart[1]]).score
    return {"bleu4": float(bleu), "rouge_l": 100 * float(np.mean(rouge))}


class _Words:
    """rouge-score's tokenizer interface."""

    def tokenize(self, text: str) -> list[str]:
        """Words of a text."""
        return words(text)
