"""The optimizer and its parameter groups: which parameters decay, and which rate Z has.

A torch optimizer given to DeepSpeed, and never one named in its JSON: no compiler is needed, the groups are ours, and
the states have the names that checkpoints know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lbr_dist.config import Optim


def make_optimizer(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that are trained.

    Groups: matrices (with weight decay); norms and biases (without); the bottleneck vectors (without, at `z_lr`). Each
    group has `peak`, its learning rate before the schedule.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    bottleneck: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # under ZeRO-3 a parameter is an empty tensor with its true shape beside it
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (bottleneck if name == "z" else matrices if dimensions > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": optim.weight_decay, "peak": optim.lr},
        {"params": vectors, "weight_decay": 0.0, "peak": optim.lr},
        {"params": bottleneck, "weight_decay": 0.0, "peak": optim.z_lr or optim.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group `share` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
