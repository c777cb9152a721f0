"""Losses: tensors in, a scalar out. They know nothing of nets, trainers or data."""

from .dino import DINOLoss
from .koleo import koleo_loss
from .mae import masked_pixel_loss, patchify, unpatchify

__all__ = ["DINOLoss", "koleo_loss", "masked_pixel_loss", "patchify", "unpatchify"]
