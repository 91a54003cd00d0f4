"""InfoNCE over the negatives of every rank (paper section 3.3), exact at every world size.

For query i with its positive passage, over the passages of the global batch (positives of all pairs, then hard
negatives), with cosine scores s and temperature tau:

    L_i = -log( exp(s_ii / tau) / (exp(s_ii / tau) + sum_{j in N(i)} exp(s_ij / tau)) )

N(i) leaves out passages that are known, or suspected, to answer query i too. The value returned is the mean of L_i over
the global batch, the same on every rank; its gradient carries the factor `world`, so that after DeepSpeed has
*averaged* the ranks' parameter gradients the result is that of one process on the whole batch. docs/contrastive.md
derives it. The arithmetic is in strips.py, the kinds of negatives in negatives.py, the communication in gather.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lbr_dist.objectives.gather import Ranks, gather_rows
from lbr_dist.objectives.negatives import NO_KEY, Keys
from lbr_dist.objectives.strips import RULES, SUMS, TERMS, StripLoss, Strips

__all__ = ["NO_KEY", "DegenerateEmbeddingError", "info_nce"]

_ZERO = 1e-12  # below this norm a direction is noise (the eps of torch.nn.functional.normalize)
_NO_PASSAGE_KEY = NO_KEY + 1  # so that an absent key of a query never equals an absent key of a passage


class DegenerateEmbeddingError(RuntimeError):
    """An embedding is zero or not finite; raised on every rank alike, naming the samples.

    Attributes:
        every: it holds for all embeddings of the global batch.
    """

    def __init__(self, found: str, *, every: bool) -> None:
        super().__init__(found)
        self.every = every


def info_nce(
    query_QD: Tensor,
    positive_QD: Tensor,
    *,
    negatives_ND: Tensor | None = None,
    negative_owner_N: Tensor | None = None,
    question_Q: Tensor | None = None,
    answer_Q: Tensor | None = None,
    negative_answer_N: Tensor | None = None,
    known_QK: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    margin: float | None = None,
    two_way: bool = False,
    query_query: bool = False,
    passage_passage: bool = False,
    dims: Sequence[tuple[int, float]] | None = None,
    tile: int = 4096,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Contrastive loss of the global batch, and its statistics.

    Args:
        query_QD: embeddings of this rank's queries, not normalised; Q may differ from rank to rank and may be 0.
        positive_QD: embedding of each query's positive passage.
        negatives_ND: this rank's hard negatives, any number; every query of the global batch sees them.
        negative_owner_N: row of the query that a hard negative was mined for (names it in errors).
        question_Q: int64 hash of each query's normalised text; pairs that ask the same are no negatives of each other.
        answer_Q: int64 hash of each positive passage's normalised text; the same text is no negative.
        negative_answer_N: the same for the hard negatives.
        known_QK: hashes of further texts known to answer the query, padded with `NO_KEY`; K may differ by rank. Needs
            `answer_Q`.
        temperature: tau > 0, on cosine scores; a scalar tensor that needs a gradient gets the whole one on every rank
            (and not a share, so that the ranks' average is right).
        margin: leave out negatives whose cosine is above the positive's plus `margin`; None: keep them.
        two_way: the mean of this loss and its mirror (positive passage over all queries; hard negatives ask nothing).
            A pair left out in one direction is left out in the other.
        query_query: the other queries of the global batch are negatives of a query too.
        passage_passage: all other passages are negatives of a pair's positive, in the same softmax (with `two_way`,
            both extra terms are in both directions). The rules above hold for them as well.
        dims: (dimensions, weight) pairs: the weighted mean of the losses of the embeddings cut to their first
            dimensions and normalised again (Kusupati et al. 2022); None: the whole embeddings.
        tile: scores held at a time: tile * tile, in float32. Up to that size the score matrix is computed whole.
        names: one name per query, used in errors.

    Which of the optional rules are in force, and whether gradients are wanted, must be the same on all ranks; then all
    make the same collective calls, forward and backward, however many rows each holds.

    Returns:
        The loss (float32 scalar, or float64 for float64 inputs; the global mean on every rank) and global statistics:
        `loss`, `accuracy` (share of queries whose positive scores above all their negative passages), `positive_score`
        and `negative_score` (mean cosines of query and passage), `effective_negatives` (mean number per query after
        masking, extra terms included), `queries_without_negatives` (they contribute a loss and a gradient of 0 to the
        mean of the query direction), `masked_share` (of all pairs of a row with a column not its own), and
        `masked_same_question`, `masked_same_answer`, `masked_known_positive`, `masked_margin` (shares; a pair counts
        under the first rule that applies). Where gradients are wanted, `gradient_norm_TERM` of each term in force: the
        norm of its gradient at the rows' embeddings (queries; for passage_passage the positives) over the global batch.
        With `dims` the figures are those of the largest, beside `loss_D`, `accuracy_D` and `gradient_norm_D` of each.

    Raises:
        ValueError: no query on any rank, shapes that do not fit, or temperature <= 0.
        DegenerateEmbeddingError: a zero or non-finite embedding (or smallest part of it in `dims`) on any rank.
    """
    tau = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    _check_arguments(query_QD, positive_QD, tau, tile, dims)
    if known_QK is not None and answer_Q is None:
        raise ValueError("info_nce: known_QK needs answer_Q beside it")
    ranks = Ranks.of()
    dtype = torch.float64 if query_QD.dtype == torch.float64 else torch.float32
    own = [positive_QD] if negatives_ND is None else [positive_QD, negatives_ND]
    query, passage = query_QD.to(dtype), torch.cat(own).to(dtype) if len(own) > 1 else positive_QD.to(dtype)
    bad = _degenerate(query, passage, min(dim for dim, _ in dims) if dims else query.shape[1])
    known = [answer_Q[:, None]] if answer_Q is not None else []
    known += [known_QK] if known_QK is not None else []
    width = sum(part.shape[1] for part in known)
    table = ranks.table([len(query), len(passage), width, len(bad)], query.device)
    if any(row[3] for row in table):
        named = [_name(*at, len(query), names, negative_owner_N) for at in bad]
        _raise_degenerate(named, ranks, sum(row[0] + row[1] for row in table))
    queries, counts = [row[0] for row in table], [row[1] for row in table]
    if sum(queries) == 0:
        raise ValueError("info_nce: no query on any rank")

    keys = None
    if question_Q is not None or known:
        keys = _keys(question_Q, known, negative_answer_N, query, counts, max(row[2] for row in table), ranks)
    starts = [sum(counts[:rank]) for rank in range(ranks.world)]
    settings = Strips(
        own_Q=starts[ranks.rank] + torch.arange(len(query), device=query.device),
        columns=torch.cat([start + torch.arange(q) for start, q in zip(starts, queries, strict=True)]).to(query.device),
        queries=sum(queries),
        temperature=tau,
        margin=margin,
        two_way=two_way,
        tile=tile,
        keys=keys,
        ranks=ranks,
        differentiable=torch.is_grad_enabled() and (query.requires_grad or passage.requires_grad),
        passage_passage=passage_passage,
    )
    rows = (query, gather_rows(passage, counts, ranks), gather_rows(query, queries, ranks) if query_query else None)
    learned = temperature if isinstance(temperature, Tensor) and settings.differentiable else None
    if dims is None:
        loss, sums = StripLoss.apply(*rows, learned, settings)
        return loss, _statistics(loss, sums, settings, sum(counts), query_query)
    return _nested(rows, learned, settings, dims, sum(counts))


