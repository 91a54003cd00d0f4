"""Memory of one rank at its peak, counted tensor by tensor (docs/scaling.md has the terms).

`python -m benchmarks.memory` compares it with what ranks on a CPU take.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from lbr_dist.config import Recipe
from lbr_dist.model.head import CHUNK
from lbr_dist.training.cost.machines import MACHINES, Machine

GIB = 2.0**30
LAYERS = "model.layers."
ADAPTER_SLACK, CONTRASTIVE_SLACK = 0.65, 0.4
"""What glibc keeps, as a share of the activations (recomputed or not): fitted to the runs of benchmarks/memory.py."""


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

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Module, inputs and outputs of every matrix."""
        yield "model.embed_tokens", self.vocabulary, self.width
        if not self.tied:
            yield "lm_head", self.width, self.vocabulary
        for layer in range(self.layers):
            for name, inputs, outputs in self._in_a_layer():
                yield f"{LAYERS}{layer}.{name}", inputs, outputs

    def _in_a_layer(self) -> Iterator[tuple[str, int, int]]:
        yield "self_attn.q_proj", self.width, self.query
        yield "self_attn.k_proj", self.width, self.key
        yield "self_attn.v_proj", self.width, self.key
        yield "self_attn.o_proj", self.query, self.width
        yield "mlp.gate_proj", self.width, self.inner
        yield "mlp.up_proj", self.width, self.inner
        yield "mlp.down_proj", self.inner, self.width

    @property
    def per_layer(self) -> int:
        """Elements of one decoder layer's matrices."""
        return sum(inputs * outputs for _, inputs, outputs in self._in_a_layer())

    @property
    def table(self) -> int:
        """Elements of the embedding matrix."""
        return self.vocabulary * self.width

    @property
    def total(self) -> int:
        """All elements (norms and biases left out: less than a thousandth)."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices())


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
    """The checkpoint's copy in host memory, as far as it is there at the peak; counted where the device is the host."""
    allocator: float
    """What glibc keeps of freed memory, with adapters and in stage 2 (measured; on CPUs only)."""

    @property
    def total(self) -> float:
        """Sum."""
        return sum(getattr(self, item.name) for item in fields(self))


def trained_elements(shape: Shape, recipe: Recipe) -> int:
    """Elements that get gradients."""
    lora = recipe.model.lora
    trained = recipe.bottleneck.count * shape.width + adapter_elements(shape, recipe)
    for name, inputs, outputs in shape.matrices():
        if name == "lm_head" and "generative" not in recipe.tasks:
            continue  # see LbrModel.freeze_head
        if lora is None or _trained_whole(name, lora.train_modules):
            trained += inputs * outputs
    return trained


def adapter_elements(shape: Shape, recipe: Recipe) -> int:
    """Elements of `model.lora`'s adapters, which stand beside the model's own."""
    lora = recipe.model.lora
    if lora is None:
        return 0
    return sum(
        lora.r * (inputs + outputs)
        for name, inputs, outputs in shape.matrices()
        if name.startswith(LAYERS)
        and not _trained_whole(name, lora.train_modules)
        and (isinstance(lora.target_modules, str) or any(name.endswith(f".{one}") for one in lora.target_modules))
    )


def copied_elements(shape: Shape, recipe: Recipe) -> int:
    """Elements of `model.lora.train_modules`: peft trains a copy, and keeps what it was made of."""
    lora = recipe.model.lora
    if lora is None:
        return 0
    return sum(
        inputs * outputs for name, inputs, outputs in shape.matrices() if _trained_whole(name, lora.train_modules)
    )


def _trained_whole(matrix: str, modules: list[str]) -> bool:
    """Whether a matrix is in one of `model.lora.train_modules`, as peft matches them: by the end of a module's name."""
    above = itertools.accumulate(matrix.split("."), "{}.{}".format)
    return any(module.endswith(one) for module in above for one in modules)


def _offloaded(zero: dict[str, Any], part: str) -> bool:
    return zero.get(part, {}).get("device") in ("cpu", "nvme")


