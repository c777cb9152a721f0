"""Parameter groups, the optimiser and its schedules."""

from .groups import parameter_groups
from .norms import total_norm
from .schedules import OptimizerConfig, build_optimizer, cosine_schedule, learning_rate_factor

__all__ = [
    "OptimizerConfig",
    "build_optimizer",
    "cosine_schedule",
    "learning_rate_factor",
    "parameter_groups",
    "total_norm",
]
