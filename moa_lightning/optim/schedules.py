"""The optimiser, AdamW alone or with Muon, and how its learning rate moves over a run.

Schedules are functions of the step alone, in units of the peak: linear warm-up, then constant, linear, cosine or
warm-up-stable-decay (WSD: constant, then a decay over the last share of the run, linear or as one minus the root of
the way, which Hägele et al., arXiv 2405.18392, found better). Before its decay a WSD run is a constant one, so runs of
several lengths can be branched from checkpoints of one: docs/optimizers.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from .groups import parameter_groups, scale_rates
from .muon import MuonAdamW

OPEN_WARMUP = 0.1  # share of the run where warmup_steps is left open: DINO's and DINOv2's 10 epochs of 100
SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), or Muon with it, and the schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices that muon_parameters names and AdamW for all others"""
    muon_parameters: tuple[str, ...] = ("*.attn.qkv.weight", "*.attn.proj.weight", "*_proj.weight")
    """patterns (as of file names) of the parameters that Muon takes; each must match"""
    momentum: float = 0.95
    """of Muon"""
    lr: float = 2e-3
    """peak learning rate; where reference_batch is given, that of a batch of so many samples"""
    reference_batch: int | None = None
    """samples of the batch that lr is meant for: the peak is lr times the samples of an optimiser step over this (the
    linear rule of Goyal et al., arXiv 1706.02677); null: lr is the peak"""
    weight_decay: float = 0.1
    """of matrices only; coefficients of mixes, norms, biases and tokens never decay"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of the moments"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    mixing_lr_factor: float = 1.0
    """learning rate of the coefficients of mixes, in units of lr"""
    gate_lr_factor: float | None = None
    """that of the gates of MoA (u, b), in units of lr; null: as mixing_lr_factor"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """shape after the warm-up"""
    warmup_steps: int | None = 50
    """optimiser steps of linear warm-up from zero; null: a tenth of the run"""
    warmup_fraction: float | None = None
    """share of the run in place of warmup_steps"""
    final_lr_factor: float = 0.0
    """learning rate at the end, in units of lr (not for constant)"""
    decay_fraction: float = 0.2
    """share of the run in which WSD decays"""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """how WSD decays"""
    average_decay: float = 0.0
    """weight of the old average in an average of the weights over the steps, kept beside them; 0: no average"""
    evaluate: Literal["average", "last"] = "average"
    """where there is an average: whether it or the last weights are validated, tested, exported and written with"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "muon_parameters", tuple(self.muon_parameters))
        choices = {"name": ("adamw", "muon"), "decay_shape": ("linear", "1-sqrt"), "evaluate": ("average", "last")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"optimizer.{name} is '{getattr(self, name)}'; choose from {', '.join(allowed)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum is {self.momentum}; give a number from 0 to below 1")
        if self.name == "muon" and not self.muon_parameters:
            raise UserError(
                "optimizer.muon_parameters is empty; name matrices for Muon, or set optimizer.name to adamw"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule is '{self.schedule}'; choose from {', '.join(SCHEDULES)}")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; give a finite number above 0")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"optimizer.decay_fraction is {self.decay_fraction}; give a share above 0, 1 at most")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise UserError(f"optimizer.reference_batch is {self.reference_batch}; give a number of samples, or null")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise UserError(f"optimizer.warmup_fraction is {self.warmup_fraction}; give a share from 0 to below 1")
        for name in ("weight_decay", "warmup_steps", "mixing_lr_factor", "gate_lr_factor", "final_lr_factor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name} is {value}; give a finite number of at least 0")
        if not 0 <= self.average_decay < 1:
            raise UserError(f"optimizer.average_decay is {self.average_decay}; give a number from 0 to below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {list(self.betas)} but must be two numbers, at least 0 and below 1")

    def of_run(self, samples: int | None, steps: int) -> "OptimizerConfig":
        """The same for one run: lr is its peak, warmup_steps its warm-up.

        Args:
            samples: of an optimiser step, over all devices; None: not known, which reference_batch does not allow.
            steps: optimiser steps of the run.
        """
        peak = self.lr
        if self.reference_batch is not None:
            if samples is None:
                raise UserError("optimizer.reference_batch needs data that know their batch_size; set it to null")
            peak *= samples / self.reference_batch
        share = self.warmup_fraction
        if share is None and self.warmup_steps is None:
            share = OPEN_WARMUP
        warmup = self.warmup_steps if share is None else round(share * steps)
        return replace(self, lr=peak, reference_batch=None, warmup_steps=warmup, warmup_fraction=None)


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (0 is the first) in units of the peak, of a config `of_run`."""
    warmup = config.warmup_steps
    assert warmup is not None
    rising = (step + 1) / warmup if step < warmup else math.inf
    if step < warmup and config.schedule != "wsd":
        return rising
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return cosine_schedule(1.0, config.final_lr_factor, progress)
    if config.schedule == "linear":
        left = 1 - min(progress, 1.0)
    else:
        left = min(1.0, max(0.0, total_steps - step) / max(1.0, config.decay_fraction * total_steps))
        if config.decay_shape == "1-sqrt":
            left = 1 - math.sqrt(1 - left)
    # WSD's decay belongs to the end of the run and may begin before the warm-up is over
    return min(rising, config.final_lr_factor + (1 - config.final_lr_factor) * left)


def group_name(name: str, domain: str | None) -> str:
    """Name of a parameter group; in an optimiser for several nets with the domain of its net."""
    return name if domain is None else f"{name}_{domain}"


def is_of_kind(group: str, kinds: Sequence[str], domain: str | None) -> bool:
    """Whether a parameter group of that name, also one of several with rates of their own, is of one of the kinds (see
    groups.py) and belongs to the domain."""
    suffix = group_name("", domain)
    return group.endswith(suffix) and group.removesuffix(suffix).partition(" x ")[0] in kinds


class Optimized(NamedTuple):
    """A net and how it is optimised."""

    net: nn.Module
    config: OptimizerConfig
    """of one run, see `OptimizerConfig.of_run`"""
    rates: Mapping[str, float] | None = None
    """multiplies the learning rate of each parameter, by its name; None: all have that of the config"""


def build_optimizer(
    net: nn.Module, config: OptimizerConfig, total_steps: int, rates: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The optimiser and its per-step schedule, as Lightning's configure_optimizers wants them.

    Args:
        net, config, rates: as in Optimized.
        total_steps: optimiser steps of the run.
    """
    return build_joint_optimizer({None: Optimized(net, config, rates)}, total_steps)