def memory(
    shape: Shape,
    recipe: Recipe,
    machine: Machine,
    *,
    world: int,
    zero: dict[str, Any],
    micro: int,
    forward_s: float = 0.0,
) -> Memory:
    """Peak memory of one rank.

    Args:
        shape: of the model.
        recipe: dtype, adapters, activation checkpointing and lengths are read.
        machine: for the memory that is there before the model.
        world: ranks.
        zero: DeepSpeed's `zero_optimization` section.
        micro: tokens of one micro-batch.
        forward_s: from the start of a step until the activations of its first micro-batch are there. By then a
            checkpoint of the step before may have been written, and its copy is gone.
    """
    stage, size = int(zero["stage"]), 2 if recipe.model.dtype == "bfloat16" else 4
    host = machine.name == MACHINES["cpu"].name
    total = shape.total + copied_elements(shape, recipe) + adapter_elements(shape, recipe)
    trained = trained_elements(shape, recipe)
    moments = 8 if recipe.optim.name == "adamw" else 0
    live = min(total, shape.per_layer * 2 + shape.table)  # what stage 3 holds gathered: two layers and the head
    weights = size * (total / world + live if stage == 3 else total)
    kept = stage == 3 and not host and world > 1  # gradients are reduced after every micro-batch
    gradients = size * (trained / world + live if kept else trained)
    if stage >= 1:
        gradients += 4 * trained / world
    optimizer = (4 + moments) * trained / world if stage >= 1 else moments * trained  # stage 0 shares nothing out
    if not host:
        if _offloaded(zero, "offload_optimizer"):
            optimizer = 0
        if _offloaded(zero, "offload_param"):
            weights = size * live
    recomputed = recipe.model.activation_checkpointing
    backward = micro * size * (3 * shape.inner + 2 * shape.width)
    activations = _activations(shape, size, micro, recomputed=recomputed) + backward
    loss = _loss(shape, recipe, size, micro, backward, host=host)
    copy = (4 + moments) * trained / world if host else 0
    if host and not recomputed and copy / machine.write < forward_s:  # recomputing, the first layer is the peak
        copy = max(0, copy - activations - loss)
    share = CONTRASTIVE_SLACK if "contrastive" in recipe.tasks else 0.0
    share = ADAPTER_SLACK if recipe.model.lora is not None else share
    slack = share * (_activations(shape, size, micro, recomputed=False) + backward) if host else 0.0
    return Memory(machine.base_gib * GIB, weights, gradients, optimizer, activations, loss, copy, slack)


def _activations(shape: Shape, size: int, micro: int, *, recomputed: bool) -> float:
    """Tensors that the backward pass of one micro-batch needs."""
    copies = 4 * 4 * shape.width if size == 2 else 4 * 2 * shape.width  # norms work in float32
    layer = size * (4 * shape.width + 3 * shape.query + 2 * shape.key + 4 * shape.inner) + copies
    if recomputed:
        return micro * (shape.layers * size * shape.width + layer)
    return micro * shape.layers * layer


def _loss(shape: Shape, recipe: Recipe, size: int, micro: int, backward: float, *, host: bool) -> float:
    """The head in stage 1 (logits in chunks, the gradients it keeps); all embeddings and a tile in stage 2.

    The logits are gone when the backward pass has its own largest tensors (`backward`, in bytes).
    """
    total = 0.0
    if "generative" in recipe.tasks:
        chunk = min(CHUNK["cpu" if host else "cuda"], micro * shape.vocabulary)
        total += max(0.0, chunk * (4 + 4) - backward) + 2 * micro * size * shape.width
        if recipe.model.lora is None:
            total += shape.table * (4 + (size if size == 2 else 0))
    if "contrastive" in recipe.tasks:
        settings = recipe.contrastive
        passages = recipe.batch.global_batch * (2 + settings.hard_negatives)
        tile = min(settings.tile, recipe.batch.global_batch)
        blocks = 1 + settings.query_query + settings.passage_passage
        total += 4.0 * (3 * passages * shape.width + 3 * tile * min(settings.tile, blocks * passages))
    return total
