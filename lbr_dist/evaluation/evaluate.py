"""`lbr eval`: several models on one held-out set or benchmark, in one table.

Models are loaded one after the other, never together. A model's vectors of the held-out set are made once: mteb ranks
with them, and the separation ratio is computed from the same ones.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.disk import in_turn, replacing, usable_folder
from lbr_dist.errors import UserError, printable
from lbr_dist.evaluation.held_out import HeldOut, load_held_out
from lbr_dist.evaluation.table import read_evaluation

log = logging.getLogger("lbr")

FORMAT = 1
UNFINISHED = "eval.unfinished.json"
"""What was measured before a model failed; `lbr report` reads it."""
NO_WRONG_PASSAGE = "SR and AUC are left out: every passage answers every question, so there is no wrong one."


def evaluate(
    models: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str] = (),
    distractors: int = 0,
    generate: int = 100,
    hardest: int = 10,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate models and write `eval.json`, `eval.md` and `eval.png`.

    Args:
        models: specifications as in `lbr_dist.inference.loading.load_encoder`, or `bm25`.
        data: a prepared set; its eval split is used. Or a folder in the layout of BEIR, `FOLDER` or `FOLDER@SPLIT`.
        out: folder for the results; those of an earlier evaluation of the same data in it are replaced, of other data
            moved to a folder of their own in it.
        tasks: further mteb tasks by name, and folders in the layout of BEIR, evaluated on the same models.
        distractors: passages to add to the corpus from the training splits.
        generate: questions to answer, by models that lbr trained; 0: none.
        hardest: non-positives per query in the separation ratio.
        device: default: CUDA where there is one.
        progress: bars on a terminal.

    Returns:
        What `eval.json` holds: `data`, per model `name`, `model`, `checkpoint` (of a run: its name and digest),
        `retrieval` (mteb's scores), `separation`, `generation`, `settings` (of those two: `hardest`, and as `generate`
        how many questions were answered), `tasks`, `cut` (texts that were too long) and `seconds`, and `notes` where
        there is one.

    Raises:
        UserError: a number out of range, a model, a device, the set or a task that cannot be had, or an `out` that
            cannot be written. What can be checked without loading a model is checked first.
    """
    from lbr_dist.evaluation.retrieval import check_data, named_task
    from lbr_dist.inference.loading import check_spec
    from lbr_dist.model.plain import usable_device

    out = Path(out)
    for flag, number, least in (("hardest", hardest, 1), ("generate", generate, 0), ("distractors", distractors, 0)):
        if number < least:
            raise UserError(f"--{flag} {number}: expected at least {least}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; give a folder")
    held_out = load_held_out(data, distractors=distractors)
    further = _titled({name: named_task(name) for name in tasks})
    for spec in models:
        if spec != "bm25":
            check_spec(spec)
    for task in further.values():
        check_data(task)
    device = usable_device(device)
    usable_folder(out, f"--out {out}")
    checkpoints: dict[str, str] = {}
    results = _without_models(held_out)
    for spec in models:
        try:
            results["models"].append(
                _evaluate_one(spec, checkpoints, held_out, further, generate, hardest, device, progress)
            )
        except BaseException:
            if results["models"]:
                _keep_unfinished(results, out / UNFINISHED, spec)
            raise
    _keep(results, out)
    return results


def _without_models(data: HeldOut) -> dict[str, Any]:
    """Results that have no model yet."""
    results: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "queries": len(data.queries),
            "answers": data.answers,
            "passages": len(data.passages),
        },
        "models": [],
    }
    if all(len(rows) + (i in data.itself) == len(data.passages) for i, rows in enumerate(data.positives)):
        results["notes"] = [NO_WRONG_PASSAGE]
    return results


