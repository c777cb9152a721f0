"""timm vision transformers of several families, all made small: two blocks of width 48 on images of 16 pixels.

Between them: class token or none, distilled, registers, position tables or rotary positions (one set, or one a block
and head), layer scale, GLU layers with a norm inside, mean or attention pooling.
"""

import torch
from torch import Tensor

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 4}
IMAGE, PATCHES = 16, 16
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_small_patch16_rope_mixed_224",
]
NOT_PLAIN = {
    "swin_tiny_patch4_window7_224": 224,
    "beit_base_patch16_224": 32,
    "vit_relpos_small_patch16_224": 32,
    "vit_tiny_r_s16_p8_224": 32,
    "naflexvit_base_patch16_gap": 32,
    "resnet18": 32,
}


def images(batch: int = 2, channels: int = 3, size: int = IMAGE, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))
