"""Losses: tensors in, a scalar out. They know nothing of nets, trainers or data."""

from .dino import DINOLoss
from .mae import masked_pixel_loss, patchify, unpatchify

__all__ = ["DINOLoss", "masked_pixel_loss", "patchify", "unpatchify"]
