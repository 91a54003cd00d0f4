"""Text to token ids, with nothing implied: no special tokens, no truncation, no padding.

Lengths are indexed once, at preparation, and the plan packs by them; so the tokens of a text must be the same in every
process and on every machine. `Tokenization` therefore keeps the whole tokenizer as one JSON text: it pickles into
loader processes without the model folder (and without importing transformers there), and its fingerprint is the hash of
what decides the tokens of a plain text. What only decorates them (post-processor, padding, truncation, and the tokens
that an export adds) is left out, so that an exported tokenizer counts as the same one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer

from lbr_dist.errors import UserError, one_line
from lbr_dist.model.hub import cached_first, snapshot

PAD = "<|lbr_pad|>"
"""Text of the padding token in the exported vocabulary of a tokenizer without any special token."""
BEGINNINGS = (
    "What is it?",
    "Aspirin (acetylsalicylic acid) is a salicylate; it relieves pain, fever and inflammation.",
    "(a) 1",
    "def add(a, b):\n    return a + b  # 1+1=2",
    "Überfunktion der Schilddrüse, Diabetes mellitus, ciężka niewydolność nerek, ÉTAT DE CHOC",
    "糖尿病是一种以高血糖为特征的代谢性疾病。",
    "糖尿病は、高血糖を特徴とする代謝疾患です。",
    "السكري هو مرض استقلابي",
    "मधुमेह एक चयापचय रोग है",
    "🧪🧬 H₂O → CO₂ ½ ﬁ",
)
"""Texts by which an instruction is judged: behind one that may be exported, each has the tokens that it has alone.
And a tokenizer: most have the tokens that its file gives them."""
_OWN, _Z = "<|lbr_", "<|lbr_z_{}|>"
_DECORATION = ("post_processor", "padding", "truncation")


def z_token(index: int) -> str:
    """Text of bottleneck token `index` in an exported vocabulary."""
    return _Z.format(index)


@dataclass(frozen=True)
class Tokenization:
    """A fast tokenizer reduced to what training and encoding need; picklable.

    Attributes:
        path: Folder or hub name that it was loaded from.
        fingerprint: Hash over vocabulary, merges, normaliser, pre-tokenizer and added tokens; independent of the path.
        bos: Ids that the tokenizer puts before any text by default: `[]` or `[bos_id]`.
        eos_id: End-of-sequence id, or None where the tokenizer names none.
    """

    path: str
    fingerprint: str
    bos: list[int]
    eos_id: int | None
    _text: str = field(repr=False)
    _loaded: list[Tokenizer] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def load(cls, path: str) -> Tokenization:
        """Load the tokenizer of a model folder (or by a hub name).

        Raises:
            UserError: there is no tokenizer, only a slow one, or its file is not what transformers makes of it.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = cached_first(
                AutoTokenizer.from_pretrained, path, needs="tokenizer.json", trust_remote_code=False
            )  # without that file Qwen2Tokenizer has one token, and is content
        except Exception as error:
            reason = one_line(error)
            raise UserError(
                f"tokenizer {path}: cannot be loaded ({reason}); give a folder that holds tokenizer.json, or a hub name"
            ) from None
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {path}: has no fast version (tokenizer.json), which lbr needs; convert it first"
            )
        _check_obeyed(path, tokenizer)
        text = tokenizer.backend_tokenizer.to_str()
        return cls(str(path), _fingerprint(text), _prefix(text), tokenizer.eos_token_id, text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens and uncut."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def begins_anew_after(self, prefix: str) -> bool:
        """Whether texts behind `prefix` have the tokens that they have alone.

        They do where a tokenizer cuts at the prefix's end, and not where it marks a text's first word (Llama 2). Texts
        that begin with white space are not asked about.
        """
        front, *alone = self.encode([prefix, *BEGINNINGS])
        return self.encode([prefix + text for text in BEGINNINGS]) == [front + ids for ids in alone]

    def first_difference(self, other: Tokenization) -> str | None:
        """A vocabulary entry's text that `other` gives other tokens; None where there is none."""
        if self.fingerprint == other.fingerprint:
            return None
        ids = sorted(self._tokenizer.get_vocab().values())
        texts = self._tokenizer.decode_batch([[token] for token in ids], skip_special_tokens=False)
        both = zip(texts, self.encode(texts), other.encode(texts), strict=True)
        return next((text for text, mine, theirs in both if mine != theirs), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are dropped."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def end(self) -> list[int]:
        """Token ids that the tokenizer puts behind a text, which training does not use."""
        alone = self._tokenizer.encode("a")
        special = alone.special_tokens_mask
        return alone.ids[len(special) - special[::-1].index(0) :] if 0 in special else []

    @property
    def vocabulary(self) -> int:
        """Number of ids, added tokens and gaps included: the rows that an embedding must have."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def _tokenizer(self) -> Tokenizer:
        if not self._loaded:
            self._loaded.append(_bare(Tokenizer.from_str(self._text)))
        return self._loaded[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": []}


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself, without truncation and padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_obeyed(path: str, tokenizer: Any) -> None:
    """See that most texts have the tokens that they have by tokenizer.json.

    Of a family that transformers has a class for (Qwen2), or by the class that tokenizer_config.json names, it takes
    no more than vocabulary and merges from the file. A few texts may differ, by how such a class normalises.

    Raises:
        UserError: they have others.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(path) if Path(path).is_dir() else snapshot(path)
    file, made = (folder or Path(path)) / "tokenizer.json", type(tokenizer)
    if made is PreTrainedTokenizerFast or not file.is_file():  # that one is what the file says
        return
    both = map(_bare, (Tokenizer.from_file(str(file)), Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())))
    by_file, loaded = ([one.encode(text, add_special_tokens=False).ids for text in BEGINNINGS] for one in both)
    if sum(a != b for a, b in zip(by_file, loaded, strict=True)) > len(BEGINNINGS) / 2:
        raise UserError(
            f"tokenizer {path}: its tokenizer.json is of another kind than the {made.__name__} that transformers makes "
            "of it; set tokenizer_class to PreTrainedTokenizerFast in its tokenizer_config.json, or where the family "
            "does not allow that (qwen2) use a model with its family's own tokenizer"
        )


def _fingerprint(text: str) -> str:
    parts = {name: part for name, part in json.loads(text).items() if name not in _DECORATION}
    parts["added_tokens"] = [t for t in parts["added_tokens"] if not t["content"].startswith(_OWN)]
    vocabulary = parts["model"].get("vocab")
    if isinstance(vocabulary, dict):
        parts["model"]["vocab"] = {name: token for name, token in vocabulary.items() if not name.startswith(_OWN)}
    return xxhash.xxh128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())


def _prefix(text: str) -> list[int]:
    """Ids that the post-processor puts before a text."""
    encoding = _bare(Tokenizer.from_str(text)).encode("a", add_special_tokens=True)
    special = encoding.special_tokens_mask
    return encoding.ids[: special.index(0) if 0 in special else 0]
