"""How long each sample will be, from the index alone: no text is read to plan a run.

Everything here is elementwise over rows of the index. The loader later tokenizes the text and insists on exactly these
lengths, so a plan made from the index of another tokenizer cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lbr_dist.config import Bottleneck, Recipe
from lbr_dist.data.information import known_bits
from lbr_dist.data.plan.base import Source, TooLong
from lbr_dist.data.plan.order import key64, uniform
from lbr_dist.data.split_index import Ragged, within
from lbr_dist.errors import UserError


def bottleneck_lengths(bottleneck: Bottleneck, x_N: np.ndarray, bits_N: np.ndarray | None = None) -> np.ndarray:
    """|Z| of each sample: `Bottleneck.length`, elementwise."""
    if not bottleneck.enabled or bottleneck.tokens is not None:
        return np.full_like(x_N, bottleneck.count)
    amount_N, each = bottleneck.measure(x_N, bits_N)
    return np.clip(-np.floor_divide(-amount_N, each), 1, bottleneck.max_tokens).astype(np.int64)


class GenerativeLengths:
    """|X|, |Z| and |Y| of stage 1 samples of one set: [bos D or Q ; Z ; target eos]."""

    def __init__(self, recipe: Recipe, source: Source, *, bos: int, eos: int, key: int) -> None:
        """Prepare.

        Args:
            recipe: limits, bottleneck, prefix shares.
            source: the set.
            bos: tokens put before X.
            eos: tokens put after Y.
            key: seed of the cut points of target `prefix`.
        """
        self._data, self._bottleneck, self._generative = recipe.data, recipe.bottleneck, recipe.generative
        self._source, self._bos, self._eos, self._key = source, bos, eos, key
        index = source.index
        if source.target == "sft" and _lacks(index.question_tokens, index.answer_tokens):
            raise UserError(
                f"{source.name}: target sft needs questions and answers, and some records have none: "
                "set this set's target to reconstruct or prefix, or prepare its plain texts as a set of their own "
                "with such a target (docs/data.md)"
            )

    def document_tokens(self, row_N: np.ndarray) -> np.ndarray:
        """Raw tokens of the document: the text where the record has one, else the answer."""
        text_N = self._source.index.text_tokens[row_N].astype(np.int64)
        return np.where(text_N >= 0, text_N, self._source.index.answer_tokens[row_N])

    def lengths(self, row_N: np.ndarray, pass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x_N, z_N, y_N in tokens, after cutting; a prefix's cut point depends on the row and on the pass."""
        x_N, y_N = self._whole(row_N)
        if self._source.target == "prefix":
            x_N, y_N = self._split(row_N, pass_N)
        x_N, y_N = np.minimum(x_N, self._data.max_x_tokens), np.minimum(y_N, self._data.max_y_tokens)
        return x_N, bottleneck_lengths(self._bottleneck, x_N, self._bits(row_N, x_N)), y_N

    def _bits(self, row_N: np.ndarray, x_N: np.ndarray) -> np.ndarray | None:
        """Information in the first `x_N` tokens of what is read; None where nobody asks."""
        known, index = self._source.information, self._source.index
        if known is None:
            return None
        if self._source.target == "sft":
            return known_bits(known.question[row_N], index.question_tokens[row_N], x_N - self._bos)
        bits_N = np.where(index.text_tokens[row_N] >= 0, known.text[row_N], known.answer[row_N])
        return known_bits(bits_N, self.document_tokens(row_N), x_N - self._bos)

    def _whole(self, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x_N and y_N before cutting; a prefix's document counts whole on both sides."""
        index = self._source.index
        if self._source.target == "sft":
            x_N, y_N = index.question_tokens[row_N].astype(np.int64), index.answer_tokens[row_N].astype(np.int64)
        else:
            x_N = y_N = self.document_tokens(row_N)
        return x_N + self._bos, y_N + self._eos

    def _split(self, row_N: np.ndarray, pass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut D at k, uniform within the shares asked for, then moved so that both parts fit if that is possible."""
        document_N = self.document_tokens(row_N)
        draw_N = uniform(row_N.astype(np.uint64) | (pass_N.astype(np.uint64) << np.uint64(40)), self._key)
        low, high = self._generative.prefix_min, self._generative.prefix_max
        k_N = np.rint(document_N * (low + (high - low) * draw_N)).astype(np.int64)
        k_N = np.clip(k_N, 1, np.maximum(1, document_N - 1))
        k_N = np.maximum(k_N, document_N + self._eos - self._data.max_y_tokens)
        k_N = np.minimum(np.minimum(k_N, self._data.max_x_tokens - self._bos), document_N)
        return k_N + self._bos, document_N - k_N + self._eos

    def usable(self) -> tuple[np.ndarray | None, list[TooLong]]:
        """Rows that are used (None: all) and the samples that exceed a limit.

        Raises:
            UserError: a used sample does not fit a bin, or none is left.
        """
        data, all_N = self._data, np.arange(len(self._source.index.answer_tokens))
        x_N, y_N = self._whole(all_N)
        if self._source.target == "prefix":
            limits = [("document", x_N + self._eos, data.max_x_tokens + data.max_y_tokens)]
        elif self._source.target == "reconstruct":
            limits = [("document", x_N, data.max_x_tokens), ("document as target", y_N, data.max_y_tokens)]
        else:
            limits = [("question", x_N, data.max_x_tokens), ("answer", y_N, data.max_y_tokens)]
        empty_N = (y_N == 0) | ((x_N == 0) & (not self._bottleneck.enabled))
        kept_N, too_long = keep(self._source.name, data.too_long, limits, empty_N)
        self._check_fit(all_N if kept_N is None else kept_N)
        return kept_N, too_long

    def _check_fit(self, row_N: np.ndarray) -> None:
        x_N, y_N = self._whole(row_N)
        x_N, y_N = np.minimum(x_N, self._data.max_x_tokens), np.minimum(y_N, self._data.max_y_tokens)
        z_N = bottleneck_lengths(self._bottleneck, x_N, self._bits(row_N, x_N))
        if self._source.target == "prefix":  # wherever the cut falls
            total_N = np.minimum(self.document_tokens(row_N) + self._bos + self._eos, x_N + y_N) + z_N
        else:
            total_N = x_N + z_N + y_N
        if len(total_N) and total_N.max() > self._data.bin_tokens:
            raise UserError(
                f"{self._source.name}: a sample of {total_N.max()} tokens (X, Z and Y) does not fit data.bin_tokens="
                f"{self._data.bin_tokens}: raise it, or lower data.max_x_tokens or data.max_y_tokens"
            )


class ContrastiveLengths:
    """|X| of the texts of stage 2 pairs of one set: bos + instruction + text."""

    def __init__(self, recipe: Recipe, source: Source, *, query_extra: int, passage_extra: int, number: int) -> None:
        """Prepare.

        Args:
            recipe: limits, bottleneck, number of hard negatives.
            source: the set.
            query_extra: tokens put before every query (bos and instruction).
            passage_extra: tokens put before every passage.
            number: of the set in the mixture.
        """
        self._recipe, self._source = recipe, source
        self._key = key64(recipe.seed, "negatives", number)
        self._draws = key64(recipe.seed, "positives") if recipe.contrastive.positives == "draw" else None
        self._query_extra, self._passage_extra = query_extra, passage_extra
        self._least, self._limit = int(not recipe.bottleneck.enabled), recipe.data.max_x_tokens
        index = source.index
        if _lacks(index.question_tokens, index.answer_tokens):
            raise UserError(
                f"{source.name}: stage 2 needs questions and answers, and some records have none: "
                "use a question-answer or query-document set"
            )
        if self._draws is not None and index.positive_tokens is None:
            raise UserError(
                f"{source.name}: contrastive.positives=draw needs the token counts of `positives` in the index, and "
                "this set was prepared before they were kept: prepare the set again"
            )

    def query(self, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|X|, after cutting, and |Z| of the queries."""
        known = self._source.information
        bits_N = None if known is None else known.question[row_N]
        return self._both(self._source.index.question_tokens[row_N], bits_N, self._query_extra)

    def passage(self, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|X|, after cutting, and |Z| of the passages."""
        known = self._source.information
        bits_N = None if known is None else known.answer[row_N]
        return self._both(self._source.index.answer_tokens[row_N], bits_N, self._passage_extra)

    def _both(self, tokens_N: np.ndarray, bits_N: np.ndarray | None, extra: int) -> tuple[np.ndarray, np.ndarray]:
        x_N = np.minimum(tokens_N.astype(np.int64) + extra, self._limit)
        if bits_N is not None:
            bits_N = known_bits(bits_N, tokens_N, x_N - extra)
        return x_N, bottleneck_lengths(self._recipe.bottleneck, x_N, bits_N)

    def positive(self, row_N: np.ndarray, pass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """|X| and |Z| of the passage that each record is paired with in its pass, and which of `positives` it is.

        The last is -1 for the answer. Drawn by a hash of seed, pass and record id, so by nothing that another order or
        mixture would change.
        """
        (x_N, z_N), choice_N = self.passage(row_N), np.full(len(row_N), -1, dtype=np.int64)
        if self._draws is None:
            return x_N, z_N, choice_N
        index, known = self._source.index, self._source.information
        texts = index.positive_tokens
        assert texts is not None
        choice_M, count_N = self._usable(texts, row_N)
        some_N = np.flatnonzero(count_N)
        draws = zip(pass_N[some_N].tolist(), index.ids[row_N[some_N]], (count_N[some_N] + 1).tolist(), strict=True)
        draw_N = np.array([key64(self._draws, number, str(name)) % count for number, name, count in draws], np.int64)
        drawn = draw_N < count_N[some_N]
        some_N = some_N[drawn]
        choice_N[some_N] = choice_M[(np.cumsum(count_N) - count_N)[some_N] + draw_N[drawn]]
        bits = None if known is None else known.positives
        x_N[some_N], z_N[some_N] = self._further(texts, bits, row_N[some_N], choice_N[some_N])
        return x_N, z_N, choice_N

    def negatives(self, row_N: np.ndarray, pass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The hard negatives used with these records, each in its pass, record by record.

        Of a record a run of neighbours in its list, from a start that changes with the pass.

        Returns:
            Of each: place of its record among the N, which of the record's negatives it is, |X| and |Z|.
        """
        texts, known = self._source.index.negative_tokens, self._source.information
        choice_M, count_N = self._usable(texts, row_N)
        wanted_N = np.minimum(self._recipe.contrastive.hard_negatives, count_N)
        columns = zip(row_N.tolist(), pass_N.tolist(), count_N.tolist(), strict=True)
        starts = [key64(self._key, row, number) % count if count else 0 for row, number, count in columns]
        place_K = np.repeat(np.arange(len(row_N)), wanted_N)
        turn_K = (np.array(starts, np.int64)[place_K] + within(wanted_N)) % count_N[place_K]
        choice_K = choice_M[(np.cumsum(count_N) - count_N)[place_K] + turn_K]
        bits = None if known is None else known.negatives
        return place_K, choice_K, *self._further(texts, bits, row_N[place_K], choice_K)

    def count_negatives(self, row_N: np.ndarray | None) -> np.ndarray:
        """Hard negatives that each of these rows (None: all) may be used with."""
        rows = np.arange(len(self._source.index)) if row_N is None else row_N
        return self._usable(self._source.index.negative_tokens, rows)[1]

    def _usable(self, texts: Ragged, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of each record's texts may be used, record by record, and how many of each."""
        choice_M = within(texts.counts(row_N))
        place_M, tokens_M = texts.take(row_N)
        tokens_M = tokens_M.astype(np.int64) + self._passage_extra
        used_M = tokens_M >= self._least
        if self._recipe.data.too_long == "drop":
            used_M &= tokens_M <= self._limit
        return choice_M[used_M], np.bincount(place_M[used_M], minlength=len(row_N))

    def _further(
        self, texts: Ragged, bits: Ragged | None, row_N: np.ndarray, choice_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """|X|, after cutting, and |Z| of one of the texts of each record."""
        tokens_N = texts.values[texts.offsets[row_N] + choice_N]
        bits_N = None if bits is None else bits.values[bits.offsets[row_N] + choice_N]
        return self._both(tokens_N, bits_N, self._passage_extra)

    def tokens(self, row_N: np.ndarray, pass_N: np.ndarray) -> int:
        """Tokens of all texts of these records, each in its pass: query, passage and hard negatives, with their Z."""
        parts = [*self.query(row_N), *self.positive(row_N, pass_N)[:2]]
        if self._recipe.contrastive.hard_negatives:
            parts += self.negatives(row_N, pass_N)[2:]
        return sum(int(part.sum()) for part in parts)

    def usable(self) -> tuple[np.ndarray | None, list[TooLong]]:
        """Rows that are used (None: all) and the texts that exceed the limit.

        Raises:
            UserError: no row is left.
        """
        index, action = self._source.index, self._recipe.data.too_long
        query_N = index.question_tokens.astype(np.int64) + self._query_extra
        passage_N = index.answer_tokens.astype(np.int64) + self._passage_extra
        limits = [("query", query_N, self._limit), ("passage", passage_N, self._limit)]
        empty_N = (query_N < self._least) | (passage_N < self._least)
        kept_N, too_long = keep(self._source.name, action, limits, empty_N)
        others = {"negative": index.negative_tokens} if self._recipe.contrastive.hard_negatives else {}
        if self._draws is not None and index.positive_tokens is not None:
            others["further positive"] = index.positive_tokens
        for part, ragged in others.items():
            tokens_M = ragged.values.astype(np.int64) + self._passage_extra
            long = int((tokens_M > self._limit).sum())
            if long:
                too_long.append(TooLong(self._source.name, part, self._limit, action, long, int(tokens_M.max())))
            empty = int((tokens_M < self._least).sum())
            if empty:
                too_long.append(TooLong(self._source.name, part, 0, "drop", empty, 0))
        return kept_N, too_long


def keep(
    name: str, action: str, limits: Sequence[tuple[str, np.ndarray, int]], empty_N: np.ndarray
) -> tuple[np.ndarray | None, list[TooLong]]:
    """Apply the limits of one set.

    Args:
        name: the set, for messages.
        action: "cut" or "drop".
        limits: (part, tokens_N, most tokens allowed).
        empty_N: samples with nothing to read or to predict: always dropped.

    Returns:
        Rows kept (None: all) and what was counted.

    Raises:
        UserError: no row is left.
    """
    drop_N = empty_N.copy()
    too_long = []
    for part, tokens_N, limit in limits:
        long_N = tokens_N > limit
        if long_N.any():
            too_long.append(TooLong(name, part, limit, action, int(long_N.sum()), int(tokens_N.max())))
        if action == "drop":
            drop_N |= long_N
    if empty_N.any():
        too_long.append(TooLong(name, "text", 0, "drop", int(empty_N.sum()), 0))
    if drop_N.all():
        why = "; ".join(map(str, too_long)) or "the split is empty"
        raise UserError(f"{name}: no sample is left ({why}): raise data.max_x_tokens or data.max_y_tokens, or add data")
    return (np.flatnonzero(~drop_N) if drop_N.any() else None), too_long


def _lacks(*columns_N: np.ndarray) -> bool:
    return any(bool((column < 0).any()) for column in columns_N)
