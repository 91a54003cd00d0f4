"""The search for learning rates: the same effort for every arm, on questions that no table uses.

Stage 1's rate is chosen by what it is for: the dev score after a stage 2 of one rate. Then each stage 2 arm
gets its own rate from the same grid; a joint stage, from that of stage 1. Seed 0, whose chosen runs the tables then
take as they are; everything tried is written down.
"""

from __future__ import annotations

from typing import Any

from benchmarks.paper.scales import Scale
from benchmarks.paper.workplace import Workplace

SEED = 0
LEARN = {"gl": "gl_cl", "ib_gl": "lbr"}
"""Stage 1 arms and the stage 2 arms that they are judged by."""


def search(place: Workplace) -> dict[str, Any]:
    """`rates` by arm, and all `trials` (arm, rate, dev nDCG@10)."""
    trials: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    scale = place.scale
    place.train(["base"], SEED, {})
    judging = scale.judging_rate

    def score(arm: str, rate: float, start: str | None, label: str) -> float:
        return place.dev_score(place.train_arm(arm, SEED, rate, start=start, label=f"search/{label}"))

    for learn, align in LEARN.items():
        found = {}
        for rate in scale.generative_rates:
            run = place.train_arm(learn, SEED, rate, label=f"search/{learn}-{rate:g}")
            found[rate] = score(align, judging, run, f"{learn}-{rate:g}-{align}-{judging:g}")
            trials.append({"arm": learn, "rate": rate, "judged_by": f"{align} at {judging:g}", "dev": found[rate]})
        rates[learn] = max(found, key=lambda rate: found[rate])
        place.adopt(learn, SEED, rates[learn], f"search/{learn}-{rates[learn]:g}")
    for arm, first in (("cl", None), *((align, learn) for learn, align in LEARN.items())):
        start = f"seed-{SEED}/runs/search/{first}-{rates[first]:g}" if first else None
        prefix = f"{first}-{rates[first]:g}-" if first else ""
        found = {rate: score(arm, rate, start, f"{prefix}{arm}-{rate:g}") for rate in scale.contrastive_rates}
        trials += [{"arm": arm, "rate": rate, "judged_by": arm, "dev": value} for rate, value in found.items()]
        rates[arm] = max(found, key=lambda rate: found[rate])
        place.adopt(arm, SEED, rates[arm], f"search/{prefix}{arm}-{rates[arm]:g}")
    return {"domain": place.domain, "rates": rates, "trials": trials}


def given(scale: Scale) -> dict[str, float] | None:
    """Rates by arm of a scale that has one of each kind, which leaves nothing to search; else None."""
    if len(scale.generative_rates) > 1 or len(scale.contrastive_rates) > 1:
        return None
    learn, align = scale.generative_rates[0], scale.contrastive_rates[0]
    return dict.fromkeys([*LEARN, "joint"], learn) | dict.fromkeys(["cl", *LEARN.values()], align)


def search_joint(place: Workplace, found: dict[str, Any]) -> dict[str, Any]:
    """What `search` found, and the joint stage's rate."""
    place.train(["base"], SEED, {})
    scores = {
        rate: place.dev_score(place.train_arm("joint", SEED, rate, label=f"search/joint-{rate:g}"))
        for rate in place.scale.generative_rates
    }
    trials = [{"arm": "joint", "rate": rate, "judged_by": "joint", "dev": value} for rate, value in scores.items()]
    others = [trial for trial in found["trials"] if trial["arm"] != "joint"]
    rates = {**found["rates"], "joint": max(scores, key=lambda rate: scores[rate])}
    return {"domain": place.domain, "rates": rates, "trials": others + trials}


def markdown(result: dict[str, Any]) -> str:
    """What was tried."""
    lines = ["| arm | learning rate | judged by | dev nDCG@10 | chosen |", "| --- | ---: | --- | ---: | --- |"]
    for trial in result["trials"]:
        chosen = "yes" if result["rates"][trial["arm"]] == trial["rate"] else ""
        lines.append(f"| {trial['arm']} | {trial['rate']:g} | {trial['judged_by']} | {trial['dev']:.3f} | {chosen} |")
    return "\n".join(lines)
