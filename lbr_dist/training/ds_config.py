"""DeepSpeed's JSON and the recipe, made one: the recipe decides, and a contradiction is refused.

A DeepSpeed file says how memory is spent (stage, offload, buckets). What the training *means* (batch, rates, clipping,
number format) is the recipe's alone: a file has "auto" there, or the same value, or the run does not start. Needs no
torch, so that a wrong file is found before anything slow is imported.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError

FOLDER = Path(__file__).parent.parent / "ds_configs"


@dataclass(frozen=True)
class Regime:
    """A resolved DeepSpeed configuration."""

    name: str
    config: dict[str, Any]
    note: str = ""
    """Why it was chosen, where the recipe left it open."""

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.config["zero_optimization"]["stage"])

    def on_disk(self, part: Literal["offload_optimizer", "offload_param"]) -> bool:
        """Whether a part is offloaded to NVMe."""
        return bool(self.config["zero_optimization"].get(part, {}).get("device") == "nvme")


def load_regime(recipe: Recipe, *, world: int, cuda: bool) -> Regime:
    """Read the DeepSpeed file that the recipe names and fill in what the recipe decides.

    Raises:
        UserError: no such file, bad JSON, or a setting that contradicts the recipe (both are named).
    """
    name, note = recipe.deepspeed, ""
    if name == "auto":
        # measured on one process: stage 0 costs nothing over plain torch, stage 3 costs 1.4 times as much
        alone = "zero0" if recipe.model.dtype == "float32" else "zero2"  # which adds gradients up in float32
        name = alone if world == 1 else "zero3" if cuda else "cpu"
        note = "one process has nothing to partition" if name == alone else ""
    file = Path(name)
    if file.suffix != ".json":
        file = FOLDER / f"{name}.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json")))
        raise UserError(f"deepspeed: {name}: no such file, nor one of {known}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {file}: not a readable JSON file: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise UserError(f"deepspeed: {file}: expected an object with a zero_optimization section")
    return Regime(name, resolve(given, recipe, str(file), cuda=cuda), note)


def name_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, if there is no GPU: looking for one, it prints that it found none."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    name_accelerator()
    import deepspeed
    import torch

    import lbr_dist

    return {"lbr_dist": lbr_dist.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def resolve(given: dict[str, Any], recipe: Recipe, origin: str, *, cuda: bool) -> dict[str, Any]:
    """The configuration that DeepSpeed gets; `given` is not changed.

    Raises:
        UserError: a contradiction; it names the file's setting and the recipe's. Or a setting that does not work.
    """
    for path, (value, setting) in decided(recipe).items():
        section, dot, _ = path.partition(".")
        if dot and not isinstance(given.get(section, {}), dict) and given[section] not in ("auto", None):
            raise UserError(f"{origin}: {section} is {json.dumps(given[section])}: expected an object, or leave it out")
        found = _look_up(given, path)
        if found is not None and found != "auto" and not _equal(found, value):
            raise UserError(
                f"{origin}: {path} is {json.dumps(found)}, but the recipe has {setting}: "
                f'set it to "auto" or leave it out, or change the recipe'
            )
    config = _without_auto(given)
    for section in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(section, None)
    bf16 = recipe.model.dtype == "bfloat16"
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip,
        "bf16": {**config.get("bf16", {}), "enabled": bf16, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
    }
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 2**62)
    zero = config.setdefault("zero_optimization", {})
    if isinstance(zero.setdefault("stage", 0), bool) or zero["stage"] not in range(4):
        raise UserError(f"{origin}: zero_optimization.stage is {json.dumps(zero['stage'])}: expected 0, 1, 2 or 3")
    _check_offload(zero, origin)
    if zero["stage"] == 0 and bf16:
        raise UserError(
            f"{origin}: zero_optimization.stage is 0, and with model.dtype = bfloat16 that keeps float32 masters where "
            "no checkpoint can take them: use stage 1 (deepspeed=zero1)"
        )
    if bf16 and zero["stage"] == 1 and "grad_accum_dtype" in config.get("data_types", {}):
        raise UserError(
            f"{origin}: data_types.grad_accum_dtype is fp32, for which DeepSpeed has another optimizer in stage 1 with "
            "model.dtype = bfloat16, that no checkpoint knows: leave it out, or use stage 2 (deepspeed=zero2)"
        )
    if bf16 and zero["stage"] >= 2:
        config["data_types"] = {**config.get("data_types", {}), "grad_accum_dtype": "fp32"}
    if not cuda:
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if zero.get(name):
                raise UserError(f"{origin}: zero_optimization.{name}: DeepSpeed has that on GPUs alone: leave it out")
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:
                zero[part] = {**zero[part], "pin_memory": False}
    return config


def _check_offload(zero: dict[str, Any], origin: str) -> None:
    """Refuse an offload that DeepSpeed would ignore, or fail with later; take out an empty section.

    Raises:
        UserError: names the setting.
    """
    for part, first in (("offload_optimizer", 1), ("offload_param", 3)):
        name, found = f"{origin}: zero_optimization.{part}", zero.get(part, {})
        if not isinstance(found, dict):
            raise UserError(f'{name} is {json.dumps(found)}: expected an object, as {{"device": "cpu"}}')
        if not found:
            zero.pop(part, None)
        if found.get("device", "none") == "none":
            continue
        if zero["stage"] < first:
            raise UserError(
                f"{name}: DeepSpeed ignores it in stage {zero['stage']}: leave it out, or use stage {first} or above"
            )
        if found.get("ratio", 1) != 1:
            raise UserError(
                f"{name}.ratio is {json.dumps(found['ratio'])}: that works with an optimizer of DeepSpeed's own alone; "
                "leave it out, and all of the optimizer's state is offloaded"
            )


def decided(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """DeepSpeed setting, to the only value it may have and the recipe's setting that says so."""
    optim = recipe.optim
    accumulation = "batch.global_batch and batch.micro_tokens, from which accumulation is derived"
    return {
        "train_batch_size": (recipe.batch.global_batch, f"batch.global_batch = {recipe.batch.global_batch}"),
        "train_micro_batch_size_per_gpu": (1, accumulation),
        "gradient_accumulation_steps": (1, accumulation),
        "managed_gradient_accumulation": (True, accumulation),
        "gradient_clipping": (optim.clip, f"optim.clip = {optim.clip}"),
        "gradient_predivide_factor": (1, "gradients that are summed; DeepSpeed knows a factor in stages 0 and 1 alone"),
        "prescale_gradients": (
            False,
            "gradients averaged after they are summed; DeepSpeed knows no other way from stage 1 on",
        ),
        "gradient_allreduce_op": ("mean", "losses that are scaled for a gradient that is averaged over ranks"),
        "communication_data_type": (
            {"float32": "fp32", "bfloat16": "bf16"}[recipe.model.dtype],
            f"model.dtype = {recipe.model.dtype}",
        ),
        "hybrid_engine.enabled": (False, "training alone, without an engine that generates"),
        "tensor_parallel.autotp_size": (0, "one model per rank, or ZeRO"),
        "bf16.enabled": (recipe.model.dtype == "bfloat16", f"model.dtype = {recipe.model.dtype}"),
        "fp16.enabled": (False, f"model.dtype = {recipe.model.dtype}"),
        "amp.enabled": (False, f"model.dtype = {recipe.model.dtype}"),
        "torch_autocast.enabled": (False, f"model.dtype = {recipe.model.dtype}"),
        "bf16.bf16_master_weights_and_grads": (False, "float32 master weights, whatever model.dtype is"),
        "bf16.bf16_optimizer_states": (False, "float32 moments, whatever model.dtype is"),
        "optimizer.type": (optim.name, f"optim.name = {optim.name}"),
        "optimizer.params.lr": (optim.lr, f"optim.lr = {optim.lr}"),
        "optimizer.params.betas": (list(optim.betas), f"optim.betas = {list(optim.betas)}"),
        "optimizer.params.eps": (optim.eps, f"optim.eps = {optim.eps}"),
        "optimizer.params.weight_decay": (optim.weight_decay, f"optim.weight_decay = {optim.weight_decay}"),
        "optimizer.params.momentum": (0, f"optim.name = {optim.name}, without momentum"),
        "optimizer.params.nesterov": (False, f"optim.name = {optim.name}, without momentum"),
        "optimizer.params.amsgrad": (False, f"optim.name = {optim.name}, without amsgrad"),
        "optimizer.params.adam_w_mode": (True, f"optim.name = {optim.name}, whose weight decay is decoupled"),
        "optimizer.params.bias_correction": (True, f"optim.name = {optim.name}, with bias correction"),
        "optimizer.params.maximize": (False, "a loss, which is minimised"),
        "optimizer.params.max_grad_norm": (optim.clip, f"optim.clip = {optim.clip}"),
        "scheduler.type": ("auto", f"optim.schedule = {optim.schedule}"),
        "data_types.grad_accum_dtype": ("fp32", "gradients summed in float32, whatever model.dtype is"),
        "zero_optimization.compute_grad_norm": (True, "a gradient norm in every step, for optim.clip and on_nan"),
        "zero_optimization.zenflow": (None, f"optim.name = {optim.name}, one update of every weight in each step"),
        "zero_optimization.elastic_checkpoint": (False, "checkpoints of its own, which reshard anyway"),
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose keys is given once: of two, the last would win unseen."""
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice: remove one")
        found[key] = value
    return found


def _look_up(given: dict[str, Any], path: str) -> Any:
    node: Any = given
    for part in path.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    return node


def _equal(found: Any, value: Any) -> bool:
    if isinstance(found, str) and isinstance(value, str):
        return found.lower() == value.lower()
    return found == value


def _without_auto(node: Any) -> Any:
    """What is still "auto", or null, falls back to DeepSpeed's default."""
    if isinstance(node, dict):
        return {key: _without_auto(value) for key, value in node.items() if value not in ("auto", None)}
    return node
