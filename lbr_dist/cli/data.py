"""`lbr prepare`, `mine` and `surprisal`: raw files to shards, and what is added to shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_dist.cli.options import finite, place, positive
from lbr_dist.errors import UserError


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            callback=place, help="Files, folders, globs, addresses or data sets; KIND=PATH gives one a kind of its own."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=place, help="Folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(callback=place, help="Model folder or name whose tokenizer the token counts are for.")
    ],
    kind: Annotated[
        str | None,
        typer.Option(help="question-answer, query-document, multiple-choice or corpus; default: recognised by fields."),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="ROLE=NAME for a field of another name, as question=prompt; ROLE= for none. Repeatable."),
    ] = None,
    gl: Annotated[
        str | None,
        typer.Option(help="Size of the GL side: a count, a share, or 'rest' (the default, unless another side is)."),
    ] = None,
    cl: Annotated[str | None, typer.Option(help="Size of the CL side.")] = None,
    eval_: Annotated[str | None, typer.Option("--eval", help="Size of the evaluation side.")] = None,
    entity: Annotated[
        str | None, typer.Option(help="FIELD or FIELD~REGEX: rows with the same value stay on one side.")
    ] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            callback=place,
            help="Evaluation set from elsewhere; connected training rows are dropped. Of its own kind, not of --kind.",
        ),
    ] = None,
    paragraphs: Annotated[
        bool, typer.Option(help="Plain text holds documents separated by blank lines, not one per line.")
    ] = False,
    similarity: Annotated[
        float,
        typer.Option(
            min=0.5, max=1, callback=finite, help="Jaccard similarity from which two texts are near-duplicates."
        ),
    ] = 0.7,
    max_chars: Annotated[
        int, typer.Option(min=1, help="Longest field, in characters; longer ones are bad rows.")
    ] = 100_000,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="A larger share of bad rows stops the run.")
    ] = 0.01,
    domain: Annotated[str, typer.Option(help="Domain of records that name none.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the set in tables; default: the folder's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the order and of the choice of sides.")] = 0,
    shard_records: Annotated[int, typer.Option(min=1, help="Most records in a shard.")] = 8192,
    shard_mib: Annotated[float, typer.Option(callback=positive, help="Largest shard, in MiB.")] = 256,
    overwrite: Annotated[bool, typer.Option(help="Replace a set made from other input, or a damaged one.")] = False,
) -> None:
    """Turn raw files into isolated GL / CL / eval shards."""
    from lbr_dist.data.preparation.prepare import prepare as run

    fields = dict[str, str]()
    for role, named in (_pair(item, "--field") for item in field or []):
        if role in fields:
            both = f"{fields[role]},{named}"
            raise UserError(f"--field {role} is given twice: several fields of one role are --field {role}={both}")
        fields[role] = named
    sizes = {side: size for side, size in (("gl", gl), ("cl", cl), ("eval", eval_)) if size is not None}
    report = run(
        sources, out, tokenizer=tokenizer, kind=kind, fields=fields, sizes=sizes or None, entity=entity,
        decontaminate=decontaminate or (), paragraphs=paragraphs, similarity=similarity, max_chars=max_chars,
        max_bad_share=max_bad_share, domain=domain, name=name, seed=seed, shard_records=shard_records,
        shard_mib=shard_mib, overwrite=overwrite,
    )  # fmt: skip
    print("\n".join(report.lines))


def mine(
    model: Annotated[
        str,
        typer.Argument(
            callback=place,
            help="Run, checkpoint, export, sentence-transformers model, hf:PATH, bm25, or a mined JSONL file.",
        ),
    ],
    data: Annotated[str, typer.Argument(callback=place, help="Prepared set; its cl side gets negatives.")],
    out: Annotated[Path, typer.Option(callback=place, help="Folder of the set to make.")],
    negatives: Annotated[int, typer.Option("--negatives", "-n", min=1, help="Negatives per query.")] = 8,
    skip: Annotated[int, typer.Option(min=0, help="First ranks that are passed over.")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="Last rank that is looked at.")] = 100,
    share: Annotated[
        float | None,
        typer.Option(
            callback=positive, help="Keep negatives that score below this share of the positive's score; default 0.95."
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Keep negatives that score below the positive's score minus this."),
    ] = None,
    index: Annotated[str, typer.Option(help="exact, ivf, or auto: by the size of the set.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a set made from other input, or a damaged one.")] = False,
) -> None:
    """Mine hard negatives with a model; continues where a killed run stopped."""
    from lbr_dist.mining.mine import mine as run

    report = run(
        model, data, out, count=negatives, skip=skip, depth=depth, share=share, margin=margin, index=index,
        device=device, overwrite=overwrite,
    )  # fmt: skip
    print("\n".join(report.lines))


def surprisal(
    data: Annotated[
        str, typer.Argument(callback=place, help="Prepared set; the texts of its gl and cl sides are measured.")
    ],
    model: Annotated[
        str, typer.Option(callback=place, help="Folder of a causal language model with the set's tokenizer.")
    ],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure the information in a set's texts, for bottleneck.surprisal; continues where a killed run stopped."""
    from lbr_dist.inference.surprisal import measure

    print("\n".join(map(str, measure(data, model, device))))


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"{flag} {text}: expected NAME=VALUE")
    return key, value
