"""Parameter groups, the optimiser and its schedules."""

from .average import NO_AVERAGE, WeightAverage, net_weights
from .groups import DECAYING, parameter_groups
from .muon import MuonAdamW
from .norms import split_sharded, total_norm
from .schedules import (
    GroupOptions,
    Optimized,
    OptimizerConfig,
    apply_group_options,
    build_joint_optimizer,
    build_optimizer,
    check_branch,
    cosine_schedule,
    group_options,
    is_of_kind,
    learning_rate_factor,
)

__all__ = [
    "DECAYING",
    "NO_AVERAGE",
    "GroupOptions",
    "MuonAdamW",
    "Optimized",
    "OptimizerConfig",
    "WeightAverage",
    "apply_group_options",
    "build_joint_optimizer",
    "build_optimizer",
    "check_branch",
    "cosine_schedule",
    "group_options",
    "is_of_kind",
    "learning_rate_factor",
    "net_weights",
    "parameter_groups",
    "split_sharded",
    "total_norm",
]
