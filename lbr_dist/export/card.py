"""The README.md of an exported model: how it is used, what it was trained on and how, and what it scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lbr_dist.config import Recipe
from lbr_dist.data.shards import open_set
from lbr_dist.errors import UserError
from lbr_dist.evaluation.table import markdown_table
from lbr_dist.recipes import recipe_text


def model_card(
    folder: Path,
    recipe: Recipe,
    *,
    tokens: int,
    dtype: str,
    agreement: float,
    spaced: float | None,
    evaluation: dict[str, Any] | None,
    checkpoint: str,
) -> str:
    """Markdown with the front matter that sentence-transformers' hub pages read.

    Args:
        folder: the exported folder, as the user named it.
        recipe: of the run.
        tokens: bottleneck tokens behind every text.
        dtype: of the weights on disk.
        agreement: lowest cosine to the run's own vectors that the export check saw.
        spaced: that of texts that begin with white space, where an instruction makes them differ.
        evaluation: what `lbr eval` found, as in its `eval.json`.
        checkpoint: name of the checkpoint.
    """
    name = folder.absolute().name
    path = folder.as_posix() if not folder.is_absolute() and ".." not in folder.parts else name
    parts = [_front_matter(recipe), f"# {name}", _summary(recipe, tokens), _usage(path, recipe, tokens)]
    parts += [_data(recipe), _training(recipe, checkpoint)]
    if evaluation is not None:
        parts.append("## Scores\n\n" + markdown_table(evaluation))
    parts.append(_export_note(dtype, agreement, spaced))
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe) -> str:
    settings: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "lbr", "learn-before-represent"],
    }
    if _on_the_hub(recipe.model.path):
        settings["base_model"] = recipe.model.path
    return f"---\n{yaml.safe_dump(settings, sort_keys=False)}---"


def _on_the_hub(path: str) -> bool:
    """Whether a backbone's path is a hub name; the hub refuses a card whose `base_model` is none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def _summary(recipe: Recipe, tokens: int) -> str:
    if tokens:
        way = f"the hidden state of the last of {tokens} learned bottleneck tokens behind the text"
    else:
        mean = recipe.contrastive.pooling == "mean"
        way = "the mean of all hidden states" if mean else "the last token's hidden state"
    return (
        "A domain-specific text embedding model, trained with lbr_dist (Learn Before Represent) from "
        f"`{recipe.model.path}`. The embedding is {way}."
    )


def _usage(path: str, recipe: Recipe, tokens: int) -> str:
    text = f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{path}")  # where this folder is, or its name on a hub
queries = model.encode_query(["a question"])
passages = model.encode_document(["an answer", "another one"])
print(model.similarity(queries, passages))
```

Texts of more than {recipe.data.max_x_tokens} tokens are cut at the end."""
    if recipe.contrastive.attention == "bidirectional":
        return (
            text + " Attention is bidirectional (`is_causal: false` in config.json): transformers 5 or later is needed."
        )
    if not tokens:
        return text
    return (
        text
        + f"""

It is still a language model. Its tokenizer puts the bottleneck tokens behind the prompt, and the model continues from
there, with the whole prompt in sight:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}")
print(tokenizer.decode(model.generate(**tokenizer("a question", return_tensors="pt"), max_new_tokens=64)[0]))
```

Set `tokenizer.padding_side = "left"` to generate for several prompts at once."""
    )


def _data(recipe: Recipe) -> str:
    lines = []
    parts = [recipe.part(task) for task in recipe.tasks]
    for data_set, split in [(used, part.split_of(used)) for part in parts for used in part.data.sets]:
        try:
            opened = open_set(data_set.path)
            lines.append(f"- {opened.name}, split {split}: {opened.splits[split].records:,} records")
        except UserError:  # the data need not be where the export is made
            lines.append(f"- {Path(data_set.path).name}, split {split}")
    return "## Data\n\n" + "\n".join(lines)


def _training(recipe: Recipe, checkpoint: str) -> str:
    earlier = f" It started from the run `{recipe.model.start_from}`." if recipe.model.start_from else ""
    origin = f"Stage: {recipe.stage}, checkpoint {checkpoint}.{earlier}"
    return f"## Training\n\n{origin} The whole recipe:\n\n```yaml\n{recipe_text(recipe)}```"


def spaced_texts(cosine: float) -> str:
    """What is said of an export that differs from its run on texts that begin with white space."""
    other = f"another vector (cosine {cosine:.3f}) than `lbr encode` gives"
    return f"texts that begin with white space get {other}: strip them"


def _export_note(dtype: str, agreement: float, spaced: float | None) -> str:
    checked = f"Its vectors were compared with the run's own when it was written: lowest cosine {agreement:.6f}."
    if spaced is not None:
        checked += f" Behind an instruction, {spaced_texts(spaced)}."
    return f"## Export\n\nWeights in {dtype}. {checked}"
