"""`lbr report`: runs side by side, as a Markdown table and one figure.

Reads only what runs and evaluations leave behind (`recipe.yaml`, `metrics.jsonl`, `eval.json`), so it works on a copy
of a run folder without its checkpoints. One panel of loss per stage: the two stages' losses have different units.
Below them one small panel for each other metric that an operator watches.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.config import Recipe
from lbr_dist.disk import in_turn, replacing, room, usable_folder
from lbr_dist.errors import UserError, printable
from lbr_dist.evaluation.table import (
    COLOURS,
    Metric,
    bars,
    describe,
    literal_text,
    markdown_table,
    read_evaluation,
)
from lbr_dist.logs import iterate_rows, no_rows
from lbr_dist.recipes import load_recipe

LOSS = {
    "generative": "loss, nats per target token",
    "contrastive": "InfoNCE loss, nats per query",
    "joint": "joint loss (see `joint_weight`)",
}
WATCHED = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "accuracy": "accuracy in the batch",
    "tokens_per_s": "tokens/s",
    "packing": "packing, share",
    "mfu": "MFU, share",
    "memory_gib": "memory of rank 0, GiB",
    "data_wait_s": "data wait, s a step",
    "checkpoint_stall_s": "stalled for checkpoints, s",
}
"""Metrics with a panel of their own, where a run has them."""
READ = (*WATCHED, "loss", "step", "step_s", "samples")
"""Metrics that are read."""
PANELS = 3
"""In a row."""
SHOWN = (Metric("nDCG@10", ("retrieval", "ndcg_at_10")), Metric("Recall@10", ("retrieval", "recall_at_10")))


@dataclass
class RunLog:
    """What a run left behind.

    Attributes:
        name: for tables; `tracking.name`, else the folder's; with the path where several have one.
        recipe: of the run.
        curves: by metric, the steps where it is a number, and its values there.
        path: its folder, as typed.
    """

    name: str
    recipe: Recipe
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    path: Path


def report(runs: Sequence[str | Path], out: str | Path) -> str:
    """Compare runs; writes `report.md` and `report.png`.

    Args:
        runs: run folders, and evaluations (`eval.json`, or the folder that holds it); those in a run's own `eval/` are
            found by themselves.
        out: folder for the report.

    Returns:
        The Markdown.

    Raises:
        UserError: one of `runs` is neither, or `out` cannot be written.
    """
    logs, evaluations = read_all(runs)
    out = Path(out)
    usable_folder(out, f"--out {out}")
    parts = ["# Report"]
    if logs:
        parts.append("## Training\n\n" + training_table(logs))
    parts += [f"## {results['data']['name']}\n\n{markdown_table(results)}" for results in evaluations]
    text = "\n\n".join([*parts, "![loss and retrieval](report.png)"]) + "\n"
    with room(f"--out {out}", "free space, or choose a folder on another disk"), literal_text(), in_turn(out):
        with replacing(out / "report.md") as file:
            file.write_text(text, encoding="utf-8")
        with replacing(out / "report.png") as file:
            figure(logs, evaluations, file)
    return text


def read_all(paths: Sequence[str | Path]) -> tuple[list[RunLog], list[dict[str, Any]]]:
    """Runs, and evaluations with those of one data set merged into one."""
    logs: list[RunLog] = []
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for path in map(Path, paths):
        files = [path] if path.is_file() else [path / "eval.json", path / "eval" / "eval.json"]
        found = [file for file in files if file.is_file()]
        if (path / "recipe.yaml").is_file():
            logs.append(_read_run(path))
        elif not found:
            raise UserError(f"report {path}: neither a run (no recipe.yaml) nor an evaluation (no eval.json)")
        for file in found:
            results = read_evaluation(file, f"report {file}")
            key = (results["data"]["fingerprint"], results["data"]["passages"])
            whole = merged.setdefault(key, {**results, "models": []})
            known = [_figures(model) for model in whole["models"]]
            whole["models"] += [model for model in results["models"] if _figures(model) not in known]
    names = [log.name for log in logs]
    for log, name in zip(logs, names, strict=True):
        if names.count(name) > 1:
            log.name = f"{name} ({printable(str(log.path))})"
    return logs, list(merged.values())


def training_table(logs: Sequence[RunLog]) -> str:
    """Markdown: how long each run was, what it reached, and how fast it went."""
    lines = [
        "| run | stage | steps | samples | final loss | tokens/s | hours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for log in logs:
        name = log.name.replace("|", r"\|")
        steps, loss = log.curves["step"][0], log.curves["loss"][1]
        if len(steps) == 0:
            lines.append(f"| {name} | {log.recipe.stage} | 0 | – | – | – | – |")
            continue
        tail = loss[-max(1, len(loss) // 20) :]
        speed, seconds = log.curves["tokens_per_s"][1], log.curves["step_s"][1]
        samples = log.curves["samples"][1]
        lines.append(
            f"| {name} | {log.recipe.stage} | {steps[-1]:,} | {_number(samples[-1:], ',.0f')} | "
            f"{_number(tail.mean(keepdims=True) if len(tail) else tail, '.4f')} | "
            f"{_number(np.median(speed, keepdims=True) if len(speed) else speed, ',.0f')} | "
            f"{_number(seconds.mean(keepdims=True) * steps[-1] / 3600 if len(seconds) else seconds, '.2f')} |"
        )
    return "\n".join(lines) + "\n\nFinal loss: mean of the last twentieth of the run. tokens/s: median over steps."


def figure(logs: Sequence[RunLog], evaluations: Sequence[dict[str, Any]], file: Path) -> None:
    """Loss of each stage's runs, what else was watched, and retrieval of each evaluation; a run has one colour
    throughout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [stage for stage in LOSS if any(log.recipe.stage == stage for log in logs)]
    keys = _colour_keys(logs, evaluations)
    shown = dict.fromkeys([log.name for log in logs] + [key for of_models in keys for key in of_models])
    colours = {key: COLOURS[number % len(COLOURS)] for number, key in enumerate(shown)}
    watched = [key for key in WATCHED if any(len(log.curves[key][0]) for log in logs)]
    lines = -(-len(watched) // PANELS)
    heights = (
        [3.4] * bool(stages)
        + [1.7 * lines] * bool(watched)
        + [1.1 + 0.4 * len(results["models"]) for results in evaluations]
    )
    drawing = Figure(figsize=(11, max(2.5, sum(heights))), layout="constrained")
    FigureCanvasAgg(drawing)
    rows = drawing.subfigures(len(heights) or 1, 1, height_ratios=heights or [1], squeeze=False)[:, 0]
    if stages:
        for axis, stage in zip(rows[0].subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            _losses(axis, [log for log in logs if log.recipe.stage == stage], colours)
            axis.set_title(f"{stage}: {LOSS[stage]}", fontsize=10)
    if watched:
        axes = rows[1].subplots(lines, PANELS, squeeze=False).ravel()
        for axis, key in zip(axes, watched, strict=False):
            _watched(axis, logs, key, colours)
        for axis in axes[len(watched) :]:
            axis.remove()
    for row, results, of_models in zip(rows[len(rows) - len(evaluations) :], evaluations, keys, strict=True):
        row.suptitle(describe(results), fontsize=10, x=0.01, ha="left")
        for axis, metric in zip(row.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
            bars(axis, results["models"], metric, [colours[key] for key in of_models])
    drawing.savefig(file, dpi=150)


def _colour_keys(logs: Sequence[RunLog], evaluations: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each evaluation's models what decides their colours, whatever their titles: the name of their run's log, or
    where there is none, name and specification."""
    known = {(model["name"], model.get("model", "")) for results in evaluations for model in results["models"]}
    names = [name for name, _ in known]

    def key(name: str, spec: str) -> str:
        found = {log.name for log in logs if _is_of(spec, log.path)}
        if not found and names.count(name) == 1:
            found = {log.name for log in logs if log.name == name}
        return found.pop() if len(found) == 1 else f"{name}\n{spec}"

    return [[key(model["name"], model.get("model", "")) for model in results["models"]] for results in evaluations]


def _is_of(spec: str, run: Path) -> bool:
    """Whether a specification names the run, also one that was typed in a folder above it."""
    parts = Path(spec).parts
    tail = len(parts) > 1 and run.absolute().parts[-len(parts) :] == parts
    return tail or (spec != "" and os.path.realpath(spec) == os.path.realpath(run))


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a fiftieth of the points, narrower at the ends."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _watched(axis: Any, logs: Sequence[RunLog], key: str, colours: dict[str, str]) -> None:
    for log in logs:
        steps, values = log.curves[key]
        axis.plot(steps, values, "o" if len(steps) == 1 else "-", color=colours[log.name], linewidth=0.9, markersize=3)
    axis.set_title(WATCHED[key], fontsize=9)
    axis.set_ylim(bottom=0)
    _over_steps(axis, 7)


def _losses(axis: Any, logs: Sequence[RunLog], colours: dict[str, str]) -> None:
    for log in logs:
        steps, loss = log.curves["loss"]
        axis.plot(steps, loss, color=colours[log.name], alpha=0.2, linewidth=0.7)
        dot = "o" if len(steps) == 1 else ""  # one point makes no line
        axis.plot(steps, smooth(loss), dot + "-", color=colours[log.name], linewidth=1.6, label=log.name)
    axis.set_xlabel("step", fontsize=9)
    _over_steps(axis, 8)
    axis.legend(fontsize=8, frameon=False)


def _over_steps(axis: Any, size: float) -> None:
    """Ticks, grid and frame of a panel whose abscissa is the step."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=size)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _read_run(path: Path) -> RunLog:
    recipe, file, unreadable = load_recipe(path / "recipe.yaml", kept=True), path / "metrics.jsonl", list[int]()
    found, rows = {key: (array("q"), array("d")) for key in READ}, 0
    for row in iterate_rows(file, unreadable=unreadable):  # a long run's rows would take far more memory than these
        rows += 1
        for key, (steps, values) in found.items():
            if isinstance(row.get(key), int | float) and isinstance(row.get("step"), int):
                steps.append(row["step"])
                values.append(row[key])
    problem = "" if rows else no_rows(file)
    if rows and unreadable:
        problem = f"{len(unreadable)} of its lines cannot be read, the first is line {unreadable[0]}"
    if problem:
        logging.getLogger("lbr").warning("%s: %s: the report lacks these steps", file, problem)
    curves = {key: (np.array(steps), np.array(values)) for key, (steps, values) in found.items()}
    return RunLog(printable(recipe.tracking.name or path.resolve().name), recipe, curves, path)


def _figures(model: dict[str, Any]) -> dict[str, Any]:
    """A model of an evaluation but for how long it took: two that agree are one, two of one name need not agree."""
    return {name: value for name, value in model.items() if name != "seconds"}


def _number(values: np.ndarray, form: str) -> str:
    return f"{values[0]:{form}}" if len(values) else "–"
