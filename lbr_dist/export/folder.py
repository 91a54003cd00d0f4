"""The files of an export: Z folded into vocabulary and embedding matrix, and what sentence-transformers reads.

Plain libraries know tokens, not learned vectors. So each bottleneck vector becomes an added token: its embedding row is
the vector, and the tokenizer's own post-processor appends the tokens after every text, where truncation cannot reach
them (tokenizers cut the text so that what the post-processor adds still fits). Nothing here needs lbr_dist afterwards.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lbr_dist.model.tokenizer import PAD, Tokenization, z_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

Pooling = Literal["bottleneck", "last", "mean"]


def write_tokenizer(source: Path, out: Path, *, vectors: int, max_tokens: int) -> list[int]:
    """Write the tokenizer of `source` with `vectors` bottleneck tokens behind every text.

    The beginning-of-sequence token stays in front where the tokenizer puts one by default; nothing is put behind Z. The
    chat template is left out: with one, sentence-transformers would wrap every text into a conversation. Padding, where
    the tokenizer has none, is a token that is special already, or a new one: an ordinary one would become special, and
    be cut out of the texts.

    Args:
        source: model folder with a fast tokenizer.
        vectors: K; 0 adds nothing.
        max_tokens: longest sequence, Z included.

    Returns:
        Ids of the bottleneck tokens, in order.
    """
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    original = AutoTokenizer.from_pretrained(str(source))
    backend = Tokenizer.from_str(original.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    special: dict[str, Any] = {k: v for k, v in original.special_tokens_map.items() if isinstance(v, str)}
    present = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    pad = special.setdefault("pad_token", special.get("eos_token") or next(iter(present), PAD))
    names = [z_token(index) for index in range(vectors)]
    backend = _with_special(backend, [*names, PAD] if pad == PAD else names)
    ids: list[int] = [backend.token_to_id(name) for name in names]  # type: ignore[misc]

    front: list[str] = [backend.id_to_token(token) for token in Tokenization.load(str(source)).bos]  # type: ignore[misc]
    backend.post_processor = processors.TemplateProcessing(
        single=[*front, "$A", *names],
        pair=[*front, "$A", "$B", *names],
        special_tokens=[(name, backend.token_to_id(name)) for name in {*front, *names}],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        **special,
    ).save_pretrained(str(out))
    _name_generic_class(out / "tokenizer_config.json")
    return ids


def _with_special(backend: Tokenizer, names: list[str]) -> Tokenizer:
    """Add special tokens, behind all ids that there are.

    Left to itself the library begins at the number of entries, which is a word's id where the ids have gaps; it takes
    an id that the vocabulary names.
    """
    from tokenizers import AddedToken, Tokenizer

    taken, settings = backend.get_vocab(), json.loads(backend.to_str())
    vocabulary = settings["model"]["vocab"]
    if max(taken.values()) >= len(taken) and isinstance(vocabulary, dict):  # a list has no gaps
        new = [name for name in names if name not in taken]
        vocabulary.update(zip(new, count(max(taken.values()) + 1), strict=False))
        backend = Tokenizer.from_str(json.dumps(settings))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def _name_generic_class(file: Path) -> None:
    """A class of its own family would rebuild the post-processor when it is loaded, and drop Z."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_rotary_base(file: Path) -> None:
    """Say the rotary positions in a config.json once more under their names before transformers 5.

    Version 4 passes over `rope_parameters` without a word, and takes a base of 10,000.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    scaling = dict(settings["rope_parameters"])
    settings["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] != "default":
        settings["rope_scaling"] = scaling
    _json(file, settings)


def fold(backbone: Any, z_KD: Tensor | None, ids: list[int], vocabulary: int = 0) -> None:
    """Make each bottleneck vector the embedding of its token, in place.

    Ids beyond the embedding matrix enlarge it (`config.vocab_size` follows), and so does a larger `vocabulary` (padding
    may be new too), whose row is zero. With tied embeddings the vectors are rows of the output head too, and with
    untied ones the new rows of the head are zero; either way generation never picks them, because
    `generation_config.suppress_tokens` forbids it.
    """
    import torch

    old = backbone.get_input_embeddings().weight.shape[0]
    rows = max(old, vocabulary, *(token + 1 for token in ids))
    if rows > old:
        backbone.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight
    with torch.no_grad():
        head[old:] = embedding[old:] = 0
        if z_KD is not None:
            embedding[ids] = z_KD.to(embedding)
    settings = backbone.generation_config
    if forbidden := {*ids, *range(old, rows)}:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *forbidden})


def write_sentence_transformers(
    out: Path, *, width: int, pooling: Pooling, max_tokens: int, query_instruction: str, passage_instruction: str
) -> None:
    """Write what sentence-transformers (3 and later) reads beside the model: its modules and the prompts."""
    names = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for number, name in enumerate(names)
    ]
    _json(out / "modules.json", modules)
    _json(out / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    (out / "1_Pooling").mkdir()
    (out / "2_Normalize").mkdir()
    _json(
        out / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": pooling != "mean",
            "include_prompt": True,
        },
    )
    _json(
        out / "config_sentence_transformers.json",
        {
            "prompts": {"query": query_instruction, "document": passage_instruction},
            "default_prompt_name": "document" if passage_instruction else None,
            "similarity_fn_name": "cosine",
        },
    )


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
