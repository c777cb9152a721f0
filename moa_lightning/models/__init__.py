"""Nets only: no optimiser, no Trainer, no data."""

from .classifier import ImageClassifier
from .dino import SelfDistillation
from .gpt import GPT, GPTConfig
from .joint import JointNet
from .mae import MaskedAutoencoder
from .sequence_classifier import SequenceClassifier

__all__ = [
    "GPT",
    "GPTConfig",
    "ImageClassifier",
    "JointNet",
    "MaskedAutoencoder",
    "SelfDistillation",
    "SequenceClassifier",
]
