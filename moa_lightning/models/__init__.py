"""Nets only: no optimiser, no Trainer, no data."""

from .classifier import ImageClassifier
from .dino import SelfDistillation
from .gpt import GPT, GPTConfig
from .joint import JointNet
from .mae import MaskedAutoencoder

__all__ = ["GPT", "GPTConfig", "ImageClassifier", "JointNet", "MaskedAutoencoder", "SelfDistillation"]
