"""Settings of the backbone and of its bottleneck tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lbr_dist.config.base import BelowOne, Place, Positive, PositiveFloat, Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021) through peft; Z is always trained beside them."""

    r: Positive = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: BelowOne = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    train_modules: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapters, for example `embed_tokens`. A name stands for every module whose name
    ends so: `norm` is also the `input_layernorm` of each layer, `model.norm` the last one alone. The log lists them."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        listed = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        if value != "all-linear" and not listed:
            example = value if isinstance(value, str) else "q_proj, v_proj"
            raise ValueError(f"expected all-linear, or a list of names: write [{example}]")
        return value


class Model(Section):
    """The backbone: a causal language model of the Llama, Mistral, Qwen2 or Qwen3 family."""

    path: Place
    """Model folder in Hugging Face format, with its tokenizer, or a hub name (its cache first, without network)."""
    start_from: Place | None = None
    """A finished run or a checkpoint whose weights (Z included) this run starts from; `path` is then its base model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. bfloat16 keeps float32 master weights in the optimizer."""
    attention: Literal["auto", "varlen", "flex", "sdpa"] = "auto"
    """Attention backend: `auto` takes variable-length flash on CUDA and SDPA on CPU."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _kernel(self) -> Model:
        if self.attention == "varlen" and self.dtype == "float32":
            raise ValueError(
                "model.attention=varlen has no float32 kernel: set model.dtype=bfloat16, or model.attention=auto"
            )
        return self


class Surprisal(Section):
    """Bottleneck tokens by the information in a text instead of by its length: |Z| = ceil(bits of X / `bits`)."""

    model: Place
    """Causal language model (a folder with the run's tokenizer) whose surprisal counts as information. `lbr surprisal`
    measures the texts of a prepared set by it, and encoding needs it beside the run."""
    bits: PositiveFloat
    """Bits for each bottleneck token."""


class Bottleneck(Section):
    """The bottleneck tokens Z (paper section 3.2). A run with neither a bottleneck nor Z is the paper's GL baseline."""

    enabled: bool = True
    """Insert Z, and hide X from Y. False: plain generative learning, Y sees X; no Z in the sequence."""
    tokens: Positive | None = None
    """A fixed number of bottleneck tokens; excludes `ratio` and `surprisal`. An export has a fixed number: where it
    varies, `lbr export` needs `--tokens`, which is an approximation."""
    ratio: PositiveFloat | None = None
    """R = |X| / |Z| (paper section 3.2): |Z| = ceil(|X| / R). Default 500 where neither of the others is set."""
    surprisal: Surprisal | None = None
    """|Z| by the information in X."""
    max_tokens: Positive = 8
    """The most bottleneck tokens a sample gets where their number varies: the number of learned vectors."""

    @model_validator(mode="after")
    def _one_way(self) -> Bottleneck:
        given = [name for name in ("tokens", "ratio", "surprisal") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"bottleneck.{name}" for name in given)
            raise ValueError(f"{names} exclude each other: set one of them")
        return self

    @property
    def count(self) -> int:
        """Number of learned bottleneck vectors K; 0 where the bottleneck is off."""
        if not self.enabled:
            return 0
        return self.tokens if self.tokens is not None else self.max_tokens

    @property
    def by_surprisal(self) -> Surprisal | None:
        """What counts the information, None where something else decides |Z| or the bottleneck is off."""
        return self.surprisal if self.enabled else None

    @property
    def effective_ratio(self) -> float | None:
        """R in ratio mode, None where something else decides |Z| or the bottleneck is off."""
        if not self.enabled or self.tokens is not None or self.surprisal is not None:
            return None
        return self.ratio if self.ratio is not None else 500.0

    def length(self, x_tokens: int, x_bits: float = 0.0) -> int:
        """|Z| of a sample whose X has `x_tokens` tokens and, where `surprisal` counts, `x_bits` bits."""
        if not self.enabled:
            return 0
        if self.tokens is not None:
            return self.tokens
        amount, each = self.measure(x_tokens, x_bits)
        return max(1, min(self.max_tokens, int(-(-amount // each))))

    def fewest_and_most(self, x_tokens: int) -> tuple[int, int]:
        """Bounds of |Z| over texts of up to `x_tokens` tokens."""
        if self.by_surprisal is not None:
            return 1, self.max_tokens
        return self.length(0), self.length(x_tokens)

    def measure(self, tokens: Any, bits: Any) -> tuple[Any, float]:
        """Where |Z| varies: what it grows with (a number or an array), and how much there is to a bottleneck token."""
        if self.surprisal is not None:
            return bits, self.surprisal.bits
        ratio = self.effective_ratio
        assert ratio is not None
        return tokens, ratio
