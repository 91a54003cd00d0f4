"""What is wrong with a model's folder, by the name of the file: libraries that read it seldom say which.

Without some of an export's files they load it all the same, and give other vectors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbr_dist.errors import UserError, one_line

EXPORT_RECIPE = "lbr_recipe.yaml"
"""Marks a folder that `lbr export` made."""
EXPORT_FILES = (
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "config.json", "tokenizer_config.json", "tokenizer.json",
)  # fmt: skip
"""What each of them has beside its weights."""


def is_export(folder: Path) -> bool:
    """Whether `lbr export` made it."""
    return (folder / EXPORT_RECIPE).is_file()


def damage(folder: Path) -> str:
    """The first JSON file of a model that cannot be read, or that an export lacks, and why; "" where all is well."""
    whole = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    for file in [folder / name for name in EXPORT_FILES] if is_export(folder) else whole:
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
            return f"{file.relative_to(folder)}: {reason}"
    return ""


def damaged_export(spec: str, reason: str) -> str:
    """The message on an export of which something is wrong."""
    return f"model {spec}: a damaged or incomplete export ({reason}): copy it again or export again"


def unreadable(path: str, error: Exception) -> str:
    """The message on a model that sentence-transformers cannot load."""
    folder, reason = Path(path), one_line(error)
    if is_export(folder):
        return damaged_export(path, reason)
    no_model = f"model {path}: not a run, an export or a sentence-transformers model"
    if not folder.exists():
        return f"{no_model}: there is no such folder, and of the hub none of that name ({reason})"
    if not (folder / "modules.json").exists():
        return f"{no_model} ({reason}); a plain model folder needs a pooling: hf:PATH?pooling=mean"
    found = damage(folder)
    return f"model {path}: " + (f"{found}: copy or download it again" if found else f"cannot be loaded ({reason})")


def check_padding(path: str, tokenizer: Any) -> None:
    """See that a sentence-transformers model can pad, which it does with every batch.

    Raises:
        UserError: its tokenizer has nothing to pad with.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.pad_token is not None:
        return
    if is_export(Path(path)):
        raise UserError(damaged_export(path, "its tokenizer has no padding token"))
    name = json.dumps(tokenizer.eos_token or "TOKEN", ensure_ascii=False)
    remedy = f'name one in its tokenizer_config.json: "pad_token": {name}'
    raise UserError(f"model {path}: its tokenizer has no padding token; {remedy}")
