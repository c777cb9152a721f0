"""Parameter groups, the optimiser and its schedules."""

from .groups import DECAYING, parameter_groups
from .muon import MuonAdamW
from .norms import total_norm
from .schedules import OptimizerConfig, build_optimizer, cosine_schedule, learning_rate_factor

__all__ = [
    "DECAYING",
    "MuonAdamW",
    "OptimizerConfig",
    "build_optimizer",
    "cosine_schedule",
    "learning_rate_factor",
    "parameter_groups",
    "total_norm",
]
