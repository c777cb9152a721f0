"""What a representation or a language model is worth: functions, torchmetrics that add up over processes, a probe."""

from .knn import KNNAccuracy, knn_accuracies, knn_votes
from .linear import LinearProbe
from .linear_sweep import LinearAccuracy, linear_accuracy
from .rank import FeatureSpectrum, feature_rank, feature_spread
from .text import TextMetrics

__all__ = [
    "FeatureSpectrum",
    "KNNAccuracy",
    "LinearAccuracy",
    "LinearProbe",
    "TextMetrics",
    "feature_rank",
    "feature_spread",
    "knn_accuracies",
    "knn_votes",
    "linear_accuracy",
]
