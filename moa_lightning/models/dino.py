"""Self-distillation without labels: a student and an averaged teacher, each a timm ViT with a projection head (Caron et
al., arXiv 2104.14294)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from ..optim.norms import split_sharded
from .init import initialize, vision_rule
from .vit import blocks_flops, build_vit, check_size, is_plain


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
    """A backbone and its head; crops of one size (n, C, H, W) -> (n, out_dim)."""

    def __init__(self, backbone: Any, head: DINOHead) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    def forward(self, views: list[Tensor]) -> Tensor:
        """Crops [(B, C, H, W), ...] -> (crops·B, out_dim), crop after crop, one backbone pass per size."""
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in group_by_size(views)]))


def group_by_size(views: list[Tensor]) -> list[list[Tensor]]:
    """Neighbouring views of equal size together."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape[-2:] == view.shape[-2:]:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


class SelfDistillation(nn.Module):
    """Student and teacher. Views [(B, C, H, W), ...] -> student outputs of all views, teacher outputs of the globals.

    Args:
        backbone: timm model name; must take images of other sizes (dynamic_img_size).
        backbone_args: options for timm.
        ffn: feed-forward layers of the backbone.
        out_dim, hidden_dim, bottleneck_dim, norm_last_layer: the head.
        drop_path_rate: of the student only.
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
    ) -> None:
        super().__init__()

        def build(drop_path: float) -> ProjectedViT:
            dropped = {"drop_path_rate": drop_path} if drop_path else {}
            options = {"dynamic_img_size": True, **dropped, **backbone_args}
            vit = build_vit(backbone, ffn, image_size, channels, seed, **options)
            if not is_plain(vit):
                raise UserError(f"'{backbone}' is not a plain vision transformer, which multi-crop training needs")
            check_size(vit, image_size)
            head = DINOHead(int(vit.num_features), out_dim, hidden_dim, bottleneck_dim, norm_last_layer)
            return ProjectedViT(vit, head)

        self.student = build(drop_path_rate)
        initialize(self.student, seed, dino_rule)
        self.teacher = build(0.0)
        initialize(self.teacher, seed, dino_rule)  # the same names: the same values
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SelfDistillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        for view in views:
            check_size(self.student.backbone, view.shape[-1])
        with torch.no_grad():
            teacher = self.teacher(views[:2])
        return self.student(views), teacher

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum · teacher + (1 - momentum) · student, parameter by parameter."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        for olds, news in zip(split_sharded(teacher), split_sharded(student), strict=True):
            torch._foreach_lerp_(olds, news, 1 - momentum)
        for old, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            old.copy_(new)

    def features(self, images: Tensor) -> Tensor:
        """One vector an image (B, D) from the teacher's backbone, as timm pools it (class token where there is one)."""
        return self.teacher.backbone(images)

    def flops_per_image(self, view_sizes: list[int]) -> tuple[float, float]:
        """Matrix-product FLOPs of one forward pass for one image: of the student (all views), the teacher (two).

        Attention pooling, which some backbones have, is not counted.
        """
        net = self.student.backbone
        patch = int(net.patch_embed.patch_size[0])
        embed, head = net.patch_embed.proj.weight.numel(), self.student.head.matrix_weights()

        def view(size: int) -> float:
            patches = (size // patch) ** 2
            blocks = blocks_flops(net.blocks, int(net.embed_dim), patches + int(net.num_prefix_tokens))
            return 2.0 * embed * patches + blocks + 2.0 * head

        return sum(map(view, view_sizes)), sum(map(view, view_sizes[:2]))


def dino_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """vision_rule, and prototype directions drawn like torch's linear layer, their norms 1."""
    if isinstance(module, CosineLinear) and name.endswith("weight"):
        bound = parameter.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, CosineLinear):
        parameter.fill_(1.0)
    else:
        vision_rule(module, name, parameter, generator)
