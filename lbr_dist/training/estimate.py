"""`lbr plan`: what a recipe will need and take on N ranks, before anything is started.

Steps and tokens are not estimated: the plan knows them. Memory is counted tensor by tensor (docs/scaling.md has the
terms); time is operations over an assumed share of the peak, next to what the network must carry. The shares and
bandwidths are assumptions and are printed, so that a reader can put their own in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.launch.environment import Environment
from lbr_dist.training.ds_config import load_regime
from lbr_dist.training.flops import FlopCounter
from lbr_dist.training.preflight import Job, check
from lbr_dist.training.tracking import duration

GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """One device: memory in GiB, peak operations and link bytes per second, and the share of the peak assumed."""

    name: str
    memory_gib: float
    peak_flops: float
    inside: float
    """To the other devices of the node, bytes/s."""
    outside: float
    """To other nodes, bytes/s per device."""
    per_node: int
    share: float
    """Share of the peak that a step reaches while it computes (MFU without communication)."""
    base_gib: float
    """Memory that the process takes before the model: CUDA context and libraries, or the Python process."""


MACHINES = {
    "h100": Machine("H100 SXM", 80, 989e12, 450e9, 50e9, 8, 0.40, 1.5),
    "h200": Machine("H200 SXM", 141, 989e12, 450e9, 50e9, 8, 0.40, 1.5),
    "a100": Machine("A100 SXM", 80, 312e12, 300e9, 25e9, 8, 0.45, 1.5),
    "cpu": Machine("CPU core", float("inf"), 60e9, 5e9, 1e9, 64, 0.7, 0.53),
}
"""Peaks and links by data sheet (NVLink one way; 400 or 200 Gbit/s of network per GPU); `cpu` is a rough guess."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of a supported family."""

    layers: int
    width: int
    query: int
    key: int
    inner: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, settings: Any) -> Shape:
        """From a transformers configuration."""
        head = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        return cls(
            settings.num_hidden_layers,
            settings.hidden_size,
            head * settings.num_attention_heads,
            head * settings.num_key_value_heads,
            settings.intermediate_size,
            settings.vocab_size,
            bool(settings.tie_word_embeddings),
        )

    @property
    def per_layer(self) -> int:
        """Elements of one decoder layer's matrices."""
        return 2 * self.width * (self.query + self.key) + 3 * self.width * self.inner

    @property
    def table(self) -> int:
        """Elements of the embedding matrix."""
        return self.vocabulary * self.width

    @property
    def total(self) -> int:
        """All elements (norms and biases left out: less than a thousandth)."""
        return self.layers * self.per_layer + self.table * (1 if self.tied else 2)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank, in bytes, by what it is for."""

    base: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    host_copy: float
    """The checkpoint's copy in host memory; counted where the device is the host."""

    @property
    def total(self) -> float:
        """Sum."""
        return sum(getattr(self, item.name) for item in fields(self))


def trained_elements(shape: Shape, recipe: Recipe) -> int:
    """Elements that get gradients."""
    lora = recipe.model.lora
    z = recipe.bottleneck.count * shape.width
    if lora is None:
        return shape.total + z
    ends = [shape.width + shape.query, shape.width + shape.key, shape.width + shape.key, shape.query + shape.width]
    ends += [shape.width + shape.inner] * 3
    return shape.layers * lora.r * sum(ends) + z


