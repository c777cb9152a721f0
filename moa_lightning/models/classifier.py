"""A timm vision transformer with a linear classifier, as MAE fine-tunes it (He et al., arXiv 2111.06377, official
code).

With pool "avg" the output patches are averaged and normalised by a layer of their own, which takes the place of the
final norm, and the head starts near zero (standard deviation 2e-5), so that its first gradients do not disturb what
lies below. With pool "token" the class token is read behind the final norm, as DINO's own evaluation does.
"""

from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from .init import initialize, vision_rule
from .vit import blocks_flops, build_vit, check_size, is_plain, norms_flops

HEAD_STD = 2e-5
HEADS = ("head", "head_dist")  # distilled nets have a second one, for the distillation token: logits are the mean


class ImageClassifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes).

    Args:
        backbone: timm model name.
        backbone_args: options for timm (embed_dim, depth, num_heads, patch_size, ...).
        ffn: feed-forward layers.
        image_size: pixels; a multiple of the patch size.
        num_classes: size of the head.
        pool: "avg" (mean over patches) or "token" (class token).
        drop_path_rate: at the last block, rising linearly over the blocks.
        seed: initial weights are a function of (seed, parameter name).

    Raises:
        UserError: the backbone is no plain vision transformer, or has no class token to read.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: dict[str, Any],
        ffn: FFNConfig,
        image_size: int,
        channels: int,
        num_classes: int,
        pool: str = "avg",
        drop_path_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        dropped = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        options = {**dropped, **backbone_args, "global_pool": pool}
        self.vit: Any = build_vit(backbone, ffn, image_size, channels, seed, **options)
        if not is_plain(self.vit) or not hasattr(self.vit, "blocks"):
            raise UserError(f"'{backbone}' is not a plain vision transformer, which ImageClassification needs")
        check_size(self.vit, image_size)
        self.vit.reset_classifier(num_classes)
        initialize(self, seed, classifier_rule)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads, one vector an image (B, D)."""
        return self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both of images (B, C, H, W): (B, D), (B, num_classes)."""
        tokens = self.vit.forward_features(images)
        return self.vit.forward_head(tokens, pre_logits=True), self.vit.forward_head(tokens)

    def layer_rates(self, decay: float) -> dict[str, float]:
        """Learning rate of each parameter in units of the head's: `decay` once for every layer that lies above it.

        Layers, as timm counts them: patches, tokens and positions; each block, the last one with a norm behind it;
        head (Clark et al., arXiv 2003.10555; Bao et al., arXiv 2106.08254).
        """
        layers = group_parameters(self.vit, self.vit.group_matcher(coarse=False), reverse=True)
        top = max(layers.values())
        return {f"vit.{name}": decay ** (top - layer) for name, layer in layers.items()}

    def flops_per_image(self) -> float:
        """Matrix-product FLOPs of one forward pass for one image."""
        vit = self.vit
        patches = int(vit.patch_embed.num_patches)
        tokens = patches + int(vit.num_prefix_tokens)
        blocks = blocks_flops(vit.blocks, int(vit.embed_dim), tokens) + norms_flops(vit, tokens)
        heads = sum(getattr(vit, name).weight.numel() for name in HEADS if hasattr(vit, name))
        return 2.0 * vit.patch_embed.proj.weight.numel() * patches + blocks + 2.0 * heads


def classifier_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """vision_rule, and heads near zero."""
    if name in [f"vit.{head}.weight" for head in HEADS]:
        parameter.normal_(std=HEAD_STD, generator=generator)
    else:
        vision_rule(module, name, parameter, generator)
