"""Does the separation ratio say beforehand how much a domain gains from generative learning?

For every domain and seed: figures of the frozen base model, and of the model after stage 1, beside the gain that was
measured, nDCG@10 of IB-GL + CL less CL alone. Spearman's rank correlation over these points says how well each figure
orders them. With few domains this is an observation, not a law, and the table says over how many points; a p-value
would take the seeds of one domain for independent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbr_dist.errors import UserError

NAMES = ("LLM", "LLM + IB-GL", "LLM + CL", "LLM + IB-GL + CL (LBR)")


def correlate(files: list[Path]) -> tuple[str, dict[str, Any]]:
    """Markdown and data from the results of table 3, one file per domain.

    Raises:
        UserError: fewer than two domains have results.
    """
    from scipy.stats import spearmanr

    points = [point for file in files for point in _points(file)]
    domains = sorted({point["domain"] for point in points})
    if len(domains) < 2:
        raise UserError(f"separation: there is table3 of {', '.join(domains) or 'no domain'}; run it for two or more")
    figures = [name for name in points[0] if name not in ("domain", "gain")]
    gains = [point["gain"] for point in points]
    ranked = {name: spearmanr([point[name] for point in points], gains).statistic for name in figures}
    lines = [f"# Which figure predicts the gain ({', '.join(domains)}; {len(points)} points)\n"]
    lines += ["| figure | Spearman with the gain |", "| --- | ---: |"]
    lines += [f"| {name} | {rho:+.2f} |" for name, rho in sorted(ranked.items(), key=lambda item: -abs(item[1]))]
    lines += ["", "| domain | SR before | SR after IB-GL | gain |", "| --- | ---: | ---: | ---: |"]
    for point in points:
        lines.append(
            f"| {point['domain']} | {point['SR']:.2f} | {point['SR after IB-GL']:.2f} | {point['gain']:+.3f} |"
        )
    return "\n".join(lines), {"points": points, "spearman": ranked}


def _points(file: Path) -> list[dict[str, Any]]:
    points = []
    for models in json.loads(file.read_text(encoding="utf-8"))["seeds"]:
        by_name = {model["name"]: model for model in models}
        base, learnt, aligned, lbr = (by_name[name] for name in NAMES)
        before, after = base["separation"], learnt["separation"]
        points.append(
            {
                "domain": file.stem.removeprefix("table3-"),
                "gain": lbr["retrieval"]["ndcg_at_10"] - aligned["retrieval"]["ndcg_at_10"],
                "SR": before["sr"],
                "SR after IB-GL": after["sr"],
                "SR gained by IB-GL": after["sr"] - before["sr"],
                "AUC": before["auc"],
                "alignment": before["alignment"],
                "uniformity": before["uniformity"],
                "nDCG@10 of the LLM": base["retrieval"]["ndcg_at_10"],
                "nDCG@10 gained by IB-GL": learnt["retrieval"]["ndcg_at_10"] - base["retrieval"]["ndcg_at_10"],
            }
        )
    return points
