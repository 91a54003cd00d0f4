"""How large the experiments are: on two CPU cores within hours, or on one 80 GB GPU within minutes a table.

They differ in backbone and sizes and in nothing else. `small` is labelled so wherever its numbers stand: its
"LLM" is a language model of a million weights, made on the spot by next-token prediction on the domain's raw text.
`few-steps` has the backbone of `gpu` and the two cores of `small`, and so a fraction of the steps of either, one
learning rate for every arm, and hours for a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LANGUAGE_MODEL = (
    "bottleneck.enabled=false", "contrastive.pooling=mean", "generative.target=prefix", "generative.prefix_min=0",
    "generative.prefix_max=0", "data.sets=[{path: data/text}]",
)  # fmt: skip
"""Plain next-token prediction on raw text, as recipe settings."""


@dataclass(frozen=True)
class Scale:
    """Sizes of one scale."""

    title: str
    dev: int
    """Questions that learning rates are chosen on, one per entity."""
    test: int
    """Questions of the tables, one per entity."""
    generative: tuple[str, ...]
    contrastive: tuple[str, ...]
    joint: tuple[str, ...]
    """As many bins and pairs as the two stages have together."""
    language_model: tuple[str, ...] | None
    """Settings of the run that makes the base language model; None: the backbone is one already."""
    generative_rates: tuple[float, ...]
    """What is searched, for stage 1 and (below) stage 2; one of each: nothing is, and every arm takes them."""
    contrastive_rates: tuple[float, ...]
    judging_rate: float
    """The contrastive rate, one of those, with which the rates of stage 1 are judged."""
    threads: int | None = 1
    """Threads of each command; None: as the machine has."""
    generate: int = 100
    """Questions answered for BLEU-4 and ROUGE-L."""

    def backbone(self, out: Path, texts: list[Path], seed: int) -> None:
        """Write the backbone to a folder; `texts` are what a tokenizer may be trained on."""
        from benchmarks.paper import backbone

        if self.language_model is None:
            backbone.smollm2(out)
        else:
            backbone.random_llama(out, texts, seed)


SCALES = {
    "small": Scale(
        "small: a 0.9M-parameter Llama trained on the spot, two CPU cores",
        dev=500,
        test=1000,
        generative=("duration.steps=1200",),
        contrastive=("duration.steps=50",),
        joint=("joint.bins=6", "batch.global_batch=64", "duration.steps=200"),
        language_model=("optim.lr=2e-3", "duration.steps=600"),
        generative_rates=(1e-3, 2e-3, 4e-3),
        contrastive_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        judging_rate=1e-3,
    ),
    "few-steps": Scale(
        "few-steps: SmolLM2-135M, full fine-tuning in float32, two CPU cores, a tenth of the tokens of `gpu`",
        dev=500,
        test=1000,
        generative=("duration.steps=80",),
        contrastive=("batch.global_batch=64", "batch.micro_tokens=4096", "duration.steps=20"),
        joint=("joint.bins=4", "batch.global_batch=64", "duration.steps=20"),
        language_model=None,
        generative_rates=(2e-4,),
        contrastive_rates=(2e-4,),
        judging_rate=2e-4,
        threads=None,
    ),
    "gpu": Scale(
        "gpu: SmolLM2-135M, full fine-tuning in bfloat16, one 80 GB GPU",
        dev=1000,
        test=2000,
        generative=(
            "model.dtype=bfloat16",
            "data.bin_tokens=16384",
            "batch.global_batch=1",
            "duration.steps=null",
            "duration.epochs=1",
        ),
        contrastive=(
            "model.dtype=bfloat16",
            "batch.global_batch=512",
            "batch.micro_tokens=65536",
            "duration.steps=null",
            "duration.epochs=4",
        ),
        joint=(
            "model.dtype=bfloat16",
            "data.bin_tokens=8192",
            "joint.bins=1",
            "batch.global_batch=128",
            "batch.micro_tokens=65536",
            "duration.steps=null",
            "duration.epochs=4",
        ),
        language_model=None,
        generative_rates=(5e-5, 1e-4, 2e-4),
        contrastive_rates=(5e-5, 1e-4, 2e-4),
        judging_rate=1e-4,
        threads=None,
    ),
    "toy": Scale(
        "toy: only shows that everything runs",
        dev=20,
        test=20,
        generative=("duration.steps=2",),
        contrastive=("duration.steps=2", "batch.global_batch=8"),
        joint=("duration.steps=2", "batch.global_batch=8"),
        language_model=("duration.steps=2",),
        generative_rates=(1e-3,),
        contrastive_rates=(1e-3,),
        judging_rate=1e-3,
        generate=2,
    ),
}
