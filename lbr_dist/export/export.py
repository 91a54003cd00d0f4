"""A trained run to a folder that sentence-transformers and transformers load without lbr_dist and without remote code.

The folder is written beside its destination and renamed at the end, after a check: a handful of awkward texts (empty,
far too long, non-Latin) must have the same vectors from plain sentence-transformers as from the run. So an export that
exists is an export that agrees; what a tokenizer of some family does differently is found here and not in production.
One difference is told and not refused: many tokenizers join the white space that a text begins with to the line break
of an instruction before it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lbr_dist.disk import FULL, new_folder
from lbr_dist.errors import UserError
from lbr_dist.evaluation.table import read_evaluation
from lbr_dist.export.tokens import fixed_tokens
from lbr_dist.inference.model_folder import EXPORT_RECIPE
from lbr_dist.model.tokenizer import BEGINNINGS, Tokenization
from lbr_dist.recipes import load_recipe, save_recipe
from lbr_dist.training.checkpoint.chosen import with_checkpoint
from lbr_dist.training.ds_config import name_accelerator

if TYPE_CHECKING:
    from lbr_dist.config import Recipe
    from lbr_dist.inference.loading import Run

log = logging.getLogger("lbr")

COSINE = {"float32": 0.9999, "bfloat16": 0.99}
"""Least agreement with the run that the check accepts; bfloat16 rounds weights to 3 digits."""

CHECK_TEXTS = (
    "",
    " ",
    "  leading and trailing spaces \n",
    "\n\nline breaks first\n- and\tinside\n",
    *BEGINNINGS,
    "a very long text that has to be cut somewhere " * 3000,
)


def export(
    run: str | Path,
    out: str | Path,
    *,
    tokens: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    scores: str | Path | None = None,
) -> Path:
    """Write a run or checkpoint as a sentence-transformers model.

    Args:
        run: run folder (its newest verified checkpoint) or checkpoint.
        out: folder to make; it may exist if it is empty.
        tokens: number of bottleneck tokens that every text gets, for a run where their number varies.
        dtype: of the weights on disk.
        scores: an `eval.json` for the model card; default: the run's own, if there is one that measured this
            checkpoint.

    Returns:
        `out`.

    Raises:
        UserError: `out` holds something or cannot be made, `scores` is no evaluation, the run has no checkpoint, its
            number of bottleneck tokens varies and `tokens` does not say how many, or a text has other tokens or
            another vector in sentence-transformers.
    """
    out = Path(out)
    evaluations = {} if scores is None else _named_evaluation(Path(scores))
    checkpoint = _check_tokens(run, tokens)
    if scores is None:
        evaluations = _own_evaluations(Path(run), checkpoint)
    with new_folder(out, f"export to {out}") as folder, _full_disk_by_number():
        with_checkpoint(
            run,
            lambda found: _write(run, found, folder, out, tokens, dtype, evaluations, scores is not None),
        )
    return out


@contextlib.contextmanager
def _full_disk_by_number() -> Iterator[None]:
    """A full disk, which safetensors and tokenizers tell in the text of errors of their own, as an OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        for number in FULL:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def _check_tokens(run: str | Path, tokens: int | None) -> str:
    """Refuse a number of bottleneck tokens that does not suit the run before any weight is read; returns the name of
    the checkpoint."""
    recipe, name = with_checkpoint(
        run,
        lambda checkpoint: (load_recipe(checkpoint / "recipe.yaml", kept=True), checkpoint.name),
        kinds={"extra"},
    )
    fixed_tokens(recipe, tokens)
    return name


def _named_evaluation(scores: Path) -> dict[Path, dict[str, Any]]:
    if not scores.is_file():
        raise UserError(f"--scores {scores}: no such file; give the eval.json that `lbr eval` wrote")
    return {scores: read_evaluation(scores, f"--scores {scores}")}


def _own_evaluations(run: Path, checkpoint: str) -> dict[Path, dict[str, Any]]:
    """What `lbr eval` left of the run, and of the checkpoint given by its path; of what `run` is comes first."""
    given = run.absolute().parent.name == "checkpoints"
    folder = (run.absolute().parent.parent if given else run) / "eval"
    files = [folder / "eval.json", folder / checkpoint / "eval.json"]
    return {
        file: read_evaluation(file, f"{file} (for the model card; --scores names another)")
        for file in (files[::-1] if given else files)
        if file.is_file()
    }


def _measured(evaluation: dict[str, Any], digest: str) -> bool:
    """Whether a model of the evaluation had the weights of this checkpoint."""
    return any(model.get("checkpoint", {}).get("digest") == digest for model in evaluation["models"])


