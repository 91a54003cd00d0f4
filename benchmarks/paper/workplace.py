"""The folder of one domain at one scale: data, runs and scores, each made once and kept.

    WORK/small/medicine/
      data/, base-SEED/          prepared sets, backbone
      seed-0/runs/ARM/           a run folder; `ARM.finished.json` says what it was made by
      seed-0/eval-test/ARM.json  its scores

A command that was killed goes on where it stopped. An arm is trained again where its recipe or arguments changed, or
those of an arm that it starts from; data that were made from other files or sizes (`data/finished`) are refused.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.commands import Lbr
from benchmarks.paper import adaptive
from benchmarks.paper.arms import ARMS, Arm, rate_name
from benchmarks.paper.domains import VERSION, find, make_data
from benchmarks.paper.scales import LANGUAGE_MODEL, SCALES, Scale
from lbr_dist.disk import file_xxh128
from lbr_dist.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
OTHERS = {"base": "LLM", "bm25": "BM25"}


class Workplace:
    """Trains and evaluates arms of one domain at one scale, once it is prepared."""

    def __init__(self, work: Path, scale: str, domain: str, source: Path, jobs: int) -> None:
        """Nothing is made yet.

        Raises:
            UserError: the domain is not in `source`, or the data here are not what it and `scale` make.
        """
        self.scale, self.domain, self.jobs, self._source = SCALES[scale], domain, jobs, source
        self.folder = (work / scale / domain).resolve()
        self._marker = self.folder / "data" / "finished"
        self._origin = origin(source, domain, self.scale)
        if self._marker.exists():
            self._refuse_other_data()

    @cached_property
    def lbr(self) -> Lbr:
        """Commands in the folder, which is made for their logs."""
        return Lbr(self.folder, threads=self.scale.threads, echo=False)

    @property
    def questions(self) -> str:
        """A checksum that says what the test questions are."""
        return file_xxh128(self.folder / "test.jsonl")

    def prepare(self) -> None:
        """Make the data, unless they are there."""
        if not self._marker.exists():
            self._say("prepare the data")
            make_data(self.lbr, self._source, self.domain, self.scale)
            self._marker.write_text(json.dumps(self._origin))

    def train(self, names: Sequence[str], seed: int, rates: Mapping[str, float]) -> None:
        """Train arms and what they start from, as many at a time as there are jobs.

        Args:
            names: of arms; `base`, where the backbone is a language model already, takes no training.
            seed: of the weights of a random backbone and of the order of the data.
            rates: learning rate by arm.
        """
        self._backbone(seed)
        todo = list(dict.fromkeys(step for name in names for step in self._chain(name)))
        if not self.scale.language_model:
            todo = [name for name in todo if name != "base"]
        while todo:
            ready = [name for name in todo if self._start(name) not in todo]
            with ThreadPoolExecutor(self.jobs) as pool:
                jobs = [
                    pool.submit(self.train_arm, name, seed, rates.get(rate_name(name) if name in ARMS else name))
                    for name in ready
                ]
                for job in jobs:
                    job.result()
            todo = [name for name in todo if name not in ready]

    def train_arm(self, name: str, seed: int, rate: float | None, *, start: str | None = None, label: str = "") -> str:
        """Train one arm unless it has been; returns its run folder, relative to the workplace.

        Args:
            name: of the arm, or `base`.
            seed: as in `train`.
            rate: peak learning rate; None: the recipe's.
            start: run folder to start from; default: that of the arm it starts from.
            label: name of the run folder; default: the arm's.
        """
        run = f"seed-{seed}/runs/{label or name}"
        by = ARMS[name].adaptive if name in ARMS else ""
        more = adaptive.settings(self, seed, by) if by else ()
        arguments = train_arguments(self.scale, name, seed, rate, run, start, more)
        text = self._made_by(arguments)
        finished, begun = (self.folder / f"{run}.{state}.json" for state in ("finished", "begun"))
        if finished.exists() and finished.read_text() == text:
            return run
        finished.unlink(missing_ok=True)
        if not begun.exists() or begun.read_text() != text:
            _remove(self.folder / run)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(text)
        began = time.monotonic()
        self.lbr(f"train-{seed}-{_file(label or name)}", "train", *arguments)
        finished.write_text(text)
        self._say(f"seed {seed}: trained {label or name} in {time.monotonic() - began:.0f} s")
        return run

    def adopt(self, name: str, seed: int, rate: float, label: str) -> None:
        """Let the finished run `label` (see `train_arm`) be the arm's own, so that it is not trained a second time."""
        run = f"seed-{seed}/runs/{name}"
        text = self._made_by(train_arguments(self.scale, name, seed, rate, run))
        finished, begun = (self.folder / f"{run}.{state}.json" for state in ("finished", "begun"))
        if not (finished.exists() and finished.read_text() == text):
            finished.unlink(missing_ok=True)
            _remove(self.folder / run)
            (self.folder / run).symlink_to(label, target_is_directory=True)
            begun.write_text(text)
            finished.write_text(text)

    def evaluate(self, names: Sequence[str], seed: int, *, generate: bool = False) -> list[dict[str, Any]]:
        """Scores of arms (and of `bm25`, or any model that `lbr eval` takes) on the test questions, in order."""
        specs = {name: self._spec(name, seed) for name in names}
        folder = self.folder / f"seed-{seed}" / ("eval-generate" if generate else "eval-test")
        missing = {name: spec for name, spec in specs.items() if not self._fresh(folder / f"{_file(name)}.json", spec)}
        if missing:
            self._say(f"seed {seed}: evaluate {', '.join(missing)}")
            count = self.scale.generate if generate else 0
            results = self._eval(list(missing.values()), "test", folder / f"of-{_file(next(iter(missing)))}", count)
            for name, model in zip(missing, results, strict=True):
                scores = {**model, "name": title_of(name, model["name"]), **self._training(name, seed)}
                (folder / f"{_file(name)}.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        return [json.loads((folder / f"{_file(name)}.json").read_text(encoding="utf-8")) for name in names]

    def dev_score(self, run: str) -> float:
        """nDCG@10 of a run on the dev questions."""
        file = self.folder / run / "dev.json"
        if not file.exists():
            model = self._eval([run], "dev", self.folder / run / "eval-dev", 0)[0]
            file.write_text(json.dumps(model["retrieval"]["ndcg_at_10"]))
        return float(json.loads(file.read_text()))

    def _eval(self, specs: list[str], data: str, out: Path, generate: int) -> list[dict[str, Any]]:
        self.lbr(
            f"eval-{data}-{_file(specs[-1])}"[:120], "eval", *specs, "--data", f"data/{data}", "--out", str(out),
            "--generate", str(generate),
        )  # fmt: skip
        models: list[dict[str, Any]] = json.loads((out / "eval.json").read_text(encoding="utf-8"))["models"]
        return models

    def _made_by(self, arguments: Sequence[str]) -> str:
        """What a run's weights follow from: recipe, arguments, and the same of the run that it starts from."""
        start = next((each.partition("=")[2] for each in arguments if each.startswith("model.start_from=")), None)
        before = json.loads((self.folder / f"{start}.finished.json").read_text()) if start else None
        recipe = Path(arguments[0]).read_text(encoding="utf-8")
        return json.dumps({"recipe": recipe, "arguments": arguments[1:], "start": before})

    def _training(self, name: str, seed: int) -> dict[str, Any]:
        """What the training of an arm cost after the base: of every stage, and of all together."""
        if name not in ARMS:
            return {}
        names = [stage for stage in self._chain(name) if stage != "base"]
        stages = {stage: cost(self.folder / self._spec(stage, seed) / "metrics.jsonl") for stage in names}
        together = {key: sum(stage[key] for stage in stages.values()) for key in stages[name]}
        return {"training": {"all": together, "stages": stages}}

    def _refuse_other_data(self) -> None:
        text = self._marker.read_text(encoding="utf-8")
        if not text:
            raise UserError(
                f"{self.folder}: does not say what its data were made from (an earlier version made them); move it "
                "away, or give another --work"
            )
        was = json.loads(text)
        other = sorted(key for key in {**was, **self._origin} if was.get(key) != self._origin.get(key))
        if other:
            raise UserError(
                f"{self.folder}: its data are not what --data {self._source} and this version make ({', '.join(other)} "
                "differ); give the --data of then, or another --work"
            )

    def _backbone(self, seed: int) -> None:
        out = self.folder / f"base-{seed}"
        if not (out / "tokenizer.json").exists():
            self.scale.backbone(out, [self.folder / "qa.jsonl"], seed)

    def _chain(self, name: str) -> list[str]:
        """`name` after everything that it starts from."""
        start = self._start(name)
        return [*(self._chain(start) if start else []), name]

    def _start(self, name: str) -> str | None:
        if name == "base":
            return None
        start = ARMS[name].start
        return None if start == "base" and not self.scale.language_model else start

    def _spec(self, name: str, seed: int) -> str:
        if name == "base" and not self.scale.language_model:
            return f"hf:base-{seed}?pooling=mean"
        return f"seed-{seed}/runs/{name}" if name in ARMS or name == "base" else name

    def _fresh(self, file: Path, spec: str) -> bool:
        """Whether a score is there and not older than its run."""
        finished = self.folder / f"{spec}.finished.json"
        return file.exists() and not (finished.exists() and finished.stat().st_mtime > file.stat().st_mtime)

    def _say(self, text: str) -> None:
        print(f"[{self.domain}] {text}", flush=True)


def origin(source: Path, domain: str, scale: Scale) -> dict[str, str | int]:
    """What the data of a domain follow from: checksums of its files, the sizes of the scale, and what makes them.

    Raises:
        UserError: its rows are not there.
    """
    try:
        files = [find(source, f"{domain}.jsonl")]
    except UserError as missing:
        raise UserError(f"--data: {missing}") from None
    with contextlib.suppress(UserError):
        files.append(find(source, f"{domain}.corpus.txt"))
    sums = {file.name: file_xxh128(file) for file in files}
    return {**sums, "version": VERSION, "dev": scale.dev, "test": scale.test}


def cost(metrics: Path) -> dict[str, float]:
    """Steps of a run, with their seconds and tokens."""
    rows = [json.loads(line) for line in metrics.open(encoding="utf-8")]
    steps = [row for row in rows if "step_s" in row]
    return {
        "steps": len(steps),
        "seconds": sum(row["step_s"] for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
    }


def title_of(name: str, otherwise: str = "") -> str:
    """What tables call an arm, the base or BM25; another model as `otherwise` has it."""
    return ARMS[name].title if name in ARMS else OTHERS.get(name, otherwise)


def train_arguments(
    scale: Scale,
    name: str,
    seed: int,
    rate: float | None,
    run: str,
    start: str | None = None,
    more: tuple[str, ...] = (),
) -> list[str]:
    """Recipe and overrides (`more` of them last) of an arm (or of `base`), as `lbr train` takes them."""
    arm = ARMS.get(name) or Arm("LLM", "generative", None, LANGUAGE_MODEL)
    common = getattr(scale, arm.stage) if name in ARMS else scale.language_model or ()
    arguments = [
        str(RECIPES / f"{arm.stage}.yaml"), f"output={run}", f"seed={seed}", f"model.path=base-{seed}", *common,
        *arm.settings,
    ]  # fmt: skip
    if arm.start and (scale.language_model or arm.start != "base"):
        arguments.append(f"model.start_from={start or f'seed-{seed}/runs/{arm.start}'}")
    if rate is not None:
        arguments.append(f"optim.lr={rate:g}")
    return [*arguments, *more]


def _remove(run: Path) -> None:
    """Remove a run folder, or the link that stands for one."""
    if run.is_symlink():
        run.unlink()
    else:
        shutil.rmtree(run, ignore_errors=True)


def _file(name: str) -> str:
    return name.replace("/", "_").replace("?", "_").replace(":", "_")
