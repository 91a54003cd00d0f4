"""`lbr eval`, `export`, `encode`, `search` and `report`: what is done with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_dist.cli.options import dtype_option, place
from lbr_dist.errors import UserError


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            callback=place,
            help="Runs, checkpoints, exports, sentence-transformers models, hf:PATH?pooling=mean, bm25; MODEL?dim=N.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(callback=place, help="Prepared set (its eval side is used), or FOLDER\\[@SPLIT] as BEIR has it."),
    ],
    out: Annotated[
        Path | None, typer.Option(callback=place, help="Folder for results; default: eval in the first run.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(callback=place, help="Further mteb task, or FOLDER\\[@SPLIT] as BEIR has it. Repeatable."),
    ] = None,
    distractors: Annotated[int, typer.Option(min=0, help="Passages from the training sides added to the corpus.")] = 0,
    generate: Annotated[int, typer.Option(min=0, help="Questions answered for BLEU-4 and ROUGE-L; 0: none.")] = 100,
    hardest: Annotated[int, typer.Option(min=1, help="Non-positives per query in the separation ratio.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure models: retrieval (mteb), generation, separation ratio."""
    from lbr_dist.evaluation.evaluate import default_out
    from lbr_dist.evaluation.evaluate import evaluate as run
    from lbr_dist.evaluation.table import print_table

    folder = out or default_out(models)
    results = run(
        models, data, folder, tasks=task or (), distractors=distractors, generate=generate, hardest=hardest,
        device=device,
    )  # fmt: skip
    print_table(results)
    print(f"written: {folder}/eval.json, eval.md, eval.png")


def export(
    run: Annotated[Path, typer.Argument(callback=place, help="Run (its newest verified checkpoint) or checkpoint.")],
    out: Annotated[Path, typer.Argument(callback=place, help="Model folder to make.")],
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Bottleneck tokens that every text gets, for a run where their number varies."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    scores: Annotated[
        Path | None, typer.Option(callback=place, help="eval.json for the model card; default: the run's own.")
    ] = None,
) -> None:
    """Write a model folder for sentence-transformers and plain transformers."""
    from lbr_dist.export.export import export as write

    print(f"written: {write(run, out, tokens=tokens, dtype=dtype_option(dtype), scores=scores)}")


def encode(
    model: Annotated[
        str,
        typer.Argument(
            callback=place, help="Run, checkpoint, export, other sentence-transformers model, hf:PATH?pooling=mean."
        ),
    ],
    source: Annotated[
        Path, typer.Argument(callback=place, help="File of texts: JSONL, CSV, Parquet, text ..., as lbr prepare reads.")
    ],
    out: Annotated[Path, typer.Argument(callback=place, help="Parquet file to make: id and embedding.")],
    side: Annotated[str, typer.Option(help="query or passage: which instruction the texts get.")] = "passage",
    field: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the text, or title,text for several; default: the side's in lbr prepare's record."
        ),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first DIM numbers of each embedding (Matryoshka runs).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Embed a file; continues where a killed run stopped."""
    from lbr_dist.inference.encode import encode_file

    if side not in ("query", "passage"):
        raise UserError(f"--side {side}: expected query or passage")
    if dim is not None:
        model += f"{'&' if '?' in model else '?'}dim={dim}"
    done = encode_file(model, source, out, side=side, field=field, device=device)  # type: ignore[arg-type]
    notes = [f"{done.resumed} from the earlier attempt"] * bool(done.resumed) + [f"{done.cut} cut"] * bool(done.cut)
    note = ", ".join(notes)
    print(f"written: {out}: {done.texts} embeddings of {done.width} numbers{f' ({note})' if note else ''}")


def search(
    model: Annotated[
        str,
        typer.Argument(
            callback=place, help="Run, checkpoint, export, sentence-transformers model, hf:PATH?pooling=mean, bm25."
        ),
    ],
    corpus: Annotated[str, typer.Argument(callback=place, help="Prepared set, or a file of texts.")],
    queries: Annotated[list[str], typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Results per query.")] = 5,
    field: Annotated[
        str | None,
        typer.Option(
            help="Field of the file that holds the text, or title,text for several; default: its answer or plain text."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Look at a model's results by eye."""
    from lbr_dist.inference.search import print_hits
    from lbr_dist.inference.search import search as run

    print_hits(queries, run(model, corpus, queries, k=k, field=field, device=device))


def report(
    runs: Annotated[
        list[str], typer.Argument(callback=place, help="Run folders and evaluations (eval.json or its folder).")
    ],
    out: Annotated[Path, typer.Option(callback=place, help="Folder for report.md and report.png.")] = Path("report"),
) -> None:
    """Compare runs: a Markdown table and a plot."""
    from lbr_dist.evaluation.report import report as write

    print(write(runs, out))
    print(f"written: {out}/report.md, report.png")