def memory(shape: Shape, recipe: Recipe, machine: Machine, *, world: int, zero: dict[str, Any], micro: int) -> Memory:
    """Peak memory of one rank.

    Args:
        shape: of the model.
        recipe: dtype, adapters, activation checkpointing and lengths are read.
        machine: for the memory that is there before the model.
        world: ranks.
        zero: DeepSpeed's `zero_optimization` section.
        micro: tokens of one micro-batch.
    """
    stage, size = int(zero["stage"]), 2 if recipe.model.dtype == "bfloat16" else 4
    host = machine.name == MACHINES["cpu"].name
    total, trained = shape.total, trained_elements(shape, recipe)
    moments = 8 if recipe.optim.name == "adamw" else 0
    live = min(total, shape.per_layer * 2 + shape.table)  # what stage 3 holds gathered: two layers and the head
    weights = size * (total / world + live if stage == 3 else total)
    kept = stage == 3 and not host and world > 1  # gradients are reduced after every micro-batch
    gradients = size * (trained / world + live if kept else trained)
    if stage >= 1:
        gradients += (4 if stage < 3 else size) * trained / world
    masters = 0 if stage == 0 else 4
    optimizer = (masters + moments) * trained / world
    if not host:
        if "offload_optimizer" in zero:
            optimizer = 0
        if "offload_param" in zero:
            weights = size * live
    return Memory(
        machine.base_gib * GIB,
        weights,
        gradients,
        optimizer,
        _activations(shape, recipe, size, micro),
        _loss(shape, recipe, size, micro, host=host),
        (4 + moments) * trained / world if host else 0,
    )


def _activations(shape: Shape, recipe: Recipe, size: int, micro: int) -> float:
    """Tensors that the backward pass of one micro-batch needs, and its own largest ones."""
    copies = 4 * 4 * shape.width if size == 2 else 4 * 2 * shape.width  # norms work in float32
    layer = size * (4 * shape.width + 3 * shape.query + 2 * shape.key + 4 * shape.inner) + copies
    backward = size * (3 * shape.inner + 2 * shape.width)
    if recipe.model.activation_checkpointing:
        return micro * (shape.layers * size * shape.width + layer + backward)
    return micro * (shape.layers * layer + backward)


def _loss(shape: Shape, recipe: Recipe, size: int, micro: int, *, host: bool) -> float:
    """The head in stage 1 (logits in chunks, the two gradients it keeps); all embeddings and a tile in stage 2."""
    total = 0.0
    if "generative" in recipe.tasks:
        chunk = (1 << 20) if host else (1 << 25)
        total += chunk * (4 + 4 + size) + shape.table * (4 + (size if size == 2 else 0))
        total += 2 * micro * size * shape.width
    if "contrastive" in recipe.tasks:
        settings = recipe.contrastive
        passages = recipe.batch.global_batch * (2 + settings.hard_negatives)
        tile = min(settings.tile, recipe.batch.global_batch)
        blocks = 1 + settings.query_query + settings.passage_passage
        total += 4.0 * (3 * passages * shape.width + 3 * tile * min(settings.tile, blocks * passages))
    return total


@dataclass(frozen=True)
class Estimate:
    """What `lbr plan` prints."""

    lines: list[str]
    memory: Memory
    step_s: float


def estimate(recipe: Recipe, *, world: int = 1, gpu: str = "h100") -> Estimate:
    """Check a recipe as `train` would, and count what it needs on `world` devices of a kind.

    Raises:
        UserError: what `train` would refuse; or the memory does not suffice, with what to change.
    """
    if gpu not in MACHINES:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(MACHINES)}")
    machine = MACHINES[gpu]
    job = check(recipe, Environment(0, world, 0, world, None, "plan"))
    regime = load_regime(recipe, world=world, cuda=gpu != "cpu")
    from lbr_dist.model.backbone import load_config

    settings = load_config(recipe.model.path, 0)
    shape, zero = Shape.of(settings), regime.config["zero_optimization"]
    micro = recipe.batch.micro_tokens or recipe.data.bin_tokens
    need = memory(shape, recipe, machine, world=world, zero=zero, micro=micro)
    first = job.plan.step(0)
    micros = first.micro_batches(0, world)
    flops = sum(
        FlopCounter.of(settings, recipe).of_samples(m.samples)
        for r in range(world)
        for m in first.micro_batches(r, world)
    )
    carried = communication(shape, recipe, stage=regime.stage, world=world, micros=len(micros), zero=zero)
    link = machine.outside if world > machine.per_node else machine.inside
    recomputed = (4 / 3 if recipe.model.activation_checkpointing else 1) * (4 / 3 if _cached(recipe, micros) else 1)
    compute_s = flops * recomputed / (world * machine.peak_flops * machine.share)
    step_s = max(compute_s, carried / link) if regime.stage == 3 else compute_s + carried / link
    lines = _lines(job, shape, need, machine, regime.name, step_s, compute_s, carried, len(micros), world)
    if need.total > 0.95 * machine.memory_gib * GIB:
        raise UserError("; ".join([*lines[:2], _remedy(recipe, need, machine, regime.stage, world)]))
    return Estimate(lines, need, step_s)


