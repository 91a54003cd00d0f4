"""DeepSpeed under the training loop: the process group, the sharded model, and one optimizer step.

One process on a laptop and a thousand GPUs take the same path; only the ZeRO stage and the backend differ. DeepSpeed's
own conveniences (its optimizers, schedulers, data loaders, checkpoints, accumulation counter) are left unused: each
ties the meaning of a run to the world size, and ours must not depend on it.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lbr_dist.config import Recipe
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError, one_line
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.training.ds_config import Regime, name_accelerator
from lbr_dist.training.optimizer import make_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def start_distributed(environment: Environment, timeout_s: float) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo without) and return this rank's device.

    Args:
        environment: who this rank is.
        timeout_s: after this, a collective call that not all ranks make fails.

    Raises:
        UserError: there are more ranks on this machine than GPUs.
    """
    cuda = torch.cuda.is_available()
    device, local_rank = torch.device("cpu"), environment.local_rank
    if cuda:
        local_rank = _device_number(environment, torch.cuda.device_count())
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        where: dict[str, Any] = {"store": dist.HashStore()}
        if environment.master is not None:
            where = {"init_method": f"tcp://{environment.meeting}"}
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            rank=environment.rank,
            world_size=environment.world,
            timeout=timedelta(seconds=timeout_s),
            **where,
        )
        atexit.register(_leave)
    os.environ.update(
        RANK=str(environment.rank), WORLD_SIZE=str(environment.world), LOCAL_RANK=str(local_rank)
    )  # DeepSpeed takes the last one for the number of its device
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # an outer mpirun's, with which DeepSpeed would compare it
    return device


def _device_number(environment: Environment, devices: int) -> int:
    """This rank's GPU; 0 where it sees one alone, its own (`srun --gpus-per-task`, Ray)."""
    if environment.local_rank < devices:
        return environment.local_rank
    if devices > 1 or environment.source.startswith("lbr"):  # our launcher hands out none: all ranks see the same
        raise UserError(
            f"{environment.source}: {environment.local_world} ranks on this machine, but {devices} GPU"
            f"{'s' if devices > 1 else ''}: start one rank for each, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    return 0


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def make_engine(recipe: Recipe, regime: Regime) -> DeepSpeedEngine:
    """Build the recipe's model, sharded where the stage is 3, and wrap it. Collective.

    Raises:
        UserError: see `LbrModel.build`; or DeepSpeed does not take its configuration.
    """
    deepspeed = _import_deepspeed()
    check_regime(regime)
    sharding = None
    if regime.stage == 3:
        from transformers.integrations import HfDeepSpeedConfig

        sharding = HfDeepSpeedConfig(regime.config)  # while it lives, from_pretrained loads sharded
    module = LbrModel.build(recipe, for_zero3=regime.stage == 3)
    module.train()
    if "generative" not in recipe.tasks and not regime.on_disk("offload_param"):
        module.freeze_head()
    optimizer = make_optimizer(module, recipe)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=regime.config)
    del sharding
    return engine


def check_regime(regime: Regime) -> None:
    """Let DeepSpeed read its configuration before a model is loaded under it.

    Raises:
        UserError: it does not take it.
    """
    name_accelerator()
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(regime.config))
    except Exception as error:  # of many kinds, and all about what the file says
        raise UserError(f"deepspeed {regime.name}: {one_line(error, 300)}: correct the file") from None


@contextmanager
def _without_compiler() -> Iterator[None]:
    """DeepSpeed imports an optimizer that nothing here uses and that `torch.compile` decorates: seconds of imports."""
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _import_deepspeed() -> Any:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    name_accelerator()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(os.environ.get("LBR_DEEPSPEED_LOG", "ERROR"))
    if not torch.cuda.is_available():
        import deepspeed.ops

        # an all-reduce through shared memory: two minutes of compiling, and a C++ compiler, for nothing that we need
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=None, verbose=False)
    return deepspeed


def apply_gradients(engine: DeepSpeedEngine) -> tuple[float, bool]:
    """Clip, update, and clear the gradients.

    Returns:
        The global gradient norm before clipping, and whether the update was made: a gradient that is not finite on any
        rank is dropped on all of them, and nothing changes but the norm, which is then infinite or NaN.
    """
    norm = None
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(norm):
            engine.zero_grad()
            return norm, False
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    return norm, engine.was_step_applied()
