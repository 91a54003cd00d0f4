"""`lbr plan`: what a recipe will need and take on N ranks, before anything is started.

Steps and tokens are not estimated: the plan knows them. Memory is counted (`memory_model`); time is operations over an
assumed share of the peak, next to what the network must carry. Shares and bandwidths are assumptions (`machines`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import MicroPlan, StepPlan
from lbr_dist.data.plan.joint import JointStep
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.training.cost.flops import FlopCounter
from lbr_dist.training.cost.machines import MACHINES, Machine
from lbr_dist.training.cost.memory_model import GIB, Memory, Shape, memory, trained_elements
from lbr_dist.training.ds_config import load_regime
from lbr_dist.training.preflight import Job, check
from lbr_dist.training.tracking import duration

SAMPLED = 16
"""Most steps of the first epoch that the time of a step is taken from."""


@dataclass(frozen=True)
class Estimate:
    """What `lbr plan` prints."""

    lines: list[str]
    memory: Memory
    step_s: float


def estimate(recipe: Recipe, *, world: int = 1, gpu: str = "h100") -> Estimate:
    """Check a recipe as `train` would, and count what it needs on `world` devices of a kind.

    Raises:
        UserError: what `train` would refuse but for what the output folder holds, which is a note; or the memory does
            not suffice, with what to change.
    """
    if gpu not in MACHINES:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(MACHINES)}")
    machine = MACHINES[gpu]
    refused: list[str] = []
    job = check(recipe, Environment(0, world, 0, world, None, "plan"), refused=refused)
    regime = load_regime(recipe, world=world, cuda=gpu != "cpu")
    from lbr_dist.model.attention import choose_backend
    from lbr_dist.model.backbone import DTYPES, load_config
    from lbr_dist.training.engine import check_regime

    if gpu == "cpu":
        choose_backend(recipe.model.attention, torch.device("cpu"), DTYPES[recipe.model.dtype])
    check_regime(regime)
    settings = load_config(recipe.model.path, 0)
    shape, zero = Shape.of(settings), regime.config["zero_optimization"]
    micro = recipe.batch.micro_tokens or recipe.data.bin_tokens
    steps = _some_steps(job)
    batches = [step.micro_batches(0, world) for step in steps]
    counter = FlopCounter.of(settings, recipe)
    shares = [_operations(step, counter, world) for step in steps]
    flops = sum(map(max, shares)) / len(steps)
    micros = sum(map(len, batches)) / len(batches)
    carried = communication(shape, recipe, stage=regime.stage, world=world, micros=micros)
    link = machine.outside if world > machine.per_node else machine.inside
    recomputed = (4 / 3 if recipe.model.activation_checkpointing else 1) * (4 / 3 if _cached(batches) else 1)
    compute_s = flops * recomputed / (machine.peak_flops * machine.share)
    forward_s = compute_s / (3 * micros)
    need = memory(shape, recipe, machine, world=world, zero=zero, micro=micro, forward_s=forward_s)
    step_s = max(compute_s, carried / link) if regime.stage == 3 else compute_s + carried / link
    lines = _lines(job, shape, need, machine, regime.name, step_s, compute_s, carried, [*map(len, batches)], world)
    if idle := min(of_step.count(0) for of_step in shares):
        lines.append(
            f"note       {idle} of {world} ranks have nothing to do in a step: take {world - idle}, or raise "
            "batch.global_batch"
        )
    lines += [f"note       a start in this folder would be refused: {reason}" for reason in refused]
    if need.total > 0.95 * machine.memory_gib * GIB:
        raise UserError("; ".join([*lines[:2], _remedy(recipe, need, machine, regime.stage, world)]))
    return Estimate(lines, need, step_s)


def communication(shape: Shape, recipe: Recipe, *, stage: int, world: int, micros: float) -> float:
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


def _some_steps(job: Job) -> list[StepPlan]:
    """Steps spread over the first epoch: with batches of one domain or set, no single one stands for the others."""
    count = job.plan.steps_per_epoch(0)
    return [job.plan.step(number) for number in sorted({count * part // SAMPLED for part in range(SAMPLED)})]


def _operations(step: StepPlan, counter: FlopCounter, world: int) -> list[float]:
    """What each rank computes of a step: shares need not be equal, and the step lasts as long as the largest one."""
    if isinstance(step, JointStep):
        parts = (_operations(part, counter, world) for part in (step.generative, step.contrastive))
        return [sum(of_rank) for of_rank in zip(*parts, strict=True)]
    if not step.pairs(0, 1):
        return [sum(counter.of_samples(m.samples) for m in step.micro_batches(rank, world)) for rank in range(world)]
    of_pair = [0.0] * step.samples  # asked for its micro-batches, each rank would be packed again for each other
    for micro in step.micro_batches(0, 1):
        for text in micro.samples:
            of_pair[text.pair] += counter.of_samples([text])
    return [sum(of_pair[pair] for pair in step.pairs(rank, world)) for rank in range(world)]


def _cached(batches: list[list[MicroPlan]]) -> bool:
    return any(sum(micro.task == "contrastive" for micro in of_step) > 1 for of_step in batches)


def _lines(
    job: Job,
    shape: Shape,
    need: Memory,
    machine: Machine,
    regime: str,
    step_s: float,
    compute_s: float,
    carried: float,
    micros: list[int],
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
    of = "" if math.isinf(machine.memory_gib) else f" of {machine.memory_gib:g}"
    several = " to ".join(map(str, sorted({min(micros), max(micros)})))
    return [
        f"model      {shape.total / 1e6:,.1f}M parameters, {trained_elements(shape, recipe) / 1e6:,.1f}M trained",
        f"memory     {need.total / GIB:.2f} GiB per rank{of} ({machine.name}, {regime}): {parts}",
        f"data       {epoch.samples:,} samples, {epoch.input_tokens:,} tokens in the first epoch{packing}",
        f"steps      {steps:,} ({epoch.steps:,} in the first epoch) of {recipe.batch.global_batch} "
        f"{'bins' if recipe.stage == 'generative' else 'pairs'}; {several} micro-batches per rank",
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
