"""Do mined hard negatives help? The quickstart's domain, stage 2 with and without them, the same steps.

One base and one stage-1 model (IB-GL) are trained as in the quickstart. Then, for every seed of stage 2: LBR without
hard negatives; negatives mined with that very model; LBR again from the same stage-1 model with them; and the same with
negatives mined by BM25. A step with negatives has as many pairs and more passages, so it takes longer: steps are equal
here, not seconds. Evaluation is that of the quickstart: 1,000 held-out questions, mteb retrieval.

    python -m benchmarks.mining --results benchmarks/results/mining [--quickstart quickstart]

With `--quickstart` data and stage 1 are those that `make quickstart` has left in that folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.commands import Lbr, side_by_side
from benchmarks.quickstart.__main__ import RECIPES, Step, evaluate, make_data, scores, spread
from lbr_dist.cli import quiet

NEGATIVES = 4
"""Mined for each pair;"""
USED = 2
"""and used with it in a step, others in each pass over the data."""
ARMS = (
    ("lbr", "LBR"),
    ("lbr_mined", "LBR, negatives mined with it"),
    ("lbr_bm25", "LBR, negatives mined with BM25"),
    ("bm25", "BM25"),
)


def stage2(lbr: Lbr, seed: int, arm: str, data: str, *change: str) -> None:
    """Train one arm."""
    shutil.rmtree(lbr.folder / "runs" / arm, ignore_errors=True)
    lbr(
        f"train-{arm}-{seed}", "train", str(RECIPES / "lbr.yaml"), f"seed={seed}", f"output=runs/{arm}",
        f"data.sets.0.path={data}", *change,
    )  # fmt: skip


def one_seed(out: Path, lbr: Lbr, seed: int, faster: list[str]) -> dict[str, Any]:
    """All arms of a seed; returns their evaluation, with what mining counted."""
    used = f"contrastive.hard_negatives={USED}"
    options = ("-n", str(NEGATIVES), "--depth", "50", "--overwrite")
    with Step(f"seed {seed}: LBR without hard negatives; BM25's, and LBR with them"):

        def lexical() -> None:
            lbr(f"mine-bm25-{seed}", "mine", "bm25", "data/domain", "--out", "data/bm25", *options)
            stage2(lbr, seed, "lbr_bm25", "data/bm25", used, *faster)

        side_by_side(lambda: stage2(lbr, seed, "lbr", "data/domain", *faster), lexical)
    with Step(f"seed {seed}: mine with LBR, train with what it found"):
        lbr(f"mine-lbr-{seed}", "mine", "runs/lbr", "data/domain", "--out", "data/mined", *options)
        stage2(lbr, seed, "lbr_mined", "data/mined", used, *faster)
    results = evaluate(out, lbr, ARMS, f"eval-{seed}")
    for name in ("mined", "bm25"):
        report = json.loads((out / "data" / name / "report.json").read_text(encoding="utf-8"))
        results[f"mining_{name}"] = report["mined"]["counts"]
        results[f"examples_{name}"] = report["mined"]["examples"][:3]
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mining"), help="folder for everything that is made")
    parser.add_argument("--quickstart", type=Path, help="folder of a finished `make quickstart`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="folder for the table and the numbers behind it")
    parser.add_argument("--toy", action="store_true", help="a handful of steps: does everything run?")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / "logs").is_dir():
            raise SystemExit(f"mining: {out} exists and holds something else; choose another --out")
        shutil.rmtree(out)
    quiet()
    lbr = Lbr(out)
    faster = ["duration.steps=3"] if arguments.toy else []
    if arguments.quickstart:
        for name in ("base", "data/domain", "data/eval", "runs/ib_gl"):
            shutil.copytree(arguments.quickstart / name, out / name)
    else:
        make_data(out, lbr)
        with Step("train the base and stage 1 (IB-GL), once"):
            for name in ("base", "ib_gl"):
                lbr(f"train-{name}", "train", str(RECIPES / f"{name}.yaml"), *faster)
    seeds = [one_seed(out, lbr, seed, faster) for seed in range(arguments.seeds)]
    about = common.head("python -m benchmarks.mining --results benchmarks/results/mining", toy=arguments.toy)
    note = (
        f"One stage-1 model; {arguments.seeds} seeds of stage 2 (order of the data), 25 steps of 256 pairs each; "
        f"{NEGATIVES} negatives mined per pair, {USED} used per step."
    )
    lines = [*common.title("Do mined hard negatives help?", about), note, "", spread(scores(seeds))]
    if arguments.results:
        common.save(arguments.results, "quickstart", about, seeds, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
