"""Where a vision transformer looks: for pictures, not for training."""

from typing import Any

import torch
from torch import Tensor, nn

from .dino import SelfDistillation


def attention_maps(net: SelfDistillation, images: Tensor) -> Tensor | None:
    """Attention over the patches in the teacher's last block: the class token's, or the mean over the patches' own in
    backbones without one.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, heads, rows, columns), or None for backbones whose attention has rotary positions or another layout than
        one packed qkv projection.
    """
    backbone = net.teacher.backbone
    attention: Any = getattr(list(backbone.blocks)[-1], "attn", None)
    if getattr(backbone, "rope", None) is not None or not isinstance(getattr(attention, "qkv", None), nn.Linear):
        return None
    prefix = int(backbone.num_prefix_tokens)
    queries = slice(0, 1) if getattr(backbone, "cls_token", None) is not None else slice(prefix, None)
    found: list[Tensor] = []
    # inside the hook a sharded block's parameters are whole
    hook = attention.register_forward_hook(lambda module, inputs, _: found.append(_shares(module, inputs[0], queries)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks do not see the hook
            net.features(images)
    finally:
        hook.remove()
    patches = found[0][:, :, prefix:]
    patch = backbone.patch_embed.patch_size
    return patches.unflatten(-1, (images.shape[-2] // patch[0], images.shape[-1] // patch[1]))


def _shares(module: Any, x: Tensor, queries: slice) -> Tensor:
    """Attention weights of the queries on all tokens, averaged over the queries: x (B, N, D) -> (B, heads, N)."""
    heads = int(module.num_heads)
    qkv = module.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, head_dim)
    q, k = module.q_norm(qkv[0][:, :, queries]), module.k_norm(qkv[1])
    return torch.softmax((q @ k.mT).float() * module.scale, dim=-1).mean(2)