def _write(
    run: str | Path,
    checkpoint: Path,
    folder: Path,
    out: Path,
    tokens: int | None,
    dtype: Literal["float32", "bfloat16"],
    evaluations: dict[Path, dict[str, Any]],
    named: bool,
) -> None:
    from lbr_dist.export.card import model_card, spaced_texts
    from lbr_dist.export.folder import write_sentence_transformers
    from lbr_dist.inference.loading import load_run

    loaded = load_run(run, "cpu", checkpoint)
    recipe = loaded.recipe
    evaluation = next((found for found in evaluations.values() if named or _measured(found, loaded.digest)), None)
    for file in evaluations if evaluation is None else ():
        log.warning(
            "%s: not put on the model card: it did not measure %s; run `lbr eval` again, or name it with --scores",
            file,
            loaded.checkpoint.name,
        )
    count = fixed_tokens(recipe, tokens)
    reference_ND = _reference(loaded, count)
    backbone = _write_model(loaded, folder, count, dtype)
    write_sentence_transformers(
        folder,
        width=backbone.config.hidden_size,
        pooling=recipe.pooling,
        max_tokens=recipe.data.max_x_tokens + count,
        query_instruction=recipe.contrastive.query_instruction,
        passage_instruction=recipe.contrastive.passage_instruction,
    )
    save_recipe(recipe, folder / EXPORT_RECIPE)
    del loaded.model, backbone
    _check_tokenizer(folder, loaded.tokenization)
    agreement, spaced = _check(folder, reference_ND, COSINE[dtype], recipe)
    if spaced is not None:
        log.warning("%s: behind an instruction, %s", out, spaced_texts(spaced))
    card = model_card(
        out,
        recipe,
        tokens=count,
        dtype=dtype,
        agreement=agreement,
        spaced=spaced,
        evaluation=evaluation,
        checkpoint=loaded.checkpoint.name,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_model(loaded: Run, folder: Path, count: int, dtype: str) -> Any:
    """Merge adapters, fold Z in, and save model and tokenizer. Uses the loaded model up."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    from lbr_dist.export.folder import fold, name_rotary_base, write_tokenizer

    model, recipe = loaded.model, loaded.recipe
    ids = write_tokenizer(loaded.model_dir, folder, vectors=count, max_tokens=recipe.data.max_x_tokens + count)
    backbone: Any = model.backbone
    if isinstance(backbone, PeftModel):
        backbone = backbone.merge_and_unload()
    rows, width = backbone.lm_head.weight.shape
    head = torch.nn.Linear(width, rows, bias=False, device="meta")  # a plain head in the place of ours
    head.weight = backbone.lm_head.weight
    backbone.lm_head = head
    original = AutoConfig.from_pretrained(str(loaded.model_dir))
    backbone.config.use_cache = True
    backbone.config.attention_dropout = original.attention_dropout
    backbone.config.is_causal = recipe.contrastive.attention == "causal"  # the base may say otherwise
    z_KD = model.z[-count:] if count and model.z is not None else None
    fold(backbone, z_KD, ids, Tokenization.load(str(folder)).vocabulary)
    if loaded.tokenization.eos_id is not None:  # what ended every Y in training; the base may name another
        backbone.generation_config.eos_token_id = loaded.tokenization.eos_id
    name_accelerator()  # transformers asks DeepSpeed, if there is one, how the model is sharded
    backbone.to(getattr(torch, dtype)).save_pretrained(str(folder), max_shard_size="4GB")
    name_rotary_base(folder / "config.json")
    return backbone


def _reference(loaded: Run, count: int) -> np.ndarray:
    """Vectors of the check texts as the run makes them, queries then passages."""
    from lbr_dist.inference.encoder import check_finite

    encoder = loaded.encoder()
    encoder.fixed_z = count if loaded.recipe.bottleneck.enabled and count else None
    vectors_ND = np.concatenate([encoder.encode(CHECK_TEXTS, "query"), encoder.encode(CHECK_TEXTS, "passage")])
    check_finite(vectors_ND, [repr(text) for text in CHECK_TEXTS * 2], encoder.name)
    return vectors_ND


def _check_tokenizer(folder: Path, own: Tokenization) -> None:
    differs = own.first_difference(Tokenization.load(str(folder)))
    if differs is not None:
        raise UserError(
            f"export: the exported tokenizer gives {differs[:40]!r} other tokens than that of the run: use `lbr "
            "encode` for this run"
        )


def _check(folder: Path, reference_ND: np.ndarray, least: float, recipe: Recipe) -> tuple[float, float | None]:
    """Lowest cosine between the run's vectors and those of the folder in sentence-transformers.

    And that of texts that begin with white space and have an instruction before them, if they differ; None otherwise.
    """
    from sentence_transformers import SentenceTransformer

    from lbr_dist.model.plain import without_report

    with without_report():
        model = SentenceTransformer(str(folder), device="cpu")
    texts = list(CHECK_TEXTS)
    options: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
    vectors_ND = np.concatenate(  # the long one apart: beside it the others would be padded to its length
        [
            np.asarray(encode(part, **options))
            for encode in (model.encode_query, model.encode_document)
            for part in (texts[:-1], texts[-1:])
        ]
    )
    defined_N = reference_ND.any(axis=1)  # a text without any token has no vector
    cosines_N = np.where(defined_N, (vectors_ND.astype(np.float32) * reference_ND).sum(1), 1.0)
    cosines_N = np.nan_to_num(cosines_N, nan=-1)
    instructions = (recipe.contrastive.query_instruction, recipe.contrastive.passage_instruction)
    spaced_N = np.array([before != "" and text[:1].isspace() for before in instructions for text in texts])
    spaced = float(cosines_N[spaced_N].min(initial=1))
    if spaced < least:
        cosines_N[spaced_N] = 1
    worst = int(np.argmin(cosines_N))
    if not cosines_N[worst] >= least:
        side = "query" if worst < len(texts) else "passage"
        raise UserError(
            f"export: sentence-transformers gives another vector (cosine {cosines_N[worst]:.5f}, needed {least}) for "
            f"the {side} {texts[worst % len(texts)][:40]!r}; this tokenizer does not split as in training, probably at "
            f"the {side} instruction: use `lbr encode` for this run"
        )
    return float(cosines_N[worst]), spaced if spaced < least else None
