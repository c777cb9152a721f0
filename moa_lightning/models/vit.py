"""timm vision transformers as encoders: built by name, with the feed-forward layers swapped, optionally on a subset of
patches. timm's own forward pass is used throughout, so whatever a model does with class tokens, registers or rotary
positions stays its business."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from ..injection import inject
from ..injection_adapters import first_activation
from ..mixing import MixCoefficients
from ..places import PointwiseNorm

# options of timm that download weights, or unpickle a file, which runs the code in it
WEIGHTS_FROM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def build_vit(name: str, ffn: FFNConfig, image_size: int, channels: int, seed: int, **options: Any) -> Any:
    """A timm vision transformer without a classifier, its feed-forward layers replaced as `ffn` says.

    Args:
        name: timm model name, such as vit_small_patch16_224.
        image_size: height and width in pixels.
        options: passed to timm.create_model (embed_dim, depth, num_heads, patch_size, drop_path_rate, ...).

    Returns:
        The net. Its `timm_activation` names what timm's own feed-forward layers compute, None where it is none of ours.

    Raises:
        UserError: unknown name, an option that the model does not take or that reads weights from somewhere, nothing
            to swap, a hidden_ratio of our own.
    """
    if ffn.hidden_ratio != FFNConfig().hidden_ratio:
        raise UserError("the hidden width of a timm net is its own: set backbone_args.mlp_ratio, not ffn.hidden_ratio")
    if ":" in name:
        raise UserError(f"backbone '{name}' lies elsewhere, and nothing is fetched: give a timm model by its name")
    for option in WEIGHTS_FROM:
        if options.pop(option, None):
            raise UserError(
                f"backbone_args.{option} reads weights of unknown origin, which is not done: see backbone_weights"
            )
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise UserError(f"unknown timm model '{name}'" + (f"; similar names: {similar}" if similar else ""))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            net: Any = timm.create_model(
                name, pretrained=False, num_classes=0, img_size=image_size, in_chans=channels, **options
            )
        except Exception as error:  # whatever timm trips over, the reason is what it was given
            raise UserError(f"timm cannot build '{name}' with img_size={image_size}, {options}: {error}") from error
    net.timm_activation = first_activation(net)
    try:
        inject(net, ffn, seed=seed, untrained=True)
    except UserError as error:
        raise UserError(f"timm model '{name}': {error}") from error
    return net


def untouched_tokens(name: str) -> dict[str, str]:
    """The option with which timm makes a net that leaves its output tokens alone and has no parts for pooling them. A
    distilled net takes none, and has no such parts."""
    return {} if "distilled" in name else {"global_pool": ""}


class PatchSelector(nn.Module):
    """Takes the place of a timm ViT's `patch_drop`: keeps the named patches, or all when none are named.

    Input (B, prefix + N, D) -> (B, prefix + kept, D); with `return_indices` (x, ids), from which timm's EVA class, the
    home of its rotary models, picks the matching positions.
    """

    def __init__(self, num_prefix_tokens: int, return_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens, self.return_indices = num_prefix_tokens, return_indices
        self.ids: Tensor | None = None  # (B, kept), set by `keeping`

    @contextmanager
    def keeping(self, ids: Tensor) -> Iterator[None]:
        """Keep patches `ids` int64 (B, kept) during the block."""
        self.ids = ids
        try:
            yield
        finally:
            self.ids = None

    def forward(self, x: Tensor) -> Any:
        if self.ids is not None:
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            patches = patches.gather(1, self.ids[:, :, None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([prefix, patches], dim=1)
        return (x, self.ids) if self.return_indices else x


def make_maskable(net: Any, name: str) -> PatchSelector:
    """Give a timm ViT a PatchSelector; UserError for models whose forward pass cannot leave patches out."""
    if not hasattr(net, "patch_drop") or not is_plain(net):
        raise UserError(
            f"'{name}' cannot leave out masked patches (it has window attention, relative position biases, a "
            "convolutional stem, class attention, a hierarchy or a forward pass of its own); use a plain timm ViT, "
            "DeiT-III, EVA-02, DINOv2 or DINOv3 model"
        )
    net.patch_drop = selector = PatchSelector(int(net.num_prefix_tokens), return_indices=isinstance(net, Eva))
    return selector


@contextmanager
def masking(net: Any, mask: Tensor, token: Tensor) -> Iterator[None]:
    """In this block a plain vision transformer gets `token` (1, D) in the place of the embedded patches that `mask`,
    bool (B, N), names; they keep their positions, of whatever kind."""

    def replace(embed: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        places = mask.view(*patches.shape[:-1], 1)  # of (B, N, D), or (B, rows, columns, D)
        return torch.where(places, token.to(patches.dtype), patches)

    hook = net.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def is_plain(net: nn.Module) -> bool:
    """Whether a timm net turns separate patches into one sequence of tokens, as a plain vision transformer does."""
    return hasattr(net, "num_prefix_tokens") and isinstance(getattr(net, "patch_embed", None), PatchEmbed)


def check_size(net: Any, size: int) -> None:
    """UserError where images of `size` pixels do not divide into the patches of a plain vision transformer."""
    patch = int(net.patch_embed.patch_size[0])
    if size % patch:
        raise UserError(f"images or crops of {size} pixels do not divide into patches of {patch}: change one of them")


def sincos_positions(dim: int, height: int, width: int, prefix: int = 0) -> Tensor:
    """Fixed sine-cosine positions of a grid as in MAE, float32 (prefix + height·width, dim), zero for prefix tokens.

    The first half of the channels encodes the column, the second the row, each as sines then cosines with frequencies
    10000^(-4i/dim).

    Raises:
        UserError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), table]).float()


def pooled(net: Any, tokens: Tensor) -> Tensor:
    """One vector an image from a ViT's output tokens (B, prefix + N, D) -> (B, D): the mean over patches."""
    return tokens[:, int(net.num_prefix_tokens) :].mean(1)


def blocks_flops(blocks: nn.ModuleList | nn.Sequential, dim: int, tokens: int) -> float:
    """Matrix-product FLOPs of one forward pass of transformer blocks of width `dim` over `tokens` tokens:
    `linear_flops`, and 4·dim per pair of tokens."""
    return linear_flops(blocks, tokens) + 4.0 * len(blocks) * dim * tokens**2


def linear_flops(module: nn.Module, tokens: int) -> float:
    """2 per weight of every linear layer and gate and token."""
    weights = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    return 2.0 * (weights + _gate_weights(module)) * tokens


def norms_flops(net: nn.Module, tokens: int) -> float:
    """Matrix-product FLOPs of one forward pass of the norms beside a net's blocks: 2 per weight of their gates and
    token, of which the norm behind pooling (fc_norm) sees one."""
    norms = {name: child for name, child in net.named_children() if isinstance(child, PointwiseNorm)}
    return sum(2.0 * _gate_weights(norm) * (1 if name == "fc_norm" else tokens) for name, norm in norms.items())


def _gate_weights(module: nn.Module) -> int:
    mixes = [part for part in module.modules() if isinstance(part, MixCoefficients)]
    return sum(mix.gate_weight.numel() for mix in mixes if mix.gate_weight is not None)
