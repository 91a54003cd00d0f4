"""Retrieval scores, computed by mteb itself: on the held-out split, on benchmarks of the user's own, on mteb's by name.

mteb owns the metrics, so the numbers mean what everybody else's mean; we only hand it the texts and the vectors. It is
imported inside functions (seconds, because it loads every task it knows) and need not touch the network: our tasks
carry their data, and named tasks come from the local datasets cache when HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lbr_dist.data.sources import beir
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.disk import home
from lbr_dist.errors import UserError, one_line
from lbr_dist.evaluation.held_out import HeldOut, load_benchmark
from lbr_dist.inference.bm25 import BM25
from lbr_dist.inference.encoder import Encoder, Side, check_finite
from lbr_dist.inference.text_blocks import BLOCK_TEXTS, grouped

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

K_VALUES = (1, 3, 5, 10, 20, 100)
"""Cut-offs of the held-out task; the last is how many passages mteb ranks per query. Where queries are documents it has
mteb's own, which go further: of what was ranked mteb then takes the query itself out."""


def import_mteb() -> ModuleType:
    """mteb, which makes the folder of a cache, that we do not use, when it is first imported: a home folder that is
    full, read-only or absent must not end an evaluation."""
    if "MTEB_CACHE" not in os.environ:
        try:
            (home() / ".cache" / "mteb").mkdir(parents=True, exist_ok=True)
        except OSError:
            os.environ["MTEB_CACHE"] = str(Path(tempfile.gettempdir()) / f"mteb-{os.getuid()}")
    import mteb

    return mteb


def retrieval_scores(model: MtebEncoder | BM25Search, task: AbsTask) -> dict[str, float]:
    """Run mteb on one task (of retrieval, or of any kind that embeddings suffice for).

    Returns:
        mteb's scores as it names them (`ndcg_at_10`, `recall_at_10`, `mrr_at_10`, `map_at_10` ...), `main_score` among
        them; means over the subsets and splits where a task has several. What is not a finite number is left out.

    Raises:
        UserError: the task's data cannot be had (offline, not in the cache), or the model cannot run this kind of task.
    """
    import datasets

    mteb = import_mteb()
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # over a step of milliseconds
    try:
        result = mteb.evaluate(model, task, co2_tracker=False, cache=None, show_progress_bar=False)
    except (OSError, TypeError) as error:
        raise _cannot_run(task, error) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    rows = [row for split in result.task_results[0].scores.values() for row in split]
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return {name: mean for name, mean in means.items() if np.isfinite(mean)}


def named_task(name: str) -> AbsTask:
    """A task that mteb knows, or a folder's.

    Raises:
        UserError: mteb knows none of that name; or as `benchmark_task`.
    """
    if any(Path(folder).is_dir() for folder in (name, name.rpartition("@")[0] or name)):
        return benchmark_task(name)
    try:
        return import_mteb().get_task(name)
    except KeyError as error:
        reason = one_line(error.args[0] if error.args else error)
        raise UserError(f"--task {name}: mteb has no such task ({reason})") from None


def check_data(task: AbsTask) -> None:
    """Load a named task's data, and let go of it: what is not there is known before a model runs.

    Raises:
        UserError: it cannot be had.
    """
    for part in _parts(task):
        try:
            part.load_data()
        except UserError:
            raise
        except Exception as error:  # a data set that is half in the cache fails in many ways
            raise _cannot_run(part, error) from error
        part.unload_data()


