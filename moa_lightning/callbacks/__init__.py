"""What is watched while training. Callbacks look on and write; none changes a net, a batch or a random state, but for
Pruning, which is asked to (pruning.py)."""

import lightning as L

from .collapse import Collapse
from .convergence import Convergence
from .dashboard import Dashboard
from .data_faults import DataFaults
from .feature_probes import FeatureProbes
from .gradients import GradientNorm
from .learned_mixes import LearnedMixes
from .learning_rate import LearningRate
from .linear_probe import OnlineProbe
from .mixing import MixingTelemetry
from .multiple_choice import MultipleChoice
from .pictures import Pictures
from .restored import RestoredState
from .routing import RoutingTelemetry
from .throughput import Throughput

__all__ = [
    "Collapse",
    "Convergence",
    "Dashboard",
    "DataFaults",
    "FeatureProbes",
    "GradientNorm",
    "LearnedMixes",
    "LearningRate",
    "MixingTelemetry",
    "MultipleChoice",
    "OnlineProbe",
    "Pictures",
    "RestoredState",
    "RoutingTelemetry",
    "Throughput",
    "default_callbacks",
]


def default_callbacks() -> list[L.Callback]:
    """The callbacks of every run, in the order that they need: Convergence gathers what those before it log."""
    return [
        RestoredState(),
        Dashboard(),
        LearningRate(),
        GradientNorm(),
        Throughput(),
        MixingTelemetry(),
        RoutingTelemetry(),
        LearnedMixes(),
        OnlineProbe(),
        Collapse(),
        Pictures(),
        DataFaults(),
        Convergence(),
    ]
