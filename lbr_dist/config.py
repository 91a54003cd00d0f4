"""Typed recipes: every setting of a run, its default, and what it means.

The schema alone: values are checked one by one and against each other here; `recipes` reads the files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of settings; frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


class DataSet(Section):
    """One prepared set (the output of `lbr prepare`) in the mixture."""

    path: str
    """Folder, or URL prefix that webdataset can open, of a prepared set."""
    split: Literal["gl", "cl", "eval"] | None = None
    """Which side to read; default: `gl` for stage 1 and `cl` for stage 2."""
    weight: PositiveFloat = 1.0
    """Passes over this set in one epoch of the mixture: 1 uses each sample once, 0.5 half of them, 2 each twice."""
    target: Literal["sft", "reconstruct", "prefix"] | None = None
    """Stage 1 target for this set; default: `generative.target`."""


class Data(Section):
    """What is read, and how it is packed."""

    sets: Annotated[list[DataSet], Field(min_length=1)]
    """The prepared sets of the mixture."""
    bin_tokens: Positive = 4096
    """Capacity of one packed bin, in tokens, bottleneck tokens included."""
    max_x_tokens: Positive = 1024
    """Longest X (question, passage or document), in tokens, without Z."""
    max_y_tokens: Positive = 1024
    """Longest Y (answer or target), in tokens, end-of-sequence included."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to a longer sample; either way it is counted and reported."""
    window: Positive = 65536
    """Samples shuffled and packed together: the plan's memory, and the reach of its shuffle."""
    block: Positive = 64
    """Neighbouring rows that are shuffled as one unit before the window's own shuffle (sequential reads)."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes per rank; they never change the order of the data."""
    prefetch: Positive = 4
    """Micro-batches that each loader process prepares ahead."""
    cache_dir: str | None = None
    """Where remote shards are kept; default: a folder in the user's cache."""
    cache_gib: PositiveFloat = 20.0
    """Bound of that cache in GiB; the least recently used shards go first."""


class Generative(Section):
    """Stage 1 (paper section 3.2)."""

    target: Literal["sft", "reconstruct", "prefix"] = "sft"
    """sft: X = question, Y = answer; reconstruct: X = Y = document; prefix: X = D[:k], Y = D[k:], k drawn per row."""
    prefix_min: Share = 0.2
    """Smallest share of the document that becomes X with target `prefix`."""
    prefix_max: Share = 0.8
    """Largest share."""

    @model_validator(mode="after")
    def _order(self) -> Generative:
        if self.prefix_min > self.prefix_max:
            raise ValueError("generative.prefix_min is larger than generative.prefix_max")
        return self


class Contrastive(Section):
    """Stage 2 (paper section 3.3)."""

    temperature: PositiveFloat = 0.05
    """Softmax temperature tau on cosine similarities."""
    pooling: Literal["bottleneck", "last", "mean"] = "bottleneck"
    """Hidden state that represents a text: the last Z (LBR), the last token, or the mean over tokens (baselines)."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """Causal is the paper's; bidirectional is its ablation (paper section 5.1)."""
    query_instruction: str = ""
    """Text put before every query; it must end in a line break, so that it tokenizes the same with any query."""
    passage_instruction: str = ""
    """Text put before every passage; likewise."""
    hard_negatives: Annotated[int, Field(ge=0)] = 0
    """Hard negatives used per record, of those that the record carries in `negatives`."""
    two_way: bool = False
    """Add the passage-to-query loss (symmetric InfoNCE)."""
    mask_same_answer: bool = True
    """Do not count as negatives: passages of the query's own record id, with its own (normalised) answer, or with one
    of the record's `positives`."""
    margin: float | None = None
    """Do not count as negatives passages that score above the positive plus this margin (cosine); None: off."""
    tile: Positive = 4096
    """Tile squared scores are held at a time: the loss's memory grows with that, not with the batch squared."""


