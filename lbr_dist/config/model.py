"""Settings of the backbone and of its bottleneck tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lbr_dist.config.base import Positive, PositiveFloat, Section, Share


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021) through peft; Z is always trained beside them."""

    r: Positive = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    train_modules: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapters, for example `embed_tokens`."""


class Model(Section):
    """The backbone: a causal language model of the Llama, Qwen2 or Qwen3 family."""

    path: str
    """Model folder (or hub name, if it is in the local cache) in Hugging Face format, with its tokenizer."""
    start_from: str | None = None
    """A finished run or a checkpoint whose weights (Z included) this run starts from; `path` is then its base model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. bfloat16 keeps float32 master weights in the optimizer."""
    attention: Literal["auto", "varlen", "flex", "sdpa"] = "auto"
    """Attention backend: `auto` takes variable-length flash on CUDA and SDPA on CPU."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""


class Bottleneck(Section):
    """The bottleneck tokens Z (paper section 3.2). A run with neither a bottleneck nor Z is the paper's GL baseline."""

    enabled: bool = True
    """Insert Z, and hide X from Y. False: plain generative learning, Y sees X; no Z in the sequence."""
    tokens: Positive | None = None
    """A fixed number of bottleneck tokens; excludes `ratio`. Needed for an export that plain libraries can load."""
    ratio: PositiveFloat | None = None
    """R = |X| / |Z| (paper section 3.2): |Z| = ceil(|X| / R). Default 500 where `tokens` is not set."""
    max_tokens: Positive = 8
    """The most bottleneck tokens a sample gets in ratio mode: the number of learned vectors."""

    @model_validator(mode="after")
    def _one_way(self) -> Bottleneck:
        if self.tokens is not None and self.ratio is not None:
            raise ValueError("bottleneck.tokens and bottleneck.ratio exclude each other: set one of them")
        return self

    @property
    def count(self) -> int:
        """Number of learned bottleneck vectors K; 0 where the bottleneck is off."""
        if not self.enabled:
            return 0
        return self.tokens if self.tokens is not None else self.max_tokens

    @property
    def effective_ratio(self) -> float | None:
        """R in ratio mode, None where the count is fixed or the bottleneck is off."""
        if not self.enabled or self.tokens is not None:
            return None
        return self.ratio if self.ratio is not None else 500.0

    def length(self, x_tokens: int) -> int:
        """|Z| of a sample whose X has `x_tokens` tokens."""
        if not self.enabled:
            return 0
        if self.tokens is not None:
            return self.tokens
        ratio = self.effective_ratio
        assert ratio is not None
        return max(1, min(self.max_tokens, int(-(-x_tokens // ratio))))
