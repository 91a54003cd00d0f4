"""The `lbr` command: parse, call, print. Nothing else happens here.

Every command imports its part of the package when it is called, so that `lbr --help` answers at once.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lbr_dist import __version__
from lbr_dist.errors import EXIT_USER_ERROR, UserError

app = typer.Typer(
    help="Learn Before Represent: train, evaluate and export domain-specific embedding models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint_app = typer.Typer(help="List, verify and consolidate checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


def main() -> None:
    """Entry point: a mistake of the user is one line on stderr and exit code 2."""
    quiet()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def quiet() -> None:
    """Keep other libraries from talking; to be called before they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # their bars; ours look for the terminal themselves
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it found none


def _version(value: bool) -> None:
    if value:
        print(f"lbr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, folders, globs, addresses or data sets; KIND=PATH gives one a kind of its own."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    tokenizer: Annotated[str, typer.Option(help="Model folder or name whose tokenizer the token counts are for.")],
    kind: Annotated[
        str | None,
        typer.Option(help="question-answer, query-document, multiple-choice or corpus; default: recognised by fields."),
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="ROLE=NAME for a field of another name, as question=prompt. Repeatable.")
    ] = None,
    gl: Annotated[str | None, typer.Option(help="Size of the GL side: a count, a share, or 'rest'.")] = None,
    cl: Annotated[str | None, typer.Option(help="Size of the CL side.")] = None,
    eval_: Annotated[str | None, typer.Option("--eval", help="Size of the evaluation side.")] = None,
    entity: Annotated[
        str | None, typer.Option(help="FIELD or FIELD~REGEX: rows with the same value stay on one side.")
    ] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(help="Evaluation set from elsewhere; connected training rows are dropped.")
    ] = None,
    paragraphs: Annotated[
        bool, typer.Option(help="Plain text holds documents separated by blank lines, not one per line.")
    ] = False,
    similarity: Annotated[
        float, typer.Option(help="Jaccard similarity from which two texts are near-duplicates.")
    ] = 0.7,
    max_chars: Annotated[int, typer.Option(help="Longest field, in characters; longer ones are bad rows.")] = 100_000,
    max_bad_share: Annotated[float, typer.Option(help="A larger share of bad rows stops the run.")] = 0.01,
    domain: Annotated[str, typer.Option(help="Domain of records that name none.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the set in tables; default: the folder's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order and of the choice of sides.")] = 0,
    shard_records: Annotated[int, typer.Option(help="Most records in a shard.")] = 8192,
    shard_mib: Annotated[float, typer.Option(help="Largest shard, in MiB.")] = 256,
    overwrite: Annotated[bool, typer.Option(help="Replace a set made from other input.")] = False,
) -> None:
    """Turn raw files into isolated GL / CL / eval shards."""
    from lbr_dist.data.prepare import prepare as run

    fields = dict(_pair(item, "--field") for item in field or [])
    sizes = {side: size for side, size in (("gl", gl), ("cl", cl), ("eval", eval_)) if size is not None}
    report = run(
        sources, out, tokenizer=tokenizer, kind=kind, fields=fields, sizes=sizes or None, entity=entity,
        decontaminate=decontaminate or (), paragraphs=paragraphs, similarity=similarity, max_chars=max_chars,
        max_bad_share=max_bad_share, domain=domain, name=name, seed=seed, shard_records=shard_records,
        shard_mib=shard_mib, overwrite=overwrite,
    )  # fmt: skip
    print("\n".join(report.lines))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe (`lbr recipes`).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optim.lr=1e-4.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Start this many ranks on this machine.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint.")] = "auto",
    allow_change: Annotated[
        list[str] | None, typer.Option(help="Recipe field that may differ from the run that is resumed. Repeatable.")
    ] = None,
) -> None:
    """Train stage 1 or stage 2 from a recipe."""
    from lbr_dist.recipes import load_recipe

    loaded = load_recipe(recipe, overrides)
    if nproc is not None:
        from lbr_dist.launch.local import launch

        sys.exit(launch(loaded, nproc, resume=resume, allow_change=allow_change or ()))
    from lbr_dist.training.run import train as run

    sys.exit(run(loaded, resume=resume, allow_change=allow_change or ()).exit_code)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe (`lbr recipes`).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optim.lr=1e-4.")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or cpu.")] = "h100",
) -> None:
    """Check a recipe without starting it: steps, tokens, memory per rank, time."""
    from lbr_dist.recipes import load_recipe
    from lbr_dist.training.estimate import estimate

    print("\n".join(estimate(load_recipe(recipe, overrides), world=world_size, gpu=gpu).lines))


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Runs, checkpoints, exports, sentence-transformers models, hf:PATH?pooling=mean, bm25."),
    ],
    data: Annotated[str, typer.Option(help="Prepared set; its eval side is used.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: MODEL/eval of the first run.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Further mteb task, by name. Repeatable.")] = None,
    distractors: Annotated[int, typer.Option(help="Passages from the training sides added to the corpus.")] = 0,
    generate: Annotated[int, typer.Option(help="Questions answered for BLEU-4 and ROUGE-L; 0: none.")] = 100,
    hardest: Annotated[int, typer.Option(help="Non-positives per query in the separation ratio.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure models: retrieval (mteb), generation, separation ratio."""
    from lbr_dist.evaluate import default_out
    from lbr_dist.evaluate import evaluate as run
    from lbr_dist.evaluation.report import print_table

    folder = out or default_out(models)
    results = run(
        models, data, folder, tasks=task or (), distractors=distractors, generate=generate, hardest=hardest,
        device=device,
    )  # fmt: skip
    print_table(results)
    print(f"written: {folder}/eval.json, eval.md, eval.png")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run (its newest verified checkpoint) or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Model folder to make.")],
    tokens: Annotated[
        int | None, typer.Option(help="Bottleneck tokens that every text gets, for a run in ratio mode.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    scores: Annotated[Path | None, typer.Option(help="eval.json for the model card; default: the run's own.")] = None,
) -> None:
    """Write a model folder for sentence-transformers and plain transformers."""
    from lbr_dist.export import export as write

    print(f"written: {write(run, out, tokens=tokens, dtype=_dtype(dtype), scores=scores)}")


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, export or sentence-transformers model.")],
    source: Annotated[Path, typer.Argument(help="JSONL (also .gz, .zst), Parquet, or text with a text per line.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to make: id and embedding.")],
    side: Annotated[str, typer.Option(help="query or passage: which instruction the texts get.")] = "passage",
    field: Annotated[str | None, typer.Option(help="Field that holds the text; default: by side.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Embed a file; continues where a killed run stopped."""
    from lbr_dist.encode import encode_file

    if side not in ("query", "passage"):
        raise UserError(f"--side {side}: expected query or passage")
    done = encode_file(model, source, out, side=side, field=field, device=device)  # type: ignore[arg-type]
    notes = [f"{done.resumed} from the earlier attempt"] * bool(done.resumed) + [f"{done.cut} cut"] * bool(done.cut)
    note = ", ".join(notes)
    print(f"written: {out}: {done.texts} embeddings of {done.width} numbers{f' ({note})' if note else ''}")


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, export, sentence-transformers model, or bm25.")],
    corpus: Annotated[Path, typer.Argument(help="Prepared set, or a JSONL, Parquet or text file.")],
    queries: Annotated[list[str], typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Results per query.")] = 5,
    field: Annotated[str | None, typer.Option(help="Field of the file that holds the text.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Look at a model's results by eye."""
    from lbr_dist.search import print_hits
    from lbr_dist.search import search as run

    print_hits(queries, run(model, corpus, queries, k=k, field=field, device=device))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders and evaluations (eval.json or its folder).")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and report.png.")] = Path("report"),
) -> None:
    """Compare runs: a Markdown table and a plot."""
    from lbr_dist.report import report as write

    print(write(runs, out))
    print(f"written: {out}/report.md, report.png")


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Prove from a run's logs that every sample was used exactly once per epoch, in plan order."""
    from lbr_dist.training.audit import audit as check

    found = check(run)
    print(f"{run}: {found}")
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Where to; default: NAME.yaml here.")] = None,
) -> None:
    """List the recipes that ship, or copy one to start from."""
    from lbr_dist.recipes import FOLDER, shipped

    known = shipped()
    if name is None:
        width = max(map(len, known))
        print("\n".join(f"{recipe:<{width}}  {line}" for recipe, line in known.items()))
        return
    if name not in known:
        raise UserError(f"recipe {name}: not one that ships; they are {', '.join(known)}")
    target = out or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise UserError(f"{target}: exists; name another file")
    shutil.copyfile(FOLDER / f"{name}.yaml", target)
    print(f"written: {target}")


@checkpoint_app.command("list")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """The checkpoints of a run, newest first."""
    from lbr_dist.training.checkpoint_format import list_checkpoints as found

    for path, manifest in found(run):
        print(f"{path.name}  {_describe(manifest)}")


@checkpoint_app.command()
def verify(path: Annotated[Path, typer.Argument(help="Checkpoint, or run folder: all of its checkpoints.")]) -> None:
    """Read every byte and compare it with the checksums; exit code 1 if anything is wrong."""
    from lbr_dist.training.checkpoint_format import checkpoints_folder
    from lbr_dist.training.checkpoint_format import list_checkpoints as found
    from lbr_dist.training.checkpoint_format import verify as problems_of

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run or one of its checkpoints")
    folders = [folder for folder, _ in found(path)] if checkpoints_folder(path).is_dir() else [path]
    if not folders:
        raise UserError(f"{path}: has no checkpoint")
    bad = False
    for folder in folders:
        problems = problems_of(folder)
        bad = bad or bool(problems)
        print(f"{folder}: {'; '.join(problems) or 'verified'}")
    if bad:
        raise typer.Exit(1)


@checkpoint_app.command()
def consolidate(
    path: Annotated[Path, typer.Argument(help="Run (its newest verified checkpoint) or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    max_shard_gib: Annotated[float, typer.Option(help="Largest file, in GiB.")] = 4,
) -> None:
    """Write the weights as plain safetensors shards."""
    from lbr_dist.training.weights import consolidate as write

    for shard in write(path, out, _dtype(dtype), max_shard_gib):
        print(f"written: {shard}")


def _describe(manifest: Any) -> str:
    if manifest is None:
        return "incomplete: cannot be resumed from"
    return f"step {manifest.step}, {manifest.world_size} ranks, {len(manifest.files)} files"


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UserError(f"{flag} {text}: expected NAME=VALUE")
    return key, value


def _dtype(text: str) -> Any:
    if text not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {text}: expected float32 or bfloat16")
    return text
