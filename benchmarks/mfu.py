"""How well stage 1 uses a GPU: model FLOP utilisation by attention backend, and where the rest of the time goes.

    python -m benchmarks.mfu                                # GPU; minutes, the row that counts most first
    python -m benchmarks.mfu --toy                          # CPU: only shows that it runs

A step is 8 micro-batches of at most 4,096 packed tokens with the lengths of real rows (`benchmarks/lengths.py`),
forward and backward through the bottleneck, gradient clipping and fused AdamW, in bfloat16 with random weights, on one
device and without DeepSpeed (its sharding and float32 master weights are not part of this figure). MFU counts what the
model needs (`training/cost/flops.py`: recomputation does not count, hidden attention cells do not count) against the
dense bfloat16 peak of the data sheet.

Variants change one thing each against `base`: `compile` compiles the MLPs and norms of the decoder layers, the parts
without attention; `checkpointing` recomputes layers in the backward pass; `logits` applies the head as one matrix with
cross entropy behind it, in place of the chunked loss head. The profile is of one step of `base`, by kind of kernel.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks import lengths
from benchmarks.common import SHAPES, add_options, clock, head, random_model, save, table, title
from lbr_dist.config import Bottleneck, Recipe
from lbr_dist.data.plan.base import PlannedSample, SampleRef
from lbr_dist.data.plan.packing import best_fit
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import PackedBatch, Sample, pack
from lbr_dist.training.cost.flops import FlopCounter
from lbr_dist.training.cost.machines import peak_flops

VARIANTS = ("base", "checkpointing", "logits", "compile")
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "addmm", "aten::mm", "xmma"),
    "attention": ("flash", "fmha", "attention", "attn", "flex"),
    "optimizer and clipping": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "softmax of the loss": ("softmax", "logsumexp", "nll"),
    "reductions (norms)": ("reduce", "mean"),
    "gather, scatter, index": ("index", "gather", "scatter", "embedding"),
    "copies": ("memcpy", "memset", "copy"),
    "elementwise": ("elementwise", "triton", "vectorized"),
}
"""Kinds of kernels, by parts of their names; the first that matches counts."""
COLUMNS = {
    **{"shape": "model", "attention": "attention", "variant": "variant", "tokens_per_s": "tokens/s", "mfu": "MFU"},
    **{"step_ms": "step, ms", "memory_gib": "peak memory, GiB"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--attention", nargs="+", default=["varlen", "sdpa", "flex"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="of the first attention")
    parser.add_argument("--bin-tokens", type=int, default=4096)
    parser.add_argument("--bins", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.toy:
        args.shape, args.attention, args.bin_tokens, args.bins, args.steps = ["toy"], ["auto"], 512, 2, 1
        args.variants = [variant for variant in args.variants if variant != "compile" or device == "cuda"]
    elif args.device == "cpu":
        parser.error("MFU is a figure for GPUs, and this torch sees none; --toy shows that the benchmark runs")
    about = head("python -m benchmarks.mfu", args.device, bin_tokens=args.bin_tokens, bins=args.bins, toy=args.toy)
    rows: list[dict[str, Any]] = []
    profiles: list[str] = []
    for shape in args.shape or ["1.5b", "135m"]:
        for attention in args.attention:
            for variant in args.variants if attention == args.attention[0] else ["base"]:
                row: dict[str, Any] = {"shape": shape, "attention": attention, "variant": variant}
                rows.append(row)
                try:
                    row |= measure(shape, attention, variant, args, profiles)
                except RuntimeError as error:  # out of memory, or a kernel that does not compile: the others stand
                    traceback.print_exc()
                    row["tokens_per_s"] = type(error).__name__
                gc.collect()
                torch.cuda.empty_cache()
                lines = [*title("Model FLOP utilisation of stage 1", about), *table(COLUMNS, rows), "", *profiles]
                save(args.out, "mfu", about, rows, lines)
    if any("step_ms" not in row for row in rows):
        raise SystemExit(1)


def measure(shape: str, attention: str, variant: str, args: argparse.Namespace, profiles: list[str]) -> dict[str, Any]:
    """Figures of one row; `base` also adds its profile."""
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    settings = {"activation_checkpointing": variant == "checkpointing"}
    model = random_model(shape, attention_setting=attention, dtype=dtype, device=args.device, **settings)
    if variant == "compile":
        for layer in model.causal_lm.model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    planned, batches = make_bins(args.bins, args.bin_tokens, args.device)
    loss_of = whole_logits if variant == "logits" else chunked
    targets = sum(len(batch.targets_L) for batch in batches)

    def step() -> None:
        for batch in batches:
            batch.segments.padded = batch.segments.block_mask = None
            (loss_of(model, batch) / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        begin = clock(args.device)
        step()
        seconds.append(clock(args.device) - begin)
    flops = counter(model).of_samples(planned)
    middle, peak = statistics.median(seconds), peak_flops(torch.device(args.device))
    row: dict[str, Any] = {"tokens_per_s": round(sum(s.tokens for s in planned) / middle)}
    row["step_ms"] = round(1e3 * middle, 1)
    row["mfu"] = f"{flops / middle / peak:.1%}" if peak else None
    row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1) if args.device == "cuda" else None
    if variant == "base":
        try:
            lines = profile(step, args.device)
        except (AssertionError, RuntimeError) as error:  # no access to the GPU's counters: the figures stand without
            lines = [f"No profile: {error}"]
        profiles += [f"## {shape}, {attention}", "", *lines, ""]
    return row


def chunked(model: LbrModel, batch: PackedBatch) -> torch.Tensor:
    """The product's loss."""
    return model(batch, "generate")


