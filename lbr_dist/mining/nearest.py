"""The passages nearest to a query: every one compared (exact), a part of the lists (IVF), or by words (BM25).

Vectors stay on disk and pass through memory in tiles, so memory does not grow with the set. Exact search costs
queries x passages x D products, which two cores do for a hundred thousand of each in minutes; from `EXACT_SCORES` on
the passages are sorted into lists by k-means first, and a query looks only into the nearest lists (faiss, Douze et al.
2024; inverted lists on disk).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from lbr_dist.disk import file_xxh128, replacing, sync
from lbr_dist.inference import search
from lbr_dist.inference.search import ordered, top_k

if TYPE_CHECKING:
    from lbr_dist.inference.bm25 import BM25

Kind = Literal["exact", "ivf"]

EXACT_SCORES = 40_000_000_000
"""Query-passage pairs (200,000 of each) up to which `auto` compares all."""
LISTS = 4.0
"""Inverted lists, as a multiple of the square root of the number of passages;"""
LEAST_POINTS, TRAINING_POINTS = 39, 64
"""passages per list at least (faiss's own warning level), and those that k-means sees."""
PROBED = 1 / 16
"""Share of the lists that a query looks into, at least `LEAST_PROBED`."""
LEAST_PROBED = 8
SEED = 1234
INDEX, INVERTED = "ivf.index", "lists"
"""Files of an index: the centres, and the passages in lists;"""
CHECKSUMS = "checksums.json"
"""theirs, which come last and say that it is finished."""


class Nearest(Protocol):
    """A search over all passages."""

    def search(self, query_B: np.ndarray, own_B: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Passages and scores [B, k], best first (-1 where fewer are found), and the score of each query's own answer.

        Args:
            query_B: numbers of the queries.
            own_B: passage that is each query's own answer.
        """
        ...


def kind_for(choice: str, queries: int, passages: int) -> Kind:
    """`auto` decided by size."""
    if choice == "auto":
        return "exact" if queries * passages <= EXACT_SCORES else "ivf"
    return "ivf" if choice == "ivf" else "exact"


class Exact:
    """Every passage is compared: `top_k`."""

    def __init__(self, queries_QD: np.ndarray, passages_PD: np.ndarray) -> None:
        """Both may be memory maps."""
        self._queries_QD, self._passages_PD = queries_QD, passages_PD

    def search(self, query_B: np.ndarray, own_B: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Nearest`."""
        queries_BD = self._queries_QD[query_B]
        return *top_k(queries_BD, self._passages_PD, k), _own(queries_BD, self._passages_PD, own_B)


class Inverted:
    """Passages in lists around k-means centres; a query looks into `PROBED` of them."""

    def __init__(self, queries_QD: np.ndarray, passages_PD: np.ndarray, folder: Path) -> None:
        """Build the index in `folder`, or take the one that an earlier attempt finished there."""
        import faiss

        self._queries_QD, self._passages_PD = queries_QD, passages_PD
        if not _is_built(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _build(passages_PD, folder)
        self._index = cast(Any, faiss.read_index(str(folder / INDEX)))
        self._index.nprobe = min(self._index.nlist, max(LEAST_PROBED, round(PROBED * self._index.nlist)))

    def search(self, query_B: np.ndarray, own_B: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Nearest`."""
        queries_BD = np.ascontiguousarray(self._queries_QD[query_B])
        scores_BK, rows_BK = self._index.search(queries_BD, k)
        return *ordered(rows_BK, scores_BK), _own(queries_BD, self._passages_PD, own_B)


class Lexical:
    """BM25; the index of words is in memory."""

    def __init__(self, index: BM25, question: Callable[[int], str]) -> None:
        """`question`: text of a query by number."""
        self._index, self._question = index, question

    def search(self, query_B: np.ndarray, own_B: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Nearest`; a passage without a word of the query is not found."""
        from lbr_dist.inference.bm25 import best

        rows_BK = np.full((len(query_B), k), -1, np.int64)
        scores_BK = np.zeros((len(query_B), k), np.float32)
        positive_B = np.zeros(len(query_B), np.float32)
        for number, (query, own) in enumerate(zip(query_B.tolist(), own_B.tolist(), strict=True)):
            scores_P = self._index.scores(self._question(query))
            order_K = best(scores_P, min(k, len(scores_P)))
            order_K = order_K[scores_P[order_K] > 0]
            rows_BK[number, : len(order_K)] = order_K
            scores_BK[number, : len(order_K)] = scores_P[order_K]
            positive_B[number] = scores_P[own]
        return rows_BK, scores_BK, positive_B


def _is_built(folder: Path) -> bool:
    """Whether an index is there as it was built; faiss maps the lists: where they are short, the process ends."""
    try:
        known = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return known == {name: file_xxh128(folder / name) for name in (INDEX, INVERTED)}
    except (OSError, ValueError):
        return False


def _build(passages_PD: np.ndarray, folder: Path) -> None:
    """Train on an even sample, add tile by tile to indexes on disk, and merge their lists into one file."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    count, width = passages_PD.shape
    lists = max(1, min(round(LISTS * count**0.5), count // LEAST_POINTS))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = SEED
    sample_S = np.linspace(0, count - 1, min(count, TRAINING_POINTS * lists)).astype(np.int64)
    index.train(np.ascontiguousarray(passages_PD[sample_S]))
    trained = folder / "trained.index"
    faiss.write_index(index, str(trained))
    tile, files = max(1, search.TILE_BYTES // (4 * width)), []
    for start in range(0, count, tile):
        block = faiss.read_index(str(trained))
        rows_TD = np.ascontiguousarray(passages_PD[start : start + tile])
        block.add_with_ids(rows_TD, np.arange(start, start + len(rows_TD)))
        files.append(str(folder / f"block-{start}.index"))
        faiss.write_index(block, files[-1])
    merge_ondisk(index, files, str(folder / INVERTED))
    faiss.write_index(index, str(folder / INDEX))
    for name in (INDEX, INVERTED):
        sync(folder / name)
    with replacing(folder / CHECKSUMS) as temporary:
        checksums = {name: file_xxh128(folder / name) for name in (INDEX, INVERTED)}
        temporary.write_text(json.dumps(checksums), encoding="utf-8")
    for file in files:
        Path(file).unlink()


def _own(queries_BD: np.ndarray, passages_PD: np.ndarray, own_B: np.ndarray) -> np.ndarray:
    return np.einsum("bd,bd->b", queries_BD, passages_PD[own_B])