def build_joint_optimizer(parts: Mapping[str | None, Optimized], total_steps: int) -> dict[str, Any]:
    """One optimiser for several nets, each with its own settings and schedule.

    Args:
        parts: by domain. A parameter that several nets share belongs to the first of them.
        total_steps: optimiser steps of the run.
    """
    groups: list[dict[str, Any]] = []
    factors: list[Callable[[int], float]] = []
    taken: set[int] = set()
    for domain, part in parts.items():
        config = part.config
        for group in _groups(part):
            params = [p for p in group["params"] if id(p) not in taken]
            if params:
                name = group_name(group["name"], domain)
                groups.append({**group, "params": params, "name": name, "betas": config.betas, "eps": config.eps})
                factors.append(_factor(total_steps, config))
        taken |= {id(p) for p in part.net.parameters()}
    muon = any(group.get("momentum") is not None for group in groups)
    kind: type[torch.optim.AdamW] = MuonAdamW if muon else torch.optim.AdamW
    first = next(part.config for part in parts.values())
    fused = all(_can_fuse(part.net) for part in parts.values())
    optimizer = kind(groups, lr=first.lr, betas=first.betas, eps=first.eps, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_branch(
    schedule: torch.optim.lr_scheduler.LambdaLR, config: OptimizerConfig, total_steps: int, domain: str | None = None
) -> None:
    """Refuse a checkpoint whose rate is not the one that a run with WSD has at its step.

    Args:
        schedule: as the checkpoint restored it.
        config: of one run.
        total_steps: optimiser steps of the run.
        domain: of the net in an optimiser for several.

    Raises:
        UserError: the decay has begun there and not here, or here and not there, or is another one.
    """
    step, warmup = schedule.last_epoch, config.warmup_steps or 0
    wanted = learning_rate_factor(step, total_steps, config)
    rises = step < warmup and (wanted == (step + 1) / warmup or step >= total_steps)
    if config.schedule != "wsd" or step < 1 or rises:
        return
    for group, peak, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule._last_lr, strict=True):
        own = str(group.get("name", "")).endswith(group_name("", domain))
        if own and peak and not math.isclose(rate, peak * wanted, rel_tol=1e-6, abs_tol=1e-9 * peak):
            raise UserError(
                f"the checkpoint of step {step} has {rate / peak:.3g} of its peak rate, where this run (schedule wsd, "
                f"{total_steps} steps) has {wanted:.3g}; give a checkpoint from before the decay of either, or change "
                "trainer.max_steps or optimizer.decay_fraction"
            )


GroupOptions = list[dict[str, Any]]  # of each parameter group, in their order


def group_options(optimizer: torch.optim.Optimizer) -> GroupOptions:
    """The options of each parameter group; of an optimiser that has a schedule, with the peak rate "initial_lr"."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_group_options(schedule: torch.optim.lr_scheduler.LambdaLR, settings: GroupOptions) -> None:
    """Give the groups of a schedule's optimiser their options, and the rates of its step with these peaks.

    A checkpoint brings the options of the run that wrote it back with the moments, and its peaks with the step.
    """
    schedule.base_lrs = [options["initial_lr"] for options in settings]
    for group, options, factor in zip(schedule.optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):
        group.update(options)
        group["lr"] = options["initial_lr"] * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _groups(part: Optimized) -> list[dict[str, Any]]:
    net, config, rates = part
    patterns = config.muon_parameters if config.name == "muon" else ()
    mixing, gates = config.mixing_lr_factor, config.gate_lr_factor
    groups = parameter_groups(net, config.lr, config.weight_decay, mixing, patterns, gates)
    groups = [{**group, "momentum": config.momentum} if group["name"] == "muon" else group for group in groups]
    return groups if rates is None else scale_rates(net, groups, rates)


def _factor(total_steps: int, config: OptimizerConfig) -> Callable[[int], float]:
    return lambda step: learning_rate_factor(step, total_steps, config)


def _can_fuse(net: nn.Module) -> bool:
    return all(p.is_floating_point() for p in net.parameters())
