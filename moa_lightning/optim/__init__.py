"""Parameter groups, the optimiser and its schedules."""

from .average import NO_AVERAGE, WeightAverage, net_weights
from .groups import DECAYING, parameter_groups
from .muon import MuonAdamW
from .norms import total_norm
from .schedules import OptimizerConfig, build_optimizer, cosine_schedule, learning_rate_factor

__all__ = [
    "DECAYING",
    "NO_AVERAGE",
    "MuonAdamW",
    "OptimizerConfig",
    "WeightAverage",
    "build_optimizer",
    "cosine_schedule",
    "learning_rate_factor",
    "net_weights",
    "parameter_groups",
    "total_norm",
]
