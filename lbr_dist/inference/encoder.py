"""Texts to unit vectors: of a trained run, of any sentence-transformers model (of any other: `hf_encoder`).

A text's vector must depend on the text alone. So our own models are packed without padding (nothing to mask, nothing to
waste), and whatever the order or the company of the texts, they are sorted by length, embedded, and put back in order;
in float32 the vectors of two calls agree to about 1e-6. What is too long is cut as in training, and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from lbr_dist.config import Recipe
from lbr_dist.data.information import known_bits
from lbr_dist.data.progress import bar
from lbr_dist.data.sources.row_values import unseen
from lbr_dist.errors import UserError
from lbr_dist.inference.model_folder import check_padding, unreadable
from lbr_dist.model.batching import batches
from lbr_dist.model.tokenizer import Tokenization

if TYPE_CHECKING:
    import torch

    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.model.layout import Sample
    from lbr_dist.model.surprisal import Scorer

Side = Literal["query", "passage"]

MICRO_TOKENS = 8192
"""Tokens in one forward pass: large enough to keep a device busy, small enough for the activations of a large model."""
CPU_MICRO_TOKENS = 2048
"""The same on a CPU, whose caches hold no more."""


class Encoder(Protocol):
    """Anything that embeds texts."""

    name: str
    """For tables."""

    @property
    def cut(self) -> int:
        """Texts that were too long and lost their end, over all calls."""

    def encode(self, texts: Sequence[str], side: Side = "passage", progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 [texts, D], in the order of the texts."""


class PackedEncoder:
    """A trained run: packed, with its own instructions, bottleneck, pooling and attention."""

    def __init__(self, model: LbrModel, tokenization: Tokenization, recipe: Recipe, name: str) -> None:
        """`model` is used where it lies and in the precision that it has; `recipe` is the run's."""
        self.model, self.recipe, self.name = model.eval(), recipe, name
        self.pooling = recipe.pooling
        self.tokenization = tokenization
        self.checkpoint: dict[str, str] = {}
        """Where the weights came from: `name` and `digest` of the checkpoint, where there is one."""
        self.cut = 0
        self.fixed_z: int | None = None
        """Bottleneck tokens for every text, instead of the number that the recipe gives each."""
        contrastive = recipe.contrastive
        instructions = tokenization.encode([contrastive.query_instruction, contrastive.passage_instruction])
        self._prefix: dict[Side | None, list[int]] = {
            None: tokenization.bos,
            "query": tokenization.bos + instructions[0],
            "passage": tokenization.bos + instructions[1],
        }

    def samples(self, texts: Sequence[str], side: Side | None) -> list[Sample]:
        """X (beginning of sequence, instruction, text; cut to `data.max_x_tokens`) and |Z| of each text.

        Args:
            side: whose instruction; None: no instruction, as in stage 1 (and `cut` counts nothing: these are
                questions that were encoded before).
        """
        from lbr_dist.model.layout import Sample

        prefix, limit = self._prefix[side], self.recipe.data.max_x_tokens
        encoded = self.tokenization.encode(texts)
        if side is not None:
            self.cut += sum(len(prefix) + len(ids) > limit for ids in encoded)
        inputs = [(prefix + ids)[:limit] for ids in encoded]
        if self.fixed_z is not None:
            return [Sample(x, self.fixed_z) for x in inputs]
        x_bits = [0.0] * len(inputs)
        if self._scorer is not None:
            kept = np.array([len(x) - len(prefix) for x in inputs])
            x_bits = known_bits(self._scorer.bits(encoded), np.array([len(ids) for ids in encoded]), kept).tolist()
        return [Sample(x, self.recipe.bottleneck.length(len(x), bits)) for x, bits in zip(inputs, x_bits, strict=True)]

    @cached_property
    def _scorer(self) -> Scorer | None:
        surprisal = self.recipe.bottleneck.by_surprisal
        if surprisal is None:
            return None
        from lbr_dist.model.surprisal import Scorer

        return Scorer(surprisal.model, self.tokenization, self.model.device)

    def encode(self, texts: Sequence[str], side: Side = "passage", progress: bool = False) -> np.ndarray:
        """See `Encoder`. A text of no tokens at all, in a model without bottleneck, is the zero vector."""
        import torch

        from lbr_dist.model.layout import pack

        bottleneck = self.recipe.bottleneck
        samples = self.samples(texts, side)
        lengths = np.array([len(s.x) + s.z for s in samples], dtype=np.int64)
        out: np.ndarray | None = None
        with torch.inference_mode(), bar(self.name, len(texts), progress) as advance:
            for rows in batches(lengths, micro_tokens(self.model.device)):
                real = rows[lengths[rows] > 0]
                if len(real) == 0:
                    continue
                batch = pack(
                    [samples[row] for row in real],
                    bottleneck_vectors=bottleneck.count,
                    hide_x=bottleneck.enabled,
                    causal=self.recipe.contrastive.attention == "causal",
                ).to(self.model.device)
                vectors_SD = self.model(batch, "embed", pooling=self.pooling).float().cpu().numpy()
                if out is None:
                    out = np.zeros((len(texts), vectors_SD.shape[1]), dtype=np.float32)
                out[real] = vectors_SD
                advance(len(real))
        width = self.model.causal_lm.config.hidden_size
        return unit(out if out is not None else np.zeros((len(texts), width), dtype=np.float32))


