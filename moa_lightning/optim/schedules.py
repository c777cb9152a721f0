"""AdamW and how its learning rate moves over a run.

Schedules are functions of the step alone, in units of the peak: linear warm-up, then constant, linear, cosine or
warm-up-stable-decay (WSD: constant, then linear decay over the last share of the run).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError
from .groups import parameter_groups

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and its schedule."""

    lr: float = 2e-3
    """peak learning rate"""
    weight_decay: float = 0.1
    """of matrices only; coefficients of mixes, norms, biases and tokens never decay"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of the moments"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    mixing_lr_factor: float = 1.0
    """learning rate of the coefficients of mixes, in units of lr"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """shape after the warm-up"""
    warmup_steps: int = 50
    """optimiser steps of linear warm-up from zero"""
    final_lr_factor: float = 0.0
    """learning rate at the end, in units of lr (not for constant)"""
    decay_fraction: float = 0.2
    """share of the run in which WSD decays"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule is '{self.schedule}'; choose from {', '.join(SCHEDULES)}")
        if not (self.lr > 0 and self.eps > 0 and 0 < self.decay_fraction <= 1):
            raise UserError("optimizer needs lr > 0, eps > 0 and 0 < decay_fraction <= 1")
        for name in ("weight_decay", "warmup_steps", "mixing_lr_factor", "final_lr_factor"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)} but must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {list(self.betas)} but must be two numbers, at least 0 and below 1")


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (0 is the first) in units of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return cosine_schedule(1.0, config.final_lr_factor, progress)
    if config.schedule == "linear":
        left = 1 - min(progress, 1.0)
    else:
        left = min(1.0, max(0.0, total_steps - step) / max(1.0, config.decay_fraction * total_steps))
    return config.final_lr_factor + (1 - config.final_lr_factor) * left


def build_optimizer(net: nn.Module, config: OptimizerConfig, total_steps: int) -> dict[str, Any]:
    """The optimiser and its per-step schedule, as Lightning's configure_optimizers wants them."""
    groups = parameter_groups(net, config.lr, config.weight_decay, config.mixing_lr_factor)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_can_fuse(net))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, config)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _can_fuse(net: nn.Module) -> bool:
    return all(p.is_floating_point() for p in net.parameters())
