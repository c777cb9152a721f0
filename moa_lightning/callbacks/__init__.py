"""What is watched while training. Callbacks look on and write; none changes a net, a batch or a random state."""

import lightning as L

from .convergence import Convergence
from .data_faults import DataFaults
from .gradients import GradientNorm
from .learning_rate import LearningRate
from .mixing import MixingTelemetry
from .pictures import Pictures
from .restored import RestoredState
from .routing import RoutingTelemetry
from .throughput import Throughput

__all__ = [
    "Convergence",
    "DataFaults",
    "GradientNorm",
    "LearningRate",
    "MixingTelemetry",
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
        LearningRate(),
        GradientNorm(),
        Throughput(),
        MixingTelemetry(),
        RoutingTelemetry(),
        Pictures(),
        DataFaults(),
        Convergence(),
    ]