class Batch(Section):
    """Batch semantics, stated once; accumulation is derived and never changes them."""

    global_batch: Positive
    """Samples per optimizer step over all ranks: packed bins in stage 1, query-passage pairs in stage 2."""
    micro_tokens: Positive | None = None
    """Most tokens in one forward pass of one rank; default: one bin (`data.bin_tokens`)."""


class Optim(Section):
    """Optimizer and schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay; sgd: plain, for exactness tests."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    z_lr: PositiveFloat | None = None
    """Peak learning rate of the bottleneck vectors; default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On matrices only: norms, biases and Z have none."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: Share = 0.05
    """Share of the run's samples over which the rate rises from 0."""
    final_lr: Share = 0.1
    """Rate at the end, as a share of the peak (cosine and linear)."""


class Duration(Section):
    """How long to train; exactly one of the two."""

    epochs: PositiveFloat | None = None
    """Passes over the mixture (may be fractional)."""
    steps: Positive | None = None
    """Optimizer steps."""

    @model_validator(mode="after")
    def _one(self) -> Duration:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("duration needs exactly one of duration.epochs and duration.steps")
        return self


class Checkpoint(Section):
    """When checkpoints are written and which are kept. The last step is always saved."""

    every_steps: Positive = 500
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this many steps are never removed."""
    asynchronous: bool = True
    """Write in the background: training waits for the copy to host memory only."""


class Tracking(Section):
    """Metrics: always to metrics.jsonl in the run, and to wandb when named."""

    every_steps: Positive = 1
    """Steps between logged rows."""
    wandb_project: str | None = None
    """wandb project; None: wandb is not used."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """offline writes files that `wandb sync` uploads."""
    name: str | None = None
    """Name of the run in tables and plots; default: its folder's name."""


class Recipe(Section):
    """A whole run."""

    stage: Literal["generative", "contrastive"]
    """Stage 1 (generative) or stage 2 (contrastive)."""
    output: str
    """Run folder: recipe, metrics and checkpoints."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order, of dropout and of newly made parameters."""
    model: Model
    data: Data
    bottleneck: Bottleneck = Bottleneck()
    generative: Generative = Generative()
    contrastive: Contrastive = Contrastive()
    batch: Batch
    optim: Optim = Optim()
    duration: Duration
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    deepspeed: str = "auto"
    """A name in ds_configs/ (zero3, zero2, zero3_offload, cpu ...) or the path of a DeepSpeed JSON file. `auto`: zero3
    on GPUs, cpu (also stage 3) on several CPU processes, and on one, where there is nothing to partition, zero0 (with
    bfloat16: zero1)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop and dump the step's sample ids, or skip the step."""
    max_skips: Positive = 10
    """Skipped steps after which the run stops all the same."""
    step_timeout: PositiveFloat = 1800.0
    """Seconds without a finished step after which every rank writes its Python stacks and ends (a hung rank)."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.stage == "contrastive" and self.contrastive.pooling == "bottleneck" and not self.bottleneck.enabled:
            raise ValueError(
                "contrastive.pooling is 'bottleneck' but bottleneck.enabled is false: "
                "set contrastive.pooling=last or mean, or enable the bottleneck"
            )
        if self.stage == "generative" and self.data.max_x_tokens + self.data.max_y_tokens > self.data.bin_tokens:
            raise ValueError(
                f"data.bin_tokens ({self.data.bin_tokens}) cannot hold a sample of data.max_x_tokens + "
                f"data.max_y_tokens ({self.data.max_x_tokens + self.data.max_y_tokens}) tokens: "
                "raise bin_tokens or lower the two"
            )
        if self.stage == "contrastive":
            for field in ("query_instruction", "passage_instruction"):
                text = getattr(self.contrastive, field)
                if text and not text.endswith("\n"):
                    raise ValueError(f"contrastive.{field} must end in a line break (\\n)")
        return self

    def split_of(self, data_set: DataSet) -> str:
        """Split that this run reads from `data_set`."""
        return data_set.split or ("gl" if self.stage == "generative" else "cl")

    def target_of(self, data_set: DataSet) -> str:
        """Stage 1 target of `data_set`."""
        return data_set.target or self.generative.target
