"""Nets only: no optimiser, no Trainer, no data."""

from .dino import SelfDistillation
from .gpt import GPT, GPTConfig
from .mae import MaskedAutoencoder

__all__ = ["GPT", "GPTConfig", "MaskedAutoencoder", "SelfDistillation"]