def _nested(
    rows: tuple[Tensor, Tensor, Tensor | None],
    temperature: Tensor | None,
    settings: Strips,
    dims: Sequence[tuple[int, float]],
    passages: int,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted mean over embeddings of several sizes; passages and queries travelled once, at full width."""
    total, whole = sum(weight for _, weight in dims), torch.zeros((), dtype=rows[0].dtype, device=rows[0].device)
    figures: dict[str, float] = {}
    for dim, weight in sorted(dims):
        cut = [None if part is None else part[:, :dim] for part in rows]
        strips = replace(settings, sums=dict.fromkeys(SUMS, 0.0))
        loss, sums = StripLoss.apply(*cut, temperature, strips)
        whole = whole + loss * (weight / total)
        found = _statistics(loss, sums, strips, passages, cut[2] is not None)
        norms = [value for name, value in found.items() if name.startswith("gradient_norm")]
        figures |= found | {f"{name}_{dim}": found[name] for name in ("loss", "accuracy")}
        if norms:
            figures[f"gradient_norm_{dim}"] = math.hypot(*norms) * weight / total
    return whole, figures | {"loss": float(whole.detach())}


def _check_arguments(
    query: Tensor, positive: Tensor, temperature: float, tile: int, dims: Sequence[tuple[int, float]] | None
) -> None:
    if query.shape != positive.shape or query.dim() != 2:
        raise ValueError(f"info_nce: {tuple(query.shape)} queries do not pair with {tuple(positive.shape)} positives")
    if temperature <= 0 or tile <= 0:
        raise ValueError(f"info_nce: temperature ({temperature}) and tile ({tile}) must be above 0")
    for dim, weight in dims or ():
        if not (0 < dim <= query.shape[1] and weight > 0):
            raise ValueError(f"info_nce: dims: {dim} (weight {weight}) of embeddings that have {query.shape[1]}")


def _keys(
    question_Q: Tensor | None,
    known: list[Tensor],
    negative_answer_N: Tensor | None,
    query: Tensor,
    counts: list[int],
    width: int,
    ranks: Ranks,
) -> Keys:
    """Gather the passages' keys; absent ones (no rule, no hash, a hard negative's question) match nothing."""
    rows, passages = len(query), counts[ranks.rank]
    own = torch.full((passages, 2), _NO_PASSAGE_KEY, dtype=torch.int64, device=query.device)
    if question_Q is not None:
        own[:rows, 0] = question_Q
    known_QK = torch.full((rows, width), NO_KEY, dtype=torch.int64, device=query.device)
    if known:
        filled = torch.cat(known, dim=1)
        known_QK[:, : filled.shape[1]] = filled
        own[:rows, 1] = filled[:, 0]
    if negative_answer_N is not None:
        own[rows:, 1] = negative_answer_N
    own[own == NO_KEY] = _NO_PASSAGE_KEY
    gathered = gather_rows(own, counts, ranks)
    return Keys(question_Q, gathered[:, 0].contiguous(), known_QK, gathered[:, 1].contiguous())


def _degenerate(query: Tensor, passage: Tensor, dim: int) -> list[tuple[str, int]]:
    """(side, row) of each embedding that is not finite, or whose first `dim` numbers have a norm of 0."""
    found = []
    for side, rows in (("query", query), ("passage", passage)):
        norm = torch.linalg.vector_norm(rows.detach()[:, :dim], dim=1)
        whole = norm if dim == rows.shape[1] else torch.linalg.vector_norm(rows.detach(), dim=1)
        bad = ~(torch.isfinite(whole) & (norm > _ZERO))
        found += [(side, int(row)) for row in bad.nonzero()[:, 0]]
    return found


def _raise_degenerate(mine: list[str], ranks: Ranks, rows: int) -> None:
    """Tell every rank about every bad row, of `rows` on all ranks, and raise the same error everywhere."""
    if ranks.world > 1:
        mine = [f"{name} (rank {ranks.rank})" for name in mine]
    parts: list[list[str]] = [mine]
    if ranks.world > 1:
        parts = [[] for _ in range(ranks.world)]
        dist.all_gather_object(parts, mine)
    found = [name for part in parts for name in part]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise DegenerateEmbeddingError(
        f"{len(found)} embeddings are zero or not finite: {', '.join(found[:8])}{more}", every=len(found) == rows
    )


def _name(side: str, row: int, queries: int, names: Sequence[str] | None, owner: Tensor | None) -> str:
    negative = side == "passage" and row >= queries
    kind = "hard negative" if negative else "positive" if side == "passage" else "query"
    pair = row if not negative else int(owner[row - queries]) if owner is not None else None
    if pair is None:
        return f"hard negative {row - queries}"
    return f"{kind} of sample {names[pair] if names is not None else pair}"


def _statistics(loss: Tensor, sums: Tensor, strips: Strips, passages: int, query_query: bool) -> dict[str, float]:
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    queries = strips.queries
    columns = (passages - 1) * (1 + strips.passage_passage) + (queries - 1) * query_query
    masked = {name: values[name] / max(1, queries * columns) for name in RULES}
    in_force = [TERMS[0], *[TERMS[1]] * query_query, *[TERMS[2]] * strips.passage_passage]
    norms = {f"gradient_norm_{term}": math.sqrt(values[f"squares_{term}"]) for term in in_force}
    return {
        "loss": float(loss.detach()),
        "accuracy": values["correct"] / queries,
        "positive_score": values["positive"] / queries,
        "negative_score": values["negative"] / max(1.0, values["scored"]),
        "effective_negatives": values["negatives"] / queries,
        "queries_without_negatives": values["alone"],
        "masked_share": sum(masked.values()),
        **{f"masked_{name}": share for name, share in masked.items()},
        **(norms if strips.differentiable else {}),
    }
