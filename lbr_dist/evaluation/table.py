"""One evaluation as a table and a picture: models down, metrics across, the best of each metric marked.

Everything is made from the plain JSON that `lbr eval` writes, so an old result can be shown again without a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.table import Table

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")

EAST_ASIAN = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip
"""Fonts with Chinese, Japanese and Korean characters; those that are installed draw what matplotlib's own lacks."""


@dataclass(frozen=True)
class Metric:
    """A column: where its value lies in a model's results, and how it is shown."""

    title: str
    path: tuple[str, ...]
    digits: int = 3
    higher: bool = True
    setting: str = ""
    """The one of `SETTINGS` that the value depends on;"""
    only: tuple[int | None, ...] = ()
    """values of it that the column holds; empty: all."""

    def value(self, model: dict[str, Any]) -> float | None:
        """The model's value, None where it was not measured or is in another column."""
        if self.only and self.told(model) not in self.only:
            return None
        node: Any = model
        for key in self.path:
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        is_number = isinstance(node, int | float) and not isinstance(node, bool) and math.isfinite(node)
        return float(node) if is_number else None

    def told(self, model: dict[str, Any]) -> int | None:
        """The setting that the value was measured by; None where it depends on none, or an old evaluation lacks it."""
        setting: int | None = model.get("settings", {}).get(self.setting)
        return setting


SETTINGS = {"hardest": "{:,} hardest", "generate": "{:,} questions"}
"""What of `lbr eval`'s settings is kept under a model's `settings`, and how a column says it."""

METRICS = (
    Metric("nDCG@10", ("retrieval", "ndcg_at_10")),
    Metric("Recall@10", ("retrieval", "recall_at_10")),
    Metric("MRR@10", ("retrieval", "mrr_at_10")),
    Metric("MAP@10", ("retrieval", "map_at_10")),
    Metric("SR", ("separation", "sr"), 2, setting="hardest"),
    Metric("AUC", ("separation", "auc"), setting="hardest"),
    Metric("alignment", ("separation", "alignment"), higher=False),
    Metric("uniformity", ("separation", "uniformity"), 2, higher=False),
    Metric("BLEU-4 (Z)", ("generation", "bottleneck", "bleu4"), 1, setting="generate"),
    Metric("ROUGE-L (Z)", ("generation", "bottleneck", "rouge_l"), 1, setting="generate"),
    Metric("BLEU-4 (X, Z)", ("generation", "full", "bleu4"), 1, setting="generate"),
    Metric("ROUGE-L (X, Z)", ("generation", "full", "rouge_l"), 1, setting="generate"),
)
"""Columns of the table, in order, where any model has them; (Z): generated through the bottleneck."""

PLOTTED = ("nDCG@10", "Recall@10", "SR", "ROUGE-L (Z)")


class _Data(BaseModel):
    name: str
    fingerprint: str
    queries: int
    answers: int
    passages: int


class _Model(BaseModel):
    name: str
    checkpoint: dict[str, str] = {}
    settings: dict[str, int] = {}
    tasks: dict[str, Any] = {}


class _Evaluation(BaseModel):
    data: _Data
    models: Annotated[list[_Model], Field(min_length=1)]
    notes: list[str] = []


