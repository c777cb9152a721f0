"""Where a vision transformer's class token looks: for pictures, not for training."""

from typing import Any

import torch
from torch import Tensor, nn

from .dino import SelfDistillation


def class_attention(net: SelfDistillation, images: Tensor) -> Tensor | None:
    """Attention of the class token over the patches in the teacher's last block.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, heads, rows, columns), or None for backbones without a class token or whose attention has rotary positions
        or another layout than one packed qkv projection.
    """
    backbone = net.teacher.backbone
    attention: Any = getattr(list(backbone.blocks)[-1], "attn", None)
    if getattr(backbone, "cls_token", None) is None or getattr(backbone, "rope", None) is not None:
        return None
    if not isinstance(getattr(attention, "qkv", None), nn.Linear):
        return None
    found: list[Tensor] = []
    # inside the hook a sharded block's parameters are whole
    hook = attention.register_forward_hook(lambda module, inputs, _: found.append(_class_row(module, inputs[0])))
    try:
        net.features(images)
    finally:
        hook.remove()
    patches = found[0][:, :, int(backbone.num_prefix_tokens) :]
    patch = backbone.patch_embed.patch_size
    return patches.unflatten(-1, (images.shape[-2] // patch[0], images.shape[-1] // patch[1]))


def _class_row(module: Any, x: Tensor) -> Tensor:
    """Attention weights of token 0 on all tokens: x (B, N, D) -> (B, heads, N)."""
    heads = int(module.num_heads)
    qkv = module.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, head_dim)
    q, k = module.q_norm(qkv[0][:, :, :1]), module.k_norm(qkv[1])
    return torch.softmax((q @ k.mT).float() * module.scale, dim=-1)[:, :, 0]
