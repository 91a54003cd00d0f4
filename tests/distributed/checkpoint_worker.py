"""One rank of test_checkpoint.py: runs a list of jobs on tiny DeepSpeed engines, so that one start serves many checks.

A job makes an engine, maybe loads a checkpoint, dumps what the engine holds (through DeepSpeed's public
safe_get_full_*, the oracle), trains, saves, and dumps again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lbr_dist import config
from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.checkpointer import Checkpointer, start_from

if TYPE_CHECKING:
    import deepspeed

VOCAB, GLOBAL_BATCH = 37, 8


class Plain(torch.nn.Module):
    """Tied, frozen, odd-sized and very small parameters: what partitions and padding get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.up = torch.nn.Linear(16, 23)
        self.still = torch.nn.Linear(23, 16)
        self.head = torch.nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.z = torch.nn.Parameter(torch.randn(3))
        self.still.weight.requires_grad = False

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.still(torch.tanh(self.up(self.embed(x_BT)))) * self.z.sum()
        return torch.nn.functional.cross_entropy(self.head(hidden_BTD).flatten(0, 1).float(), x_BT.flatten())


class Llama(torch.nn.Module):
    """A Hugging Face model with adapters: everything but them and Z is frozen."""

    def __init__(self, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        settings = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        self.backbone = get_peft_model(
            LlamaForCausalLM(settings).to(dtype), LoraConfig(r=4, target_modules="all-linear")
        )
        self.z = torch.nn.Parameter(torch.randn(2, 32))

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        embeds_BTD = self.backbone.get_input_embeddings()(x_BT) + self.z.mean(0)
        return self.backbone(inputs_embeds=embeds_BTD, labels=x_BT, use_cache=False).loss


def make(job: dict, world: int) -> deepspeed.DeepSpeedEngine:
    import deepspeed

    torch.manual_seed(job.get("seed", 0))
    dtype = torch.bfloat16 if job.get("dtype") == "bf16" else torch.float32
    model = Llama(dtype) if job.get("model") == "llama" else Plain()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:2]}, {"params": trained[2:], "lr": 3e-3, "weight_decay": 0.0}]
    if job.get("optimizer", "adamw") == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=job["momentum"])
    settings = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": job["stage"],
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 300,
            **job.get("zero", {}),
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range, rank: int, world: int) -> list[float]:
    losses = []
    for step in steps:
        x_BT = torch.randint(0, VOCAB, (GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(step))
        share = GLOBAL_BATCH // world
        loss = engine(x_BT[rank * share : (rank + 1) * share])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def dump(engine: deepspeed.DeepSpeedEngine, stage: int) -> dict[str, torch.Tensor]:
    """Masters, moments and the model's own weights, whole, by name."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    out = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            out[f"model:{name}"] = parameter.data.clone()
        if not parameter.requires_grad:
            continue
        if stage == 0:
            state = engine.optimizer.state[parameter]
            out[f"weight:{name}"] = parameter.data.clone()
            out.update(
                {f"{key}:{name}": state[key].clone() for key in state if state[key] is not None and key != "step"}
            )
            continue
        out[f"weight:{name}"] = safe_get_full_fp32_param(parameter).clone()
        if stage != 3:  # DeepSpeed links the moments after the first group's first step, the other groups' are missing
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if any(key in state for state in engine.optimizer.optimizer.state.values()):
                out[f"{key}:{name}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return out


def optimizer_steps(engine: deepspeed.DeepSpeedEngine, stage: int) -> list[float]:
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return sorted({float(state["step"]) for state in optimizer.state.values() if "step" in state})


def perform(job: dict, rank: int, world: int) -> dict:
    engine, stage = make(job, world), job["stage"]
    result: dict = {"losses": []}
    if "start_from" in job:
        result["differences"] = start_from(engine, job["start_from"])[1:]
    checkpointer = Checkpointer(
        Path(job["run"]), engine, config.Checkpoint(keep_last=9), extra_files={"recipe.yaml": b"seed: 0\n"}
    )
    step = 0
    if "load" in job:
        try:
            state, rank_state = checkpointer.load(job["load"])
        except UserError as error:
            return {"error": str(error)}
        step = state["step"]
        result["rank_state"] = rank_state and {"rank": rank_state["rank"], "rng": rank_state["rng"].sum().item()}
        result["global_steps"] = engine.global_steps
    if "dump_loaded" in job:
        _write(job["dump_loaded"], dump(engine, stage), rank)
    for until in job["until"]:
        result["losses"] += train(engine, range(step, until), rank, world)
        step = until
        if until in job.get("save", ()):
            checkpointer.save(step, {"step": step}, rank_state={"rank": rank, "rng": torch.get_rng_state()})
    checkpointer.wait()
    result["optimizer_steps"] = optimizer_steps(engine, stage)
    if "dump" in job:
        _write(job["dump"], dump(engine, stage), rank)
    engine.destroy()
    return result


def _write(path: str, tensors: dict[str, torch.Tensor], rank: int) -> None:
    if rank == 0:
        torch.save(tensors, path)


def perform_all(rank: int, world: int, jobs: list[dict]) -> list[dict]:
    """The entry of a rank."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo")
    return [perform(job, rank, world) for job in jobs]
