"""Texts to unit vectors of any Hugging Face model of text (`hf:PATH?pooling=mean`) whose vectors are a text's own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lbr_dist.data.progress import bar
from lbr_dist.environment import out_of_memory
from lbr_dist.errors import UserError, one_line
from lbr_dist.inference.encoder import Side, micro_tokens, unit
from lbr_dist.model.batching import batches
from lbr_dist.model.tokenizer import Tokenization


class PaddedEncoder:
    """Any Hugging Face model of text with a pooling, through plain padded batches: causal ones, and BERT's family."""

    def __init__(self, path: str, pooling: Literal["mean", "last"], max_tokens: int, device: str) -> None:
        """Load the base model (without its head) of `path` in float32; texts are cut to the positions that it has,
        and what its tokenizer puts in front of them and behind them stays.

        Raises:
            UserError: not a model folder, a damaged one, an encoder with a decoder, not of text alone, or of a family
                whose vector of a text depends on the texts beside it.
        """
        from transformers import AutoConfig, AutoModel

        from lbr_dist.model.hub import cached_first
        from lbr_dist.model.plain import load_plain, position_limit

        self.path, self.name = path, f"{path.rstrip('/').rsplit('/', 1)[-1]} ({pooling})"
        self.tokenization = Tokenization.load(path)
        with contextlib.suppress(OSError, ValueError, KeyError):  # an adapter has none; else loading says what is wrong
            self._check_family(cached_first(AutoConfig.from_pretrained, path, trust_remote_code=False))
        self.model = load_plain(AutoModel, path, device, f"model hf:{path}")
        settings = self.model.config
        self._check_family(settings)
        positions = position_limit(settings) or max_tokens
        learned: Any = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        if getattr(learned, "padding_idx", None) is not None:  # RoBERTa's begin behind it
            positions -= learned.padding_idx + 1
        self.pooling, self.max_tokens, self.cut = pooling, min(max_tokens, positions), 0
        self._check_company()

    def _check_family(self, settings: Any) -> None:
        """Encoder alone (T5EncoderModel) or not, a family with a decoder is read as both."""
        both = settings.is_encoder_decoder or getattr(type(settings), "is_encoder_decoder", False)
        if both or not hasattr(settings, "hidden_size"):
            raise UserError(
                f"model hf:{self.path}: is a {settings.model_type}, and not a causal language model of text alone: "
                "name one that is"
            )

    def _check_company(self) -> None:
        """A short text beside a longer one is the same as alone, where attention is all that joins its tokens."""
        import torch

        two = self._inputs(self.tokenization.encode(["a short text", "a short text " * 8]))
        if not two[0]:  # a tokenizer that knows none of these words
            return
        with torch.inference_mode():
            alone_D, beside_D = self._forward(two[:1])[0], self._forward(two)[0]
        if np.abs(alone_D - beside_D).max() > 1e-4 * np.abs(alone_D).max():
            raise UserError(
                f"model hf:{self.path}: is a {self.model.config.model_type}, whose vector of a text depends on the "
                "texts beside it: name another model"
            )

    def encode(self, texts: Sequence[str], side: Side = "passage", progress: bool = False) -> np.ndarray:
        """See `Encoder`; both sides are the same, there are no instructions."""
        import torch

        encoded = self.tokenization.encode(texts)
        self.cut += sum(len(ids) > self._room for ids in encoded)
        inputs = self._inputs(encoded)
        lengths = np.array([len(x) for x in inputs], dtype=np.int64)
        out = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode(), bar(self.name, len(texts), progress) as advance:
            for rows in batches(lengths, micro_tokens(self.model.device), padded=True):
                out[rows] = self._forward([inputs[row] for row in rows])
                advance(len(rows))
        return unit(out)

    @property
    def _room(self) -> int:
        """Tokens of a text that are kept."""
        return max(0, self.max_tokens - len(self.tokenization.bos) - len(self.tokenization.end))

    def _inputs(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        return [self.tokenization.bos + ids[: self._room] + self.tokenization.end for ids in encoded]

    def _forward(self, inputs: list[list[int]]) -> np.ndarray:
        import torch

        from lbr_dist.model.batching import pad

        ids_BT, mask_BT = pad(inputs, self.model.device)
        try:
            hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        except (RuntimeError, IndexError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"model hf:{self.path}: cannot read a text of {ids_BT.shape[1]} tokens ({one_line(error)}): cut texts "
                "to fewer with &max_tokens=N, or name another model"
            ) from error
        lengths_B = mask_BT.sum(1)
        if self.pooling == "last":
            pooled_BD = hidden_BTD[torch.arange(len(inputs), device=ids_BT.device), (lengths_B - 1).clamp(min=0)]
        else:
            pooled_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / lengths_B.clamp(min=1)[:, None]
        return (pooled_BD * (lengths_B > 0)[:, None]).float().cpu().numpy()