def is_retrieval(task: AbsTask) -> bool:
    """Whether it ranks a corpus for queries, which is all that BM25 can do."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    return all(isinstance(part, AbsTaskRetrieval) for part in _parts(task))


def _parts(task: AbsTask) -> list[AbsTask]:
    """The tasks that have data: those of an aggregate (as CQADupstackRetrieval is one), else the task."""
    return list(task.tasks) if task.is_aggregate else [task]  # type: ignore[attr-defined]


def _cannot_run(task: AbsTask, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(
        f"mteb task {task.metadata.name}: cannot be run ({reason}); download its data set "
        f"{task.metadata.dataset['path']} once while online, or leave the task out"
    )


def held_out_task(data: HeldOut) -> AbsTask:
    """The held-out split as an mteb retrieval task, data included."""
    return _retrieval_task(f"HeldOut-{data.name}", lambda: data, () if data.itself else K_VALUES)


def benchmark_task(path: str) -> AbsTask:
    """A folder in the layout of BEIR (`FOLDER`, or `FOLDER@SPLIT`) as an mteb retrieval task.

    Raises:
        UserError: it is another folder, or has no such split; when its data is loaded, what `load_benchmark` says.
    """
    if beir.find_beir(path) is None:
        raise UserError(
            f"--task {path}: neither a task of mteb nor a benchmark in the layout of BEIR (a folder with corpus.jsonl, "
            "queries.jsonl and qrels/SPLIT.tsv); a prepared set goes to --data"
        )
    [part] = expand(Source(path), Path())
    return _retrieval_task(part.base, lambda: load_benchmark(path))


def _retrieval_task(name: str, load: Callable[[], HeldOut], k_values: tuple[int, ...] = ()) -> AbsTask:
    """An mteb task of what `load` gives; without `k_values` it has mteb's."""
    import_mteb()
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Retrieval(AbsTaskRetrieval):
        ignore_identical_ids = True
        metadata = TaskMetadata(
            name=name,
            description="Questions, and the corpus that they are asked of.",
            dataset={"path": name, "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *_: Any, **__: Any) -> None:
            if not self.data_loaded:
                self.dataset = {"default": {"test": _as_mteb(load())}}
                self.data_loaded = True

    if k_values:
        Retrieval.k_values = k_values
    return Retrieval()


def _as_mteb(data: HeldOut) -> Any:
    """Queries, corpus and grades as mteb holds them; a query that is a document has the document's id."""
    from datasets import Dataset

    grades = data.grades or [[1] * len(rows) for rows in data.positives]
    passages = [f"p{row}" for row in range(len(data.passages))]
    queries = [passages[data.itself[i]] if i in data.itself else f"q{i}" for i in range(len(data.queries))]
    return {
        "queries": Dataset.from_dict({"id": queries, "text": list(data.queries)}),
        "corpus": Dataset.from_dict({"id": passages, "text": list(data.passages)}),
        "relevant_docs": {
            query: {passages[row]: grade for row, grade in zip(rows, of_query, strict=True)}
            for query, rows, of_query in zip(queries, data.positives, grades, strict=True)
        },
        "top_ranked": None,
    }


class MtebEncoder:
    """One of our encoders, as mteb's EncoderProtocol. Embeddings are unit vectors: similarity is the inner product."""

    def __init__(self, encoder: Encoder, keep: bool = False, progress: bool = False) -> None:
        """`keep`: remember the vectors of each side, in the order of the calls, in `vectors`."""
        self.encoder, self.keep, self.progress = encoder, keep, progress
        self.vectors: dict[Side, list[np.ndarray]] = {"query": [], "passage": []}

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside the scores."""
        return _meta(self.encoder.name)

    def encode(self, inputs: Iterable[dict[str, Any]], *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """float32 [texts, D]; queries get the query instruction, everything else the passage instruction.

        Raises:
            UserError: a vector is not finite.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        side: Side = "query" if prompt_type is not None and prompt_type.value == "query" else "passage"
        blocks = list(grouped(texts, len, BLOCK_TEXTS)) or [[]]  # their tokens take far more memory than they do
        vectors_ND = np.concatenate([self.encoder.encode(block, side, self.progress) for block in blocks])
        check_finite(vectors_ND, texts, self.encoder.name)
        if self.keep:
            self.vectors[side].append(vectors_ND)
        return vectors_ND

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """Cosine of all pairs."""
        return np.asarray(embeddings1) @ np.asarray(embeddings2).T

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """Cosine of row i with row i."""
        return (np.asarray(embeddings1) * np.asarray(embeddings2)).sum(1)


class BM25Search:
    """BM25 as mteb's SearchProtocol; it can run retrieval tasks only."""

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside the scores."""
        return _meta("bm25")

    def index(self, corpus: Any, **_: Any) -> None:
        """Index the passages (title and text)."""
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        self._ids = list(corpus["id"])
        self._bm25 = BM25([f"{title} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)])

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any) -> dict[str, dict[str, float]]:
        """Scores of the best passages of each query that share a word with it, or of all that the task names.

        A passage without a word of the query is not found. Filling up with such would credit the first of the corpus,
        which in a held-out set are the answers.
        """
        if top_ranked is not None:
            return self._named(queries, top_ranked)
        rows_QK, scores_QK = self._bm25.search(list(queries["text"]), top_k)
        return {
            query: {self._ids[row]: float(score) for row, score in zip(rows_K, scores_K, strict=True) if score > 0}
            for query, rows_K, scores_K in zip(queries["id"], rows_QK, scores_QK, strict=True)
        }

    def _named(self, queries: Any, top_ranked: Any) -> dict[str, dict[str, float]]:
        """Scores of the passages that the task names for each query."""
        row_of = {name: row for row, name in enumerate(self._ids)}
        results = {}
        for query, text in zip(queries["id"], queries["text"], strict=True):
            scores_P = self._bm25.scores(text)
            results[query] = {name: float(scores_P[row_of[name]]) for name in top_ranked[query]}
        return results


def _meta(name: str) -> Any:
    from mteb.models.model_meta import ModelMeta

    label = name.replace("/", "_")
    return ModelMeta.create_empty({"name": f"lbr/{label}", "revision": "local"})
