"""Nets only: no optimiser, no Trainer, no data."""

from .classifier import ImageClassifier
from .dino import SelfDistillation
from .gpt import GPT
from .joint import JointNet
from .mae import MaskedAutoencoder
from .sequence_classifier import SequenceClassifier
from .trunk import GPTConfig

__all__ = [
    "GPT",
    "GPTConfig",
    "ImageClassifier",
    "JointNet",
    "MaskedAutoencoder",
    "SelfDistillation",
    "SequenceClassifier",
]