def whole_logits(model: LbrModel, batch: PackedBatch) -> torch.Tensor:
    """The same with all logits at once."""
    logits = model.causal_lm.lm_head(model(batch, "hidden")[batch.loss_positions_L])
    return cross_entropy(logits.float(), batch.targets_L, reduction="sum")


def counter(model: LbrModel) -> FlopCounter:
    """Operations of stage 1 through the bottleneck."""
    recipe = Recipe.model_validate(
        {
            **{"stage": "generative", "output": "unused", "model": {"path": "unused"}},
            **{"data": {"sets": [{"path": "unused"}]}, "batch": {"global_batch": 1}, "duration": {"steps": 1}},
        }
    )
    return FlopCounter.of(model.causal_lm.config, recipe)


def make_bins(bins: int, capacity: int, device: str) -> tuple[list[PlannedSample], list[PackedBatch]]:
    """The first bins of real lengths, packed as the plan packs them; random tokens."""
    draw = random.Random(0)
    pairs = [(x, y) for x, y in lengths.load() if x and x + y + 8 <= capacity]
    draw.shuffle(pairs)
    z = [Bottleneck().length(x) for x, _ in pairs]
    totals = np.array([x + y + n for (x, y), n in zip(pairs, z, strict=True)])
    planned: list[PlannedSample] = []
    batches = []
    chosen = best_fit(totals, capacity)
    draw.shuffle(chosen)
    for members in chosen[:bins]:
        own = [PlannedSample(SampleRef(0, int(i)), pairs[i][0], z[i], pairs[i][1]) for i in members]
        batches.append(pack([_tokens(s, draw) for s in own], bottleneck_vectors=8, hide_x=True).to(device))
        planned += own
    return planned, batches


def _tokens(s: PlannedSample, draw: random.Random) -> Sample:
    x, y = ([draw.randrange(1, 500) for _ in range(count)] for count in (s.x_len, s.y_len))
    return Sample(x, s.z_len, y)


def profile(step: Callable[[], None], device: str) -> list[str]:
    """Share of one step's time by kind of kernel, and the longest kernels."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if device == "cuda" else activity.CPU]  # alone: the CPU's record slows launches down
    with torch.profiler.profile(activities=activities) as profiler:
        begin = clock(device)
        step()
        wall = 1e6 * (clock(device) - begin)
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    kernels = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    spent = [(e.key, getattr(e, key), e.count) for e in kernels]
    spent.sort(key=lambda item: -item[1])
    shares: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, micros, _ in spent:
        shares[kind_of(name)] += micros
    shares["device idle"] = max(0.0, wall - sum(shares.values())) if device == "cuda" else 0.0
    rows: Sequence[dict[str, Any]] = [
        {"kind": name, "share": f"{value / sum(shares.values()):.1%}"} for name, value in shares.items() if value
    ]
    lines = table({"kind": "kind", "share": "share of the step"}, rows)
    longest = [
        {"kernel": f"`{name[:90]}`", "ms": round(micros / 1e3, 2), "calls": calls} for name, micros, calls in spent[:15]
    ]
    return [*lines, "", *table({"kernel": "longest kernels", "ms": "ms", "calls": "calls"}, longest)]


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


if __name__ == "__main__":
    main()