class SentenceTransformerEncoder:
    """Any sentence-transformers model, our own exports included."""

    def __init__(self, path: str, device: str) -> None:
        """Load a folder, or by a hub name.

        Raises:
            UserError: it cannot be loaded, lacks weights, or its tokenizer cannot pad.
        """
        from sentence_transformers import SentenceTransformer

        from lbr_dist.model.hub import cached_first
        from lbr_dist.model.plain import whole_models

        try:
            with whole_models(f"model {path}"):
                self.model = cached_first(SentenceTransformer, path, needs="modules.json", device=device)
        except UserError:
            raise
        except Exception as error:
            raise UserError(unreadable(path, error)) from None
        check_padding(path, self.model.tokenizer)
        self.name = path.rstrip("/").rsplit("/", 1)[-1]
        self.cut = 0

    def encode(self, texts: Sequence[str], side: Side = "passage", progress: bool = False) -> np.ndarray:
        """See `Encoder`; the model's own prompts for queries and documents are applied. Cut texts are not counted.

        A text of no tokens at all is the zero vector: a batch of nothing else is an error in many models.
        """
        shown = progress and sys.stderr.isatty()  # as ours; theirs asks nobody
        options: dict[str, Any] = {"show_progress_bar": shown, "convert_to_numpy": True}
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        bare = self._without_tokens(texts, side)
        kept_N = np.array([text not in bare for text in texts], dtype=bool)
        kept = [text for text in texts if text not in bare]
        vectors_ND = np.asarray(encode(kept or ["a"], **options), dtype=np.float32)
        out_ND = np.zeros((len(texts), vectors_ND.shape[1]), dtype=np.float32)
        out_ND[kept_N] = vectors_ND[: len(kept)]
        return unit(out_ND)

    def _without_tokens(self, texts: Sequence[str], side: Side) -> set[str]:
        """Those of the texts that have no token, nor a prompt before them."""
        from transformers import PreTrainedTokenizerBase

        tokenizer, prompts = self.model.tokenizer, self.model.prompts
        names = ("query",) if side == "query" else ("document", "passage", "corpus")  # as theirs looks for one
        name = next((name for name in names if name in prompts), self.model.default_prompt_name)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or prompts.get(name or ""):
            return set()
        return {text for text in set(texts) if unseen(text) and not tokenizer(text)["input_ids"]}


class TruncatedEncoder:
    """Another encoder's vectors, cut to their first dimensions and normalised again (Matryoshka embeddings)."""

    def __init__(self, inner: Encoder, dim: int) -> None:
        """Embed one short text by `inner`.

        Raises:
            UserError: its embeddings have fewer dimensions.
        """
        width = inner.encode(["a"]).shape[1]
        if width < dim:
            raise UserError(
                f"model {inner.name}: its embeddings have {width} dimensions, fewer than {dim}; lower dim={dim}"
            )
        self.inner, self.dim, self.name = inner, dim, f"{inner.name} [{dim}]"

    @property
    def cut(self) -> int:
        """Texts that were too long."""
        return self.inner.cut

    def encode(self, texts: Sequence[str], side: Side = "passage", progress: bool = False) -> np.ndarray:
        """See `Encoder`."""
        return unit(self.inner.encode(texts, side, progress)[:, : self.dim])


def micro_tokens(device: torch.device) -> int:
    """Tokens in one forward pass."""
    return CPU_MICRO_TOKENS if device.type == "cpu" else MICRO_TOKENS


def unit(rows_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length, in float32; zero rows stay zero."""
    norm_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND / np.where(norm_N1 > 0, norm_N1, 1).astype(np.float32)


def check_finite(rows_ND: np.ndarray, names: Sequence[str], model: str) -> None:
    """Refuse vectors that nothing can be compared with.

    Args:
        names: of the rows, for the message.
        model: likewise.

    Raises:
        UserError: a row has a number that is not finite.
    """
    finite_N = np.isfinite(rows_ND).all(1)
    if not finite_N.all():
        first = names[int(np.argmin(finite_N))]
        shown = first if len(first) <= 60 else f"{first[:60]}..."
        raise UserError(f"model {model}: its embedding of {shown} is not finite: the model is damaged")
