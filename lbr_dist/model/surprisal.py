"""The information in a text, in bits: the summed surprisal of its tokens under a causal language model.

A plain transformers model in padded batches, in float32: the model is frozen and small beside the one in training, and
each text is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, log2
from typing import Any

import numpy as np
import torch

from lbr_dist.errors import UserError
from lbr_dist.model.batching import batches, pad
from lbr_dist.model.plain import load_plain, position_limit
from lbr_dist.model.tokenizer import Tokenization

WINDOW = 1024
"""Tokens of a text that are measured; a longer one is taken to go on as it began."""
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist at a time, but for a text that has more by itself: 16 MiB in a CPU's cache, 512 MiB on a GPU."""


class Scorer:
    """A causal language model that tells how many bits a text has."""

    def __init__(self, path: str, tokenization: Tokenization, device: torch.device | str) -> None:
        """Load it.

        Args:
            path: model folder.
            tokenization: of the texts.

        Raises:
            UserError: it cannot be loaded, has another tokenizer, or sees the tokens that it is to predict.
        """
        from transformers import AutoModelForCausalLM

        own = Tokenization.load(path)
        if own.fingerprint != tokenization.fingerprint:
            raise UserError(
                f"surprisal model {path}: its tokenizer is {own.fingerprint[:12]}, that of the texts is "
                f"{tokenization.fingerprint[:12]}: name a model with the same tokenizer"
            )
        self._model = load_plain(AutoModelForCausalLM, path, device, f"surprisal model {path}")
        settings = self._model.config
        if not getattr(settings, "is_causal", True):
            raise UserError(
                f"surprisal model {path}: its attention is bidirectional (is_causal: false in its config.json), so it "
                "sees the tokens that it is to predict: name the model that it was trained from, or another causal one"
            )
        if _looks_ahead(self._model):
            raise UserError(
                f"surprisal model {path}: its attention is bidirectional (family {settings.model_type}), so it sees "
                "the tokens that it is to predict: name a causal language model"
            )
        self._path = path
        self._start = tokenization.bos or ([] if tokenization.eos_id is None else [tokenization.eos_id])
        vocabulary = settings.vocab_size
        self._first = 0.0 if self._start else log2(vocabulary)  # of a token that nothing comes before
        positions = position_limit(settings)
        self._window = min(WINDOW, positions - len(self._start)) if positions else WINDOW
        self._batch_tokens = LOGITS[self._model.device.type] // vocabulary

    def bits(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Bits of each text, given as token ids without special tokens, float32 [texts].

        Raises:
            UserError: the model's probabilities are not finite.
        """
        out = np.zeros(len(texts), dtype=np.float32)
        inputs = [[*self._start, *ids[: self._window]] if ids else [] for ids in texts]
        for rows in batches(np.array([len(ids) for ids in inputs]), self._batch_tokens, padded=True):
            real = [row for row in rows.tolist() if inputs[row]]
            if real:
                out[real] = self._batch([inputs[row] for row in real])
        if not np.isfinite(out).all():
            raise UserError(f"surprisal model {self._path}: gives probabilities that are not finite: it is damaged")
        longer = [max(1.0, len(ids) / self._window) for ids in texts]
        return out * np.array(longer, dtype=np.float32)

    @torch.inference_mode()
    def _batch(self, inputs: list[list[int]]) -> np.ndarray:
        ids_BT, mask_BT = pad(inputs, self._model.device)
        logits_BTV = self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        targets_BT = ids_BT[:, 1:]
        nats_BT = logits_BTV.logsumexp(-1)[:, :-1] - logits_BTV[:, :-1].gather(-1, targets_BT[..., None])[..., 0]
        return (nats_BT * mask_BT[:, 1:]).sum(1).cpu().numpy() / log(2) + self._first


@torch.inference_mode()
def _looks_ahead(model: Any) -> bool:
    """Whether a text's last token moves the logits before it, by more than a mixture of experts is exact to."""
    ids_BT = torch.arange(8, device=model.device).repeat(2, 1) % model.config.vocab_size
    ids_BT[1, -1] = 0
    logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits[:, :-1]
    moved = (logits_BTV[0] - logits_BTV[1]).abs().max()
    return bool(moved > 1e-4 * logits_BTV.abs().max())
