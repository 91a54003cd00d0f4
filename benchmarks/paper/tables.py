"""Scores over seeds as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbr_dist.evaluation.table import COLOURS, Metric, columns

SECONDS = Metric("training, all stages [s]", ("training", "all", "seconds"), 0, higher=False)
SHOWN = ("nDCG@10", "Recall@10", "SR", "BLEU-4 (Z)", "ROUGE-L (Z)", "BLEU-4 (X, Z)", "ROUGE-L (X, Z)")
OURS = ("LLM + IB-GL", "LLM + IB-GL + CL (LBR)")
"""The paper's method, in another colour where models stand side by side."""


def summary(seeds: Sequence[list[dict[str, Any]]], costs: bool) -> tuple[list[Metric], list[list[list[float]]]]:
    """The metrics there are, and [model][metric][seed] values (empty where a model has none)."""
    metrics = [metric for metric in columns(seeds[0]) if metric.title in SHOWN] + [SECONDS] * costs
    values = [
        [[v for models in seeds if (v := metric.value(models[index])) is not None] for metric in metrics]
        for index in range(len(seeds[0]))
    ]
    return metrics, values


def markdown(seeds: Sequence[list[dict[str, Any]]], costs: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    metrics, values = summary(seeds, costs)
    lines = ["| model | " + " | ".join(metric.title for metric in metrics) + " |"]
    lines.append("| --- |" + " ---: |" * len(metrics))
    for model, row in zip(seeds[0], values, strict=True):
        cells = [figure(found, metric.digits) for found, metric in zip(row, metrics, strict=True)]
        lines.append(f"| {model['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(values: Sequence[float], digits: int) -> str:
    """`mean ± deviation`, the value alone, or a dash."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {spread:.{digits}f}" if spread else text


def bars(seeds: Sequence[list[dict[str, Any]]], title: str, file: Path) -> None:
    """nDCG@10 of every model, a bar each, with the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [model["name"] for model in seeds[0]]
    found = [[models[i]["retrieval"]["ndcg_at_10"] for models in seeds] for i in range(len(names))]
    chart, axes = pyplot.subplots(figsize=(7.5, 0.42 * len(names) + 1.2), layout="constrained")
    _draw(axes, found, [COLOURS[0]] * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("nDCG@10 on held-out questions; dots: seeds")
    axes.set_title(title, loc="left", fontsize=10)
    chart.savefig(file, dpi=150)
    pyplot.close(chart)


def shares(curves: dict[str, dict[int, list[float]]], title: str, file: Path) -> None:
    """Figure 3: nDCG@10 over the share of GL, a line per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for (kind, curve), colour in zip(curves.items(), COLOURS, strict=False):
        x = sorted(curve)
        mean = [statistics.fmean(curve[share]) for share in x]
        axes.plot(x, mean, "o-", color=colour, label=kind)
        axes.fill_between(x, [min(curve[s]) for s in x], [max(curve[s]) for s in x], color=colour, alpha=0.2)
    axes.set_xlabel("share of the samples in GL [%]; the rest in CL")
    axes.set_ylabel("nDCG@10")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    chart.savefig(file, dpi=150)
    pyplot.close(chart)


def domains(found: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """nDCG@10 of the same models in every domain, a panel each; domain -> model -> a value per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found.values())))
    chart, panels = pyplot.subplots(
        1, len(found), figsize=(9, 0.36 * len(names) + 1), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (domain, models) in zip(panels[0], found.items(), strict=True):
        _draw(axes, [models[name] for name in names], [COLOURS[name in OURS] for name in names])
        axes.set_title(domain, loc="left", fontsize=10)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    chart.supxlabel("nDCG@10 on held-out questions; dots: seeds", fontsize=10)
    chart.savefig(file, dpi=150)
    pyplot.close(chart)


def _draw(axes: Any, values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """A bar of the mean for each model, with its seeds as dots."""
    axes.barh(range(len(values)), [statistics.fmean(each) for each in values], color=colours, alpha=0.75)
    for place, each in enumerate(values):
        axes.plot(each, [place] * len(each), "o", color="black", markersize=3)
    axes.spines[["top", "right"]].set_visible(False)


def write(out: Path, name: str, text: str, data: dict[str, Any]) -> None:
    """`NAME.md` and `NAME.json`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