def read_evaluation(file: Path, what: str) -> dict[str, Any]:
    """An evaluation that `lbr eval` wrote.

    Raises:
        UserError: it cannot be read, or is something else; `what` names it in the message.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        _Evaluation.model_validate(results, strict=True)
    except OSError as error:
        raise UserError(
            f"{what}: cannot be read ({error.strerror}); give the eval.json that `lbr eval` wrote"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        reason = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UserError(f"{what}: not an evaluation that `lbr eval` wrote ({reason})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: not an evaluation that `lbr eval` wrote (not JSON: {error})") from None
    return results


def columns(models: Sequence[dict[str, Any]]) -> list[Metric]:
    """The metrics that at least one model has, further mteb tasks last."""
    tasks = list(dict.fromkeys(name for model in models for name in model.get("tasks", {})))
    every = [*METRICS, *(Metric(name, ("tasks", name, "main_score")) for name in tasks)]
    return [column for metric in every for column in _by_setting(metric, models)]


def _by_setting(metric: Metric, models: Sequence[dict[str, Any]]) -> list[Metric]:
    """The columns of a metric: none, one, or where models were measured by different settings, one for each."""
    found = {metric.told(model) for model in models if metric.value(model) is not None}
    if len(found) < 2:
        return [metric] * len(found)
    parts = []
    for setting in sorted(found, key=lambda setting: (setting is None, setting or 0)):
        more = "" if setting is None else f", {SETTINGS[metric.setting].format(setting)}"
        parts.append(replace(metric, title=metric.title + more, only=(setting,)))
    return parts


def cells(models: Sequence[dict[str, Any]], metrics: Sequence[Metric]) -> list[list[tuple[str, bool]]]:
    """(text, does it read as the best) of each model and metric; a dash where nothing was measured."""
    best = {}
    for metric in metrics:
        values = [value for model in models if (value := metric.value(model)) is not None]
        if len(values) > 1:
            best[metric.title] = f"{max(values) if metric.higher else min(values):.{metric.digits}f}"
    rows = []
    for model in models:
        row = []
        for metric in metrics:
            value = metric.value(model)
            text = "–" if value is None else f"{value:.{metric.digits}f}"
            row.append((text, text == best.get(metric.title)))
        rows.append(row)
    return rows


def titles(models: Sequence[dict[str, Any]]) -> list[str]:
    """The models' names; where models of one name were typed differently, with what was typed, and where they are
    several checkpoints of what was typed, with the checkpoint (of one name too: with its digest's start)."""
    typed: dict[str, set[str]] = {}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for model in models:
        typed.setdefault(model["name"], set()).add(model.get("model", ""))
        if digest := model.get("checkpoint", {}).get("digest"):
            known = found.setdefault((model["name"], model.get("model", "")), {})
            known[digest] = model["checkpoint"].get("name", "")
    shown = []
    for model in models:
        name, spec, digest = model["name"], model.get("model", ""), model.get("checkpoint", {}).get("digest", "")
        known = found.get((name, spec), {})
        more = [spec] * (len(typed[name]) > 1)
        if digest and len(known) > 1:
            alike = list(known.values()).count(known[digest]) > 1
            more.append(known[digest] + f" {digest[:8]}" * alike)
        shown.append(f"{name} ({', '.join(more)})" if more else name)
    return shown


def markdown_table(results: dict[str, Any]) -> str:
    """Markdown: what was asked of what, and the table with the best values in bold."""
    models = results["models"]
    metrics = columns(models)
    lines = [
        describe(results),
        "",
        "| model | " + " | ".join(metric.title for metric in metrics) + " |",
        "| --- |" + " ---: |" * len(metrics),
    ]
    for title, row in zip(titles(models), cells(models, metrics), strict=True):
        shown = [f"**{text}**" if is_best else text for text, is_best in row]
        lines.append(f"| {title.replace('|', chr(92) + '|')} | " + " | ".join(shown) + " |")
    for note in results.get("notes", ()):
        lines += ["", note]
    return "\n".join(lines)


def describe(results: dict[str, Any]) -> str:
    """One line on the data."""
    data = results["data"]
    distractors = data["passages"] - data["answers"]
    more = f" and {distractors:,} distractors" if distractors else ""
    return f"{data['name']}: {data['queries']:,} held-out questions over {data['answers']:,} answers{more}."


def rich_table(results: dict[str, Any]) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    models = results["models"]
    metrics = columns(models)
    notes = "\n".join(results.get("notes", ()))
    table = Table(title=Text(describe(results)), title_justify="left", caption=Text(notes), caption_justify="left")
    table.add_column("model")
    for metric in metrics:
        table.add_column(metric.title, justify="right")
    for title, row in zip(titles(models), cells(models, metrics), strict=True):
        table.add_row(Text(title), *(f"[bold green]{text}[/]" if is_best else text for text, is_best in row))
    return table


def print_table(results: dict[str, Any]) -> None:
    """Print the table: in colour on a terminal, as Markdown into a file or pipe (where it is not cut)."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(rich_table(results))
    else:
        print(markdown_table(results))


def plot(results: dict[str, Any], file: Path) -> None:
    """Bars, one panel per metric, one colour per model."""
    with literal_text():
        _plot(results, file)


def literal_text() -> AbstractContextManager[None]:
    """Within it matplotlib draws texts as they are: names come from users, `$` would begin a formula, and its own font
    has no Chinese, Japanese or Korean."""
    import matplotlib
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    families = [*matplotlib.rcParams["font.family"], *(name for name in EAST_ASIAN if name in installed)]
    return matplotlib.rc_context({"text.parse_math": False, "font.family": families})


def _plot(results: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = results["models"]
    metrics = [metric for metric in columns(models) if metric.title in PLOTTED or metric.path[0] == "tasks"]
    figure = Figure(figsize=(1.6 + 2.6 * len(metrics), 1.5 + 0.42 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=False):
        bars(axis, models, metric)
    figure.suptitle(describe(results), fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=150)


def bars(axis: Any, models: Sequence[dict[str, Any]], metric: Metric, colours: Sequence[str] | None = None) -> None:
    """One panel: a metric, with every value written at its bar."""
    values = [metric.value(model) for model in models]
    drawn = [0.0 if value is None else value for value in values]
    colours = colours or [COLOURS[number % len(COLOURS)] for number in range(len(models))]
    axis.barh(range(len(models)), drawn, color=colours, height=0.7)
    for row, value in enumerate(values):
        text = "–" if value is None else f"{value:.{metric.digits}f}"
        axis.annotate(
            text, (max(drawn[row], 0.0), row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(range(len(models)), titles(models), fontsize=9)
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.set_title(metric.title, fontsize=10)
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    axis.set_xlim(low * 1.1, (high or 1.0) * 1.25)
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
