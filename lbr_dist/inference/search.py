"""`lbr search`: look at results by eye. The corpus is embedded once and kept, the queries are embedded every time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lbr_dist.data.progress import bar
from lbr_dist.data.remote import is_url
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shard_writer import SPLITS
from lbr_dist.data.shards import open_set
from lbr_dist.data.sources.row_values import REASONS, RowError, text
from lbr_dist.disk import cache_folder
from lbr_dist.errors import UserError
from lbr_dist.inference.rows import read_texts
from lbr_dist.inference.text_blocks import BLOCK_TEXTS, grouped
from lbr_dist.inference.vector_file import read_vectors, write_vectors

if TYPE_CHECKING:
    from lbr_dist.inference.encoder import Encoder

log = logging.getLogger("lbr")

TILE_BYTES = 64 << 20
"""Passage vectors in memory at a time."""
LEFT_S = 24 * 3600
"""Seconds after which nobody writes a half-written file of the cache any more: the process was killed."""


@dataclass(frozen=True)
class Hit:
    """One result."""

    score: float
    """Cosine."""
    id: str
    text: str


def search(
    model: str,
    corpus: str | Path,
    queries: Sequence[str],
    *,
    k: int = 5,
    field: str | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> list[list[Hit]]:
    """The best passages of each query.

    Args:
        model: as in `lbr_dist.inference.loading.load_encoder`, or `bm25`.
        corpus: a prepared set (its answers and texts, every split), or a file as `lbr encode` takes.
        queries: what to look for.
        k: results per query; fewer where the corpus has fewer.
        field: of a file: field that holds the text; default: as `lbr encode` has it for passages.
        device: default: CUDA where there is one.
        cache_dir: where vectors of corpora are kept; default: `lbr_dist/search` in the user's cache folder.
        progress: bars on a terminal.

    Returns:
        For each query its hits, best first; passages with equal texts are one. BM25 finds those that share a word with
        the query.

    Raises:
        UserError: the model or the corpus cannot be read, or a query or the corpus is empty.
    """
    for query in queries:
        try:
            text(query, "the query", sys.maxsize)
        except RowError as error:
            raise UserError(f"query {query!r}: {REASONS[error.reason]}") from None
    ids, texts = load_corpus(corpus, field)
    if model == "bm25":
        from lbr_dist.inference.bm25 import BM25

        rows_QK, scores_QK = BM25(texts).search(queries, k)
    else:
        from lbr_dist.inference.encoder import check_finite
        from lbr_dist.inference.loading import load_encoder, model_fingerprint, pinned

        model = pinned(model)
        encoder = load_encoder(model, device)
        folder = Path(cache_dir) if cache_dir is not None else cache_folder("search")
        passages_PD = _embedded(encoder, model_fingerprint(model), texts, folder, progress)
        queries_QD = encoder.encode(list(queries), "query")
        check_finite(queries_QD, queries, model)
        rows_QK, scores_QK = top_k(queries_QD, passages_PD, k)
    return [
        [
            Hit(float(score), ids[row], texts[row])
            for row, score in zip(rows_K, scores_K, strict=True)
            if model != "bm25" or score > 0
        ]
        for rows_K, scores_K in zip(rows_QK, scores_QK, strict=True)
    ]


def load_corpus(corpus: str | Path, field: str | None = None) -> tuple[list[str], list[str]]:
    """Ids and texts of a corpus, each text once.

    Raises:
        UserError: it is no prepared set and no file of texts, or has none; or a prepared set, and `field` is given.
    """
    path, remote = Path(corpus), is_url(str(corpus))
    if not remote and not path.exists():
        raise UserError(f"corpus {corpus}: no such file or prepared set")
    if not remote and path.is_file():
        pairs = list(read_texts(path, "passage", field))
    else:
        opened = open_set(corpus)
        if field is not None:
            raise UserError(f"--field {field}: {corpus} is a prepared set, which has no fields to name; leave it out")
        pairs = []
        for split in SPLITS:
            if opened.splits[split].records:
                reader = ShardReader(opened, split)
                records = reader.read(range(len(reader.index)))
                pairs += [(r["id"], r["text"] if "text" in r else r["answer"]) for r in records]
                reader.close()
    unique: dict[str, str] = {}
    for name, passage in pairs:
        unique.setdefault(passage, name)
    if not unique:
        raise UserError(f"corpus {corpus}: has no texts")
    return list(unique.values()), list(unique)


def top_k(queries_QD: np.ndarray, passages_PD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the largest inner products, best first: int64 and float32 [queries, k].

    Every passage is compared, tile by tile; they may be a memory map. Equal scores come in the order of the rows, but
    of those that share the last places any may be left out.
    """
    import faiss

    k, queries_QD = min(k, len(passages_PD)), np.ascontiguousarray(queries_QD)
    scores_QK, rows_QK = np.zeros((len(queries_QD), 0), np.float32), np.zeros((len(queries_QD), 0), np.int64)
    tile = max(1, TILE_BYTES // (4 * passages_PD.shape[1]))
    for start in range(0, len(passages_PD), tile):
        tile_TD = np.ascontiguousarray(passages_PD[start : start + tile])
        found = faiss.knn(queries_QD, tile_TD, min(k, len(tile_TD)), metric=faiss.METRIC_INNER_PRODUCT)
        scores_QM = np.concatenate([scores_QK, found[0]], 1)
        rows_QM = np.concatenate([rows_QK, found[1] + start], 1)
        rows_QK, scores_QK = (part[:, :k] for part in ordered(rows_QM, scores_QM))
    return rows_QK, scores_QK


def ordered(rows_QM: np.ndarray, scores_QM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores, best first; equal scores by row, nothing found (row -1) last."""
    scores_QM = np.where(rows_QM < 0, -np.inf, scores_QM)
    order_QM = np.lexsort((rows_QM, -scores_QM), axis=1)
    return np.take_along_axis(rows_QM, order_QM, 1), np.take_along_axis(scores_QM, order_QM, 1)


def print_hits(queries: Sequence[str], results: Sequence[Sequence[Hit]]) -> None:
    """Show results: a heading per query, then score, id and text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for query, hits in zip(queries, results, strict=True):
        table = Table(title=Text(query, style="bold"), title_justify="left", box=None, pad_edge=False)
        table.add_column("score", justify="right", style="cyan")
        table.add_column("id", style="dim", overflow="fold")
        table.add_column("text", overflow="fold")
        for hit in hits:
            table.add_row(f"{hit.score:.3f}", Text(hit.id), Text(" ".join(hit.text.split())[:500]))
        console.print(table)
        console.print("" if hits else "nothing found\n")


def _embedded(encoder: Encoder, model: str, texts: list[str], folder: Path, progress: bool) -> np.ndarray:
    """Vectors of the corpus, from the cache where this model has embedded these texts before.

    The cache is there for speed: one that is damaged or cannot be written costs the time, not the answer.
    """
    digest = xxhash.xxh3_128(model.encode())
    for passage in texts:
        data = passage.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    file = folder / f"{digest.hexdigest()}.npy"
    known_PD = read_vectors(file, len(texts))
    if known_PD is not None:
        return known_PD
    passages_PD = _in_blocks(encoder, texts, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".tmp-*.npy"):
            if time.time() - left.stat().st_mtime > LEFT_S:
                left.unlink(missing_ok=True)
        write_vectors(file, passages_PD.shape, [passages_PD])
    except OSError as error:
        log.warning("%s: the vectors of the corpus are not kept (%s)", folder, error.strerror)
    return passages_PD


def _in_blocks(encoder: Encoder, texts: list[str], progress: bool) -> np.ndarray:
    """Vectors of texts that are tokenized a block at a time, under one bar."""
    from lbr_dist.inference.encoder import check_finite

    blocks = list(grouped(texts, len, BLOCK_TEXTS))
    several = len(blocks) > 1
    pieces = []
    with bar(encoder.name, len(texts), progress and several) as advance:
        for block in blocks:
            pieces.append(encoder.encode(block, "passage", progress and not several))
            check_finite(pieces[-1], block, encoder.name)
            advance(len(block))
    return np.concatenate(pieces)
