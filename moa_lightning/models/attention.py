"""What a vision transformer makes of an image: where its last block looks, and what it says of every patch. For
pictures, not for training.

The attention is taken where it is computed, in torch's attention function, so it is the net's own with whatever
rotations and norms queries and keys have had.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Look(NamedTuple):
    """Of images (B, C, H, W) with a grid of patches (rows, columns)."""

    attention: Tensor | None
    """(B, heads, rows, columns): shares of the patches in the last block's attention, of the class token, or the mean
    of the patches' own in nets without one; None where the attention is not torch's function"""
    patches: Tensor
    """(B, rows, columns, D): what the last block puts out"""
    features: Tensor
    """(B, D): what `run` returned"""


class _Attention(TorchFunctionMode):
    """While watching, keeps queries, keys and scale of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.found: tuple[Tensor, Tensor, float] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watching and func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.found = q, k, kwargs.get("scale") or 1 / math.sqrt(q.shape[-1])
        return func(*args, **kwargs)


def look(backbone: Any, images: Tensor, run: Callable[[Tensor], Tensor]) -> Look:
    """Attention and patches of a timm vision transformer.

    Args:
        backbone: the net that `run` runs, on plain images.
        images: (B, C, H, W).
        run: the method of the whole net that computes features; through it a sharded net has its parameters whole.
    """
    prefix, patch = int(backbone.num_prefix_tokens), backbone.patch_embed.patch_size
    grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
    attention, tokens = _Attention(), torch.empty(0)

    def begin(module: Any, inputs: Any) -> None:
        attention.watching = True

    def end(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal tokens
        attention.watching, tokens = False, output

    last = list(backbone.blocks)[-1]
    hooks = [last.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    try:
        with attention, torch.compiler.set_stance("force_eager"):  # compiled blocks do not see the hooks
            features = run(images)
    finally:
        for hook in hooks:
            hook.remove()
    shares = None
    if attention.found is not None:
        queries = slice(0, 1) if getattr(backbone, "cls_token", None) is not None else slice(prefix, None)
        q, k, scale = attention.found  # (B, heads, N, head_dim)
        shares = torch.softmax((q[:, :, queries] @ k.mT).float() * scale, dim=-1).mean(2)[..., prefix:]
    patches = tokens[:, prefix:].unflatten(1, grid)
    return Look(None if shares is None else shares.unflatten(-1, grid), patches, features)
