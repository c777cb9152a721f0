"""Self-distillation without labels: a student and an averaged teacher, each a timm ViT with a projection head (Caron et
al., arXiv 2104.14294), and with a token in the place of patches that the student does not see (iBOT, Zhou et al., arXiv
2111.07832; as DINOv2 has it, Oquab et al., arXiv 2304.07193)."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from ..masking import IBOTConfig, check_grid
from ..optim.norms import split_sharded
from .init import initialize, vision_rule
from .vit import blocks_flops, build_vit, check_size, is_plain, masking, norms_flops

BLOCK = re.compile(r"student\.backbone\.blocks\.(\d+)\.")
STEM = re.compile(r"mask_token|student\.backbone\.(\w+_token|pos_embed|patch_embed|norm_pre|rope)\b")


class DINOHead(nn.Module):
    """Three linear layers with GELU, then a cosine layer on prototypes: (n, in_dim) -> (n, out_dim).

    The last layer's rows have norm 1 when `norm_last_layer`, otherwise a learned norm (weight normalisation).
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, norm_last_layer: bool = True
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = CosineLinear(bottleneck_dim, out_dim, learned_norm=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))

    def matrix_weights(self) -> int:
        """Weights of its matrix products."""
        layers = [m for m in self.modules() if isinstance(m, nn.Linear)]
        return sum(layer.weight.numel() for layer in layers)


class CosineLinear(nn.Linear):
    """x @ (g · w/|w|)ᵀ with one direction w and one norm g a row; g is 1 unless learned. (n, in) -> (n, out)."""

    def __init__(self, in_dim: int, out_dim: int, learned_norm: bool) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.norm = nn.Parameter(torch.ones(out_dim, 1)) if learned_norm else None

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=-1)
        return F.linear(x, weight if self.norm is None else self.norm * weight)