def default_out(models: Sequence[str]) -> Path:
    """Where results go unless the user says: `eval/` in the first model that is a run, else `eval/` here.

    Those of a checkpoint go to `eval/NAME` in its run: it is removed itself when there are newer ones.
    """
    from lbr_dist.inference.loading import is_run, split_dim

    for spec in models:
        path = Path(split_dim(spec)[0])
        if is_run(path):
            run = path.absolute().parent.parent
            return run / "eval" / path.name if path.absolute().parent.name == "checkpoints" else path / "eval"
    return Path("eval")


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write an evaluation as JSON, Markdown and PNG; the numbers first, which a failing picture must not cost."""
    from lbr_dist.evaluation.table import markdown_table, plot

    out.mkdir(parents=True, exist_ok=True)
    _write_json(results, out / "eval.json")
    with replacing(out / "eval.md") as file:
        file.write_text(markdown_table(results) + "\n", encoding="utf-8")
    with replacing(out / "eval.png") as file:
        plot(results, file)


def _set_aside(name: str, out: Path, data: Mapping[str, Any]) -> None:
    """Move the evaluation of other data, or of these over another corpus, from `out` to a folder of its own in it."""
    if not (out / name).exists():
        return
    try:
        known = read_evaluation(out / name, str(out / name))["data"]
    except UserError as error:
        aside = out / f"{name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
        (out / name).replace(aside)
        log.warning("%s; it is %s now", error, aside.name)
        return
    if all(known[key] == data[key] for key in ("fingerprint", "passages")):
        return
    readable = re.sub(r"[^\w@.-]", "_", known["name"])[:60]
    folder = out / f"{readable}-{known['fingerprint'][:8]}-{known['passages']}"
    folder.mkdir(exist_ok=True)
    for other in (name,) if name == UNFINISHED else (name, "eval.md", "eval.png"):
        with contextlib.suppress(FileNotFoundError):
            (out / other).replace(folder / other)
    log.warning("%s: was of other data (%s), and lies in %s now", out / name, known["name"], folder)


def _write_json(results: dict[str, Any], file: Path) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def _keep(results: dict[str, Any], out: Path) -> None:
    """Put the results where they belong, and what lies there of other data aside.

    Raises:
        UserError: they cannot be written there; it says where they are.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with in_turn(out):  # an evaluation on other data may end now too
            for name in ("eval.json", UNFINISHED):
                _set_aside(name, out, results["data"])
            write_results(results, out)
            (out / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; the results {_elsewhere(results, 'eval.json')}") from error


def _keep_unfinished(results: dict[str, Any], file: Path, failed: str) -> None:
    """Keep or show what was measured before a model failed; a full disk does not take the place of that failure."""
    try:
        with in_turn(file.parent):
            _set_aside(file.name, file.parent, results["data"])
            _write_json(results, file)
    except OSError as error:
        kept = _elsewhere(results, file.name)
        log.warning("%s: %s; results of the models before %s %s", file, error.strerror, failed, kept)
    else:
        log.warning("%s: holds the models that were measured before %s", file, failed)


def _elsewhere(results: dict[str, Any], name: str) -> str:
    """Save results in a temporary folder; returns where they lie, or, where that fails too, the results."""
    try:
        place = Path(tempfile.mkdtemp(prefix="lbr-eval-"))
        _write_json(results, place / name)
    except OSError:
        return f"are {json.dumps(results, ensure_ascii=False)}"
    return f"lie in {place}/{name}"


def _evaluate_one(
    spec: str,
    checkpoints: dict[str, str],
    data: HeldOut,
    tasks: dict[str, Any],
    generate: int,
    hardest: int,
    device: str | None,
    progress: bool,
) -> dict[str, Any]:
    from lbr_dist.evaluation.generation import generation_scores
    from lbr_dist.evaluation.retrieval import BM25Search, MtebEncoder, held_out_task, is_retrieval, retrieval_scores
    from lbr_dist.evaluation.separation import separation
    from lbr_dist.inference.encoder import PackedEncoder, TruncatedEncoder
    from lbr_dist.inference.loading import is_run, load_encoder, pinned, split_dim

    clock = _Clock()
    if spec == "bm25":
        scores: dict[str, Any] = {"name": "BM25", "model": spec}
        scores["retrieval"] = retrieval_scores(BM25Search(), held_out_task(data))
        clock.lap("retrieval")
        scores["tasks"] = {
            name: retrieval_scores(BM25Search(), task) for name, task in tasks.items() if is_retrieval(task)
        }
        return {**scores, "seconds": clock.laps}
    path = split_dim(spec)[0]
    if is_run(path) and path not in checkpoints:  # one for all that is asked of a run in training
        checkpoints[path] = pinned(path)
    encoder = load_encoder(spec, device, checkpoints.get(path))
    clock.lap("load")
    scores = {"name": printable(encoder.name), "model": printable(spec)}
    packed = encoder.inner if isinstance(encoder, TruncatedEncoder) else encoder
    if isinstance(packed, PackedEncoder):
        scores["checkpoint"] = packed.checkpoint
    wrapped = MtebEncoder(encoder, keep=True, progress=progress)
    scores["retrieval"] = retrieval_scores(wrapped, held_out_task(data))
    clock.lap("retrieval")
    queries_QD, passages_PD = (np.concatenate(wrapped.vectors[side]) for side in ("query", "passage"))
    figures = separation(queries_QD, passages_PD, data.positives, hardest, data.itself)
    scores["separation"] = {name: value for name, value in figures.items() if np.isfinite(value)}
    scores["settings"] = {"hardest": hardest}
    clock.lap("separation")
    scores["cut"] = encoder.cut
    if generate and isinstance(encoder, PackedEncoder):
        scores["generation"] = generation_scores(encoder, data, generate)
        scores["settings"]["generate"] = min(generate, len(data.queries))
        clock.lap("generation")
    elif generate:
        log.warning("%s: no answers are generated: only a run or checkpoint does, without ?dim", scores["model"])
    scores["tasks"] = {
        name: retrieval_scores(MtebEncoder(encoder, progress=progress), task) for name, task in tasks.items()
    }
    clock.lap("tasks")
    return {**scores, "seconds": clock.laps}


def _titled(tasks: dict[str, Any]) -> dict[str, Any]:
    """The tasks by their names: of a folder its last part, unless another has that name too."""
    names = [task.metadata.name for task in tasks.values()]
    return {
        (name if names.count(name) == 1 else typed): task
        for (typed, task), name in zip(tasks.items(), names, strict=True)
    }


class _Clock:
    """Seconds of each part, rounded."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now
