"""What a representation or a language model is worth: functions, torchmetrics that add up over processes, a probe."""

from .knn import KNNAccuracy, knn_votes
from .linear import LinearProbe
from .rank import FeatureSpectrum, feature_rank, feature_spread
from .text import TextMetrics

__all__ = [
    "FeatureSpectrum",
    "KNNAccuracy",
    "LinearProbe",
    "TextMetrics",
    "feature_rank",
    "feature_spread",
    "knn_votes",
]