class ProjectedViT(nn.Module):
    """A backbone and its head; crops of one size (n, C, H, W) -> (n, out_dim). `patch_head` is one for patches, where
    they have their own."""

    def __init__(self, backbone: Any, head: DINOHead, patch_head: DINOHead | None = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head, self.patch_head = head, patch_head

    def forward(self, views: list[Tensor]) -> Tensor:
        """Crops [(B, C, H, W), ...] -> (crops·B, out_dim), crop after crop, one backbone pass per size."""
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in group_by_size(views)]))

    def with_patches(
        self, views: list[Tensor], positions: Tensor, hiding: AbstractContextManager[None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Also the outputs (M, K) of patches: those at `positions` (M,) among all patches of the two global crops, crop
        after crop. Patches are normalised as the feature of a crop is; the global crops pass within `hiding`."""
        net = self.backbone
        with hiding or nullcontext():
            tokens = net.forward_features(torch.cat(views[:2]))
        patches = net.fc_norm(tokens[:, int(net.num_prefix_tokens) :]).flatten(0, 1)[positions]
        local = [net(torch.cat(group)) for group in group_by_size(views[2:])]
        crops = torch.cat([net.forward_head(tokens), *local])
        if self.patch_head is not None:
            return self.head(crops), self.patch_head(patches)
        out = self.head(torch.cat([crops, patches]))
        return out[: len(crops)], out[len(crops) :]


def group_by_size(views: list[Tensor]) -> list[list[Tensor]]:
    """Neighbouring views of equal size together."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape[-2:] == view.shape[-2:]:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


class MaskedOutputs(NamedTuple):
    """Outputs of a student that does not see all patches, and of its teacher, which does."""

    student: Tensor
    """of all views, (crops·B, K)"""
    teacher: Tensor
    """of the global crops, (2·B, K)"""
    student_patches: Tensor
    """for the hidden patches, (M, K)"""
    teacher_patches: Tensor


class SelfDistillation(nn.Module):
    """Student and teacher. Views [(B, C, H, W), ...] -> student outputs of all views, teacher outputs of the globals.

    Args:
        backbone: timm model name; must take images of other sizes (dynamic_img_size).
        backbone_args: options for timm.
        ffn: feed-forward layers of the backbone.
        out_dim, hidden_dim, bottleneck_dim, norm_last_layer: the head.
        drop_path_rate: of the student only.
        ibot: adds a mask token and, where it says so, heads for patches.
        seed: initial weights are a function of (seed, parameter name); the teacher starts as the student.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: dict[str, Any],
        ffn: FFNConfig,
        image_size: int,
        channels: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        drop_path_rate: float = 0.1,
        seed: int = 0,
        ibot: IBOTConfig | None = None,
    ) -> None:
        super().__init__()

        def build(drop_path: float) -> ProjectedViT:
            dropped = {"drop_path_rate": drop_path} if drop_path else {}
            options = {"dynamic_img_size": True, **dropped, **backbone_args}
            not_plain = f"'{backbone}' is not a plain vision transformer, which multi-crop training needs"
            try:
                vit = build_vit(backbone, ffn, image_size, channels, seed, **options)
            except UserError as error:
                if "img_size'" in str(error.__cause__):  # timm's model takes one size, or knows none
                    raise UserError(not_plain) from error
                raise
            if not is_plain(vit):
                raise UserError(not_plain)
            check_size(vit, image_size)
            if ibot is not None:
                check_grid(vit.patch_embed.grid_size, ibot)
            head = DINOHead(int(vit.num_features), out_dim, hidden_dim, bottleneck_dim, norm_last_layer)
            if ibot is None or ibot.out_dim is None:
                return ProjectedViT(vit, head)
            sizes = ibot.out_dim, ibot.hidden_dim, ibot.bottleneck_dim
            return ProjectedViT(vit, head, DINOHead(int(vit.num_features), *sizes, norm_last_layer))

        self.student = build(drop_path_rate)
        initialize(self.student, seed, dino_rule)
        self.teacher = build(0.0)
        initialize(self.teacher, seed, dino_rule)  # the same names: the same values
        self.teacher.requires_grad_(False).eval()
        # not a part of the student: the teacher sees every patch, and the encoder that is exported has no such token
        self.mask_token = None if ibot is None else nn.Parameter(torch.zeros(1, int(self.student.backbone.embed_dim)))

    def train(self, mode: bool = True) -> "SelfDistillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        self._check(views)
        with torch.no_grad():
            teacher = self.teacher(views[:2])
        return self.student(views), teacher

    def masked(self, views: list[Tensor], mask: Tensor, positions: Tensor) -> MaskedOutputs:
        """The same with patches of the global crops hidden from the student, and what both say of these.

        Args:
            mask: bool (2·B, N), True where a patch is hidden; crop after crop.
            positions: int64 (M,) of the hidden patches in the flattened mask.
        """
        assert self.mask_token is not None
        self._check(views)
        with torch.no_grad():
            teacher, teacher_patches = self.teacher.with_patches(views[:2], positions)
        hiding = masking(self.student.backbone, mask, self.mask_token)
        student, student_patches = self.student.with_patches(views, positions, hiding)
        return MaskedOutputs(student, teacher, student_patches, teacher_patches)

    def _check(self, views: list[Tensor]) -> None:
        for view in views:
            check_size(self.student.backbone, view.shape[-1])

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum · teacher + (1 - momentum) · student, parameter by parameter."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        for olds, news in zip(split_sharded(teacher), split_sharded(student), strict=True):
            torch._foreach_lerp_(olds, news, 1 - momentum)
        for old, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            old.copy_(new)

    def layer_rates(self, decay: float, patch_embed: float) -> dict[str, float]:
        """Learning rate of each parameter of the student in units of its head's: `decay` once for every layer above it,
        and `patch_embed` besides for the patch embedding.

        Layers, as DINOv2 counts them: patches, tokens and positions; each block; the last norm and the heads.
        """
        top = len(self.student.backbone.blocks) + 1

        def rate(name: str) -> float:
            if match := BLOCK.match(name):
                return decay ** (top - 1 - int(match[1]))
            if not STEM.match(name):
                return 1.0
            return decay**top * (patch_embed if ".patch_embed." in name else 1.0)

        return {name: rate(name) for name, parameter in self.named_parameters() if parameter.requires_grad}

    def features(self, images: Tensor) -> Tensor:
        """One vector an image (B, D) from the teacher's backbone, as timm pools it (class token where there is one)."""
        return self.teacher.backbone(images)

    def flops_per_image(self, view_sizes: list[int], masked_share: float = 0.0) -> tuple[float, float]:
        """Matrix-product FLOPs of one forward pass for one image: of the student (all views), the teacher (two).

        Attention pooling, which some backbones have, is not counted.

        Args:
            masked_share: of the patches of the global crops, all of which pass a head.
        """
        net = self.student.backbone
        patch = int(net.patch_embed.patch_size[0])
        embed, head = net.patch_embed.proj.weight.numel(), self.student.head.matrix_weights()

        def view(size: int) -> float:
            patches = (size // patch) ** 2
            tokens = patches + int(net.num_prefix_tokens)
            blocks = blocks_flops(net.blocks, int(net.embed_dim), tokens) + norms_flops(net, tokens)
            return 2.0 * embed * patches + blocks + 2.0 * head

        masked = masked_share * sum((size // patch) ** 2 for size in view_sizes[:2])
        patches = 2.0 * masked * (self.student.patch_head or self.student.head).matrix_weights()
        return sum(map(view, view_sizes)) + patches, sum(map(view, view_sizes[:2])) + patches


def dino_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """vision_rule, and prototype directions drawn like torch's linear layer, their norms 1."""
    if isinstance(module, CosineLinear) and name.endswith("weight"):
        bound = parameter.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, CosineLinear):
        parameter.fill_(1.0)
    else:
        vision_rule(module, name, parameter, generator)
