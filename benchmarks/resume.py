"""The fault table: what is done to a run, how often, and what came of it.

Two gloo ranks train a tiny model with LoRA and dropout under ZeRO-3, with a checkpoint every second step; a fault
happens at a moment drawn at random; the run goes on and is compared with one to which nothing happened. The trials are
those of tests/recovery (fault_trials.py says what each does and what an outcome means), only more of them. Nothing
is timed.

    python -m benchmarks.resume
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common

TESTS = Path(__file__).parents[1] / "tests"
A_RUN = 5
"""Kills of one run before it is let to its end and compared."""


Kind = tuple[str, int, int, Callable[[Any, str], str]]
"""(what, trials, trials that one call makes, the call)"""


def kinds(kills: int, trials: int) -> list[Kind]:
    """Everything that is done to runs."""
    from fault_trials import SIGNALS

    found: list[Kind] = []
    for everybody in (False, True):
        for saving in (False, True):
            what = (
                f"SIGKILL of {'all ranks' if everybody else 'one rank'}, {'during a save' if saving else 'any moment'}"
            )
            found.append((what, kills, A_RUN, _kill(everybody, saving)))
    found += [(f"checkpoint: {what}", trials, 1, _damage(kind)) for what, kind in DAMAGES.items()]
    found += [
        ("full disk during a save (tmpfs)", trials, 1, lambda t, name: str(t.full_disk(name))),
        ("loss not finite, on_nan=stop", trials, 1, lambda t, name: str(t.nan(name, "stop"))),
        ("loss not finite, on_nan=skip", trials, 1, lambda t, name: str(t.nan(name, "skip"))),
        ("a rank hangs", trials, 1, lambda t, name: str(t.hang(name))),
        ("a shard vanishes in mid-epoch", trials, 1, lambda t, name: str(t.vanish(name))),
    ]
    return found + [(number.name, trials, 1, _stop(number)) for number in SIGNALS]


TOY = "a bit flipped in a file"
DAMAGES = {"a file truncated": "truncated", "a bit flipped in a file": "flipped", "a rank's file missing": "missing"}


def _kill(everybody: bool, saving: bool) -> Callable[[Any, str], str]:
    return lambda t, name: str(t.kill(name, A_RUN, everybody=everybody, saving=saving))


def _damage(kind: str) -> Callable[[Any, str], str]:
    return lambda t, name: str(t.damage(name, kind))


def _stop(number: int) -> Callable[[Any, str], str]:
    return lambda t, name: str(t.stopped(name, number))


def table(folder: Path, chosen: list[Kind], workers: int, seed: int) -> list[dict[str, Any]]:
    """Run the trials; a row of each kind."""
    from conftest import make_model
    from fault_trials import Trials

    place = Trials(folder, make_model(folder / "model", "llama"), seed=seed, workers=workers)
    rows: list[dict[str, Any]] = []
    for what, wanted, each, call in chosen:
        outcomes, problems, before = Counter[str](), list[str](), place.half_written
        for number in range(-(-wanted // each)):
            try:
                outcome = call(place, f"{len(rows)}-{number}")
            except Exception as error:  # whatever it is, it belongs in the table
                outcome = "wrong"
                problems.append(f"{type(error).__name__}: {error}")
                traceback.print_exc()
            outcomes[outcome] += each
        row = {
            "fault": what,
            "trials": sum(outcomes.values()),
            "outcome": ", ".join(f"{n} {o}" for o, n in outcomes.items()),
        }
        if "SIGKILL" in what:
            row["half_written"] = place.half_written - before
        rows.append(row | ({"problems": problems} if problems else {}))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the trials and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each of the four kinds of SIGKILL")
    parser.add_argument("--trials", type=int, default=3, help="of each other kind")
    parser.add_argument("--workers", type=int, default=1, help="loader processes per rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "resume")
    parser.add_argument("--toy", action="store_true", help="one trial of one kind, to see that it runs")
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "recovery")]
    with tempfile.TemporaryDirectory() as folder:
        chosen = kinds(options.kills, options.trials)
        if options.toy:
            chosen = [(what, 1, each, call) for what, _, each, call in chosen if what == f"checkpoint: {TOY}"]
        rows = table(Path(folder), chosen, options.workers, options.seed)
    command = (
        f"python -m benchmarks.resume --kills {options.kills} --trials {options.trials} --workers {options.workers}"
    )
    about = common.head(f"{command} --seed {options.seed}", toy=options.toy)
    columns = {
        "fault": "fault",
        "trials": "trials",
        "outcome": "outcome",
        "half_written": "kills that left a half-written checkpoint",
    }
    lines = [*common.title("What a run does after a fault", about), *common.table(columns, rows), "", *LEGEND]
    common.save(options.out, "resume", about, rows, lines)
    sys.exit(any("wrong" in row["outcome"] for row in rows))


LEGEND = [
    "exact resume: all losses, final weights and the audit are those of the run that nothing happened to, bit for bit.",
    "clear error: the run ended with an error that names the cause; with the cause mended it went on exactly.",
    "step skipped: no rank took the step, and the run went on to its end.",
]


if __name__ == "__main__":
    main()
