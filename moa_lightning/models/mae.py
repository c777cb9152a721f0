"""A masked autoencoder on any timm ViT that can leave patches out (He et al., arXiv 2111.06377).

The encoder sees the visible patches only; a narrow decoder of timm blocks gets their codes and a learned token in every
masked place and predicts pixels. Both have fixed sine-cosine positions (a rotary encoder keeps its own besides).
Masks come from noise that the caller gives: the patches with the smallest noise stay.
"""

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from ..injection import inject
from ..losses.mae import patchify
from .init import initialize, mae_rule
from .vit import (
    blocks_flops,
    build_vit,
    check_size,
    linear_flops,
    make_maskable,
    norms_flops,
    pooled,
    sincos_positions,
    untouched_tokens,
)


def random_mask(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches to keep, from noise (B, N).

    Returns:
        kept: int64 (B, n) ids of the n = int(N · (1 - mask_ratio)) patches with the smallest noise, in that order.
        mask: (B, N), 1 where a patch is removed, in noise's dtype.
        restore: int64 (B, N), position of each patch in the order of the noise.
    """
    length = noise.shape[1]
    keep = int(length * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    return order[:, :keep], (restore >= keep).to(noise.dtype), restore


class LastBlock(Block):
    """A timm block whose feed-forward layer reads only the tokens that are asked for."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens (B, T, D) -> those with the ids (B, M), or all of them."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        if ids is not None:
            x = x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Decoder(nn.Module):
    """Predicts the pixels of all patches from the codes of the visible ones: (B, n, D), (B, N) -> (B, N, pixels).

    With `wanted`, ids (B, M), only those patches pass through what follows the last attention; others come out as 0.
    """

    positions: Tensor

    def __init__(self, in_dim: int, dim: int, depth: int, heads: int, grid: tuple[int, int], pixels: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *grid)[None], persistent=False)
        kinds = [Block] * (depth - 1) + [LastBlock]
        self.blocks = nn.ModuleList(kind(dim, heads, qkv_bias=True) for kind in kinds)
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # as in the blocks
        self.pred = nn.Linear(dim, pixels)

    def forward(self, prefix: Tensor, patches: Tensor, restore: Tensor, wanted: Tensor | None = None) -> Tensor:
        prefix, patches = self.embed(prefix), self.embed(patches)
        batch, kept, dim = patches.shape
        masked = self.mask_token.to(patches.dtype).expand(batch, restore.shape[1] - kept, -1)
        x = torch.cat([patches, masked], dim=1).gather(1, restore[:, :, None].expand(-1, -1, dim))
        x = torch.cat([prefix, x + self.positions.to(x.dtype)], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        before = prefix.shape[1]
        x = last(x, None if wanted is None else wanted + before)
        pixels = self.pred(self.norm(x))
        if wanted is None:
            return pixels[:, before:]
        zeros = pixels.new_zeros(batch, restore.shape[1], pixels.shape[-1])
        return zeros.scatter(1, wanted[:, :, None].expand_as(pixels), pixels)


class MaskedAutoencoder(nn.Module):
    """Images (B, C, H, W) and noise (B, N) -> predicted patches (B, N, p²·C) and mask (B, N), 1 = removed.

    With `visible=False` only what the loss looks at is computed: predictions of visible patches are 0.

    Args:
        backbone: timm model name.
        backbone_args: options for timm (embed_dim, depth, num_heads, patch_size, ...).
        ffn, decoder_ffn: feed-forward layers of encoder and decoder.
        image_size: pixels; a multiple of the patch size.
        mask_ratio: share of patches removed.
        decoder_dim, decoder_depth, decoder_heads: size of the decoder.
        seed: initial weights are a function of (seed, parameter name).

    Raises:
        UserError: the backbone cannot leave patches out, or the mask leaves none or all.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: dict[str, Any],
        ffn: FFNConfig,
        decoder_ffn: FFNConfig,
        image_size: int,
        channels: int,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # the decoder wants all tokens, whatever else wants one vector
        options = {**{k: v for k, v in backbone_args.items() if k != "global_pool"}, **untouched_tokens(backbone)}
        self.encoder: Any = build_vit(backbone, ffn, image_size, channels, seed, **options)
        self.selector = make_maskable(self.encoder, backbone)
        check_size(self.encoder, image_size)
        self.mask_ratio = mask_ratio
        self.patch_size = int(self.encoder.patch_embed.patch_size[0])
        grid = tuple(self.encoder.patch_embed.grid_size)
        self.num_patches = grid[0] * grid[1]
        if not 0 < mask_ratio < 1 or not 0 < int(self.num_patches * (1 - mask_ratio)) < self.num_patches:
            raise UserError(f"mask_ratio {mask_ratio} leaves none or all of {self.num_patches} patches")
        if decoder_dim % decoder_heads:
            raise UserError(f"decoder_dim {decoder_dim} must be a multiple of decoder_heads {decoder_heads}")
        self._fix_positions(grid)
        pixels = self.patch_size**2 * channels
        self.decoder = Decoder(int(self.encoder.embed_dim), decoder_dim, decoder_depth, decoder_heads, grid, pixels)
        inject(self.decoder, decoder_ffn, seed=seed)
        initialize(self, seed, mae_rule)

    def _fix_positions(self, grid: tuple[int, int]) -> None:
        positions = getattr(self.encoder, "pos_embed", None)
        if positions is not None:
            prefix = positions.shape[1] - self.num_patches
            positions.requires_grad_(False)
            positions.data.copy_(sincos_positions(positions.shape[2], *grid, prefix=prefix)[None])

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Output tokens (B, prefix + n, D) for the patches `ids` (B, n), or for all of them."""
        if ids is None:
            return self.encoder.forward_features(images)
        with self.selector.keeping(ids):
            return self.encoder.forward_features(images)

    def forward(self, images: Tensor, noise: Tensor, visible: bool = True) -> tuple[Tensor, Tensor]:
        kept, mask, restore = random_mask(noise, self.mask_ratio)
        tokens = self.encode(images, kept)
        prefix = self.selector.num_prefix_tokens
        wanted = None if visible else restore.argsort(dim=1)[:, kept.shape[1] :]
        return self.decoder(tokens[:, :prefix], tokens[:, prefix:], restore, wanted), mask

    def features(self, images: Tensor) -> Tensor:
        """One vector an image (B, D): the mean of the output patches."""
        return pooled(self.encoder, self.encode(images))

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> patches (B, N, p²·C)."""
        return patchify(images, self.patch_size)

    def flops_per_image(self) -> float:
        """Matrix-product FLOPs of one forward pass for one image, predictions of visible patches left out."""
        encoder, decoder = self.encoder, self.decoder
        seen = self.selector.num_prefix_tokens + int(self.num_patches * (1 - self.mask_ratio))
        tokens = self.selector.num_prefix_tokens + self.num_patches
        patches = 2.0 * encoder.patch_embed.proj.weight.numel() * self.num_patches
        encoding = blocks_flops(encoder.blocks, int(encoder.embed_dim), seen) + norms_flops(encoder, seen)
        last: Any = decoder.blocks[-1]
        decoding = blocks_flops(decoder.blocks, decoder.embed_dim, tokens) + norms_flops(decoder, tokens - seen)
        decoding -= linear_flops(last.norm2, seen) + linear_flops(last.mlp, seen)
        ends = 2.0 * (decoder.embed.weight.numel() * seen + decoder.pred.weight.numel() * (tokens - seen))
        return patches + encoding + decoding + ends
