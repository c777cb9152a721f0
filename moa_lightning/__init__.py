"""Feed-forward layers with fixed, learned (LA) or mixed (MoA) activations for vision transformers and language models.

from moa_lightning import FFNConfig, FeedForward, inject, register_activation
"""

from .activations import register_activation
from .errors import UserError
from .feedforward import FeedForward, FFNConfig
from .inject import inject

__all__ = ["FFNConfig", "FeedForward", "UserError", "inject", "register_activation"]
