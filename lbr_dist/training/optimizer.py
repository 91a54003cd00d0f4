"""The optimizer and its parameter groups: which parameters decay, and which rates Z and the temperature have.

A torch optimizer given to DeepSpeed, and never one named in its JSON: no compiler is needed, the groups are ours, and
the states have the names that checkpoints know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lbr_dist.config import Recipe


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that are trained.

    Groups: matrices (with weight decay); norms and biases (without); the bottleneck vectors (without, at `z_lr`); a
    learned temperature (without, at its own rate). Each group has `peak`, its learning rate before the schedule.
    """
    optim, learned = recipe.optim, recipe.contrastive.learn_temperature
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    named: dict[str, list[nn.Parameter]] = {"z": [], "temperature": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # under ZeRO-3 a parameter is an empty tensor with its true shape beside it
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            named.get(name, matrices if dimensions > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": optim.weight_decay, "peak": optim.lr},
        {"params": vectors, "weight_decay": 0.0, "peak": optim.lr},
        {"params": named["z"], "weight_decay": 0.0, "peak": optim.z_lr or optim.lr},
        {"params": named["temperature"], "weight_decay": 0.0, "peak": learned.lr if learned else optim.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group `share` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
