"""Feed-forward layers with fixed, learned (LA) or mixed (MoA) activations for vision transformers and language models.

    from moa_lightning import FFNConfig, FeedForward, inject, register_activation

The names are imported on first use, so that `moa --help` and the grid's own process do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .exchange.timm_models import register

if TYPE_CHECKING:
    from .activations import register_activation
    from .feedforward import FeedForward, FFNConfig
    from .injection import inject

__all__ = ["FFNConfig", "FeedForward", "UserError", "inject", "register_activation"]

_HOME = {
    "FFNConfig": "feedforward",
    "FeedForward": "feedforward",
    "inject": "injection",
    "register_activation": "activations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moa_lightning' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


register()  # timm.create_model("moa_vit", ...)
