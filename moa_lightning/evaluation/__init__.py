"""What a representation or a language model is worth, as torchmetrics that add up over processes."""

from .knn import KNNAccuracy, knn_votes
from .text import TextMetrics

__all__ = ["KNNAccuracy", "TextMetrics", "knn_votes"]