def communication(shape: Shape, recipe: Recipe, *, stage: int, world: int, micros: int, zero: dict[str, Any]) -> float:
    """Bytes that one rank sends (and receives) in one step.

    Stage 3 gathers the weights for every forward and backward pass, once more for a pass without gradient, and reduces
    gradients after each; the other stages reduce gradients, and gather weights, once per step.
    """
    if world == 1:
        return 0.0
    size, share = (2 if recipe.model.dtype == "bfloat16" else 4), (world - 1) / world
    trained = trained_elements(shape, recipe)
    if stage < 3:
        return size * share * 2 * trained
    passes = 3 if "contrastive" in recipe.tasks and micros > 1 else 2
    return size * share * micros * (passes * shape.total + trained)


def _cached(recipe: Recipe, micros: list[Any]) -> bool:
    return sum(micro.task == "contrastive" for micro in micros) > 1


def _lines(
    job: Job,
    shape: Shape,
    need: Memory,
    machine: Machine,
    regime: str,
    step_s: float,
    compute_s: float,
    carried: float,
    micros: int,
    world: int,
) -> list[str]:
    recipe, epoch = job.recipe, job.plan.summary(0)
    parts = ", ".join(
        f"{item.name.replace('_', ' ')} {getattr(need, item.name) / GIB:.2f}"
        for item in fields(need)
        if getattr(need, item.name)
    )
    packing = f", packing {epoch.efficiency:.1%}" if recipe.stage == "generative" else ""
    steps = job.total_steps
    return [
        f"model      {shape.total / 1e6:,.1f}M parameters, {trained_elements(shape, recipe) / 1e6:,.1f}M trained",
        f"memory     {need.total / GIB:.2f} GiB per rank of {machine.memory_gib:g} ({machine.name}, {regime}): {parts}",
        f"data       {epoch.samples:,} samples, {epoch.input_tokens:,} tokens an epoch{packing}",
        f"steps      {steps:,} ({epoch.steps:,} an epoch) of {recipe.batch.global_batch} "
        f"{'bins' if recipe.stage == 'generative' else 'pairs'}; {micros} micro-batches per rank",
        f"step       {step_s:.3g} s on {world} x {machine.name}: compute {compute_s:.3g} s at {machine.share:.0%} "
        f"of its peak, {carried / GIB:.3g} GiB sent per rank",
        f"time       {duration(step_s * steps)} for the whole run",
        *(f"note       {entry}" for entry in (*job.plan.too_long, *job.plan.notes)),
    ]


def _remedy(recipe: Recipe, need: Memory, machine: Machine, stage: int, world: int) -> str:
    """The change that saves most, by what is largest."""
    steps = []
    if stage < 3 and world > 1:
        steps.append("deepspeed=zero3")
    if not recipe.model.activation_checkpointing and need.activations > 0.2 * need.total:
        steps.append("model.activation_checkpointing=true")
    if need.activations + need.loss > 0.3 * need.total:
        steps.append("a smaller batch.micro_tokens (or data.bin_tokens)")
    if need.optimizer + need.weights > 0.5 * need.total:
        steps.append("more ranks, or deepspeed=zero3_offload")
    if recipe.model.dtype == "float32":
        steps.append("model.dtype=bfloat16")
    return f"does not fit {machine.memory_gib:g} GiB: try {', then '.join(steps) or 'more ranks'}"
