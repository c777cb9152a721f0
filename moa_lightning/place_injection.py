"""Swap the other places of a timm net: gates on the output of its attention, point-wise norms for its norms.

A timm attention ends in x = proj(x), where the gate belongs, but its input is out of reach there. So the projection is
replaced by one that multiplies first and is handed the input by a hook in front of the attention. Names and values of
the projection stay, so checkpoints differ by what the gate adds. That ending is checked by class: those below are known
to have it, and a net with another kind of attention is refused by name.

Norms are all LayerNorms and RMSNorms of the net, as DyT's authors replace them, except inside attention, feed-forward
layers, pools and the patch embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .feedforward import FFNConfig
from .places import OutputGate, PointwiseNorm
from .random import named_seed

GATED_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
)
NORMS = ("LayerNorm", "LayerNormFp32", "RMSNorm", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")

Swap = tuple[nn.Module, str, nn.Module]
"""where a module stands, under which name there, and what shall stand there"""


class GatedProjection(nn.Linear):
    """W_o (attended ⊙ M(W_g x)) + b, with x in `source`; (..., h) -> (..., d). Takes over a projection's parameters."""

    def __init__(self, projection: nn.Linear, gate: OutputGate) -> None:
        super().__init__(projection.in_features, projection.out_features, projection.bias is not None, device="meta")
        self.weight, self.bias = projection.weight, projection.bias
        self.output_gate = gate
        self.source: Tensor | None = None

    def forward(self, attended: Tensor) -> Tensor:
        x, self.source = self.source, None
        assert x is not None
        return super().forward(self.output_gate(x, attended))


def hand_over(attention: Any, inputs: tuple[Tensor, ...]) -> None:
    """What runs before an attention with a gate."""
    attention.proj.source = inputs[0]


def place_swaps(model: nn.Module, config: FFNConfig, layers: list[str], seed: int) -> list[Swap]:
    """What `config` asks for besides its feed-forward layers; nothing is changed yet.

    Args:
        model: a timm net, on any device ("meta" included) and in any float dtype.
        layers: qualified names of its feed-forward layers.
        seed: of the random starts, together with the name.

    Raises:
        UserError: an attention or a norm of a kind that is not known, or none at all.
    """
    swaps: list[Swap] = []
    if config.attention_gate != "none":
        swaps += _gates(model, config, seed)
    if config.pointwise_norm != "none":
        swaps += _norms(model, config, layers, seed)
    return swaps


def apply(swaps: list[Swap]) -> None:
    """Put the new modules in their places."""
    for parent, name, module in swaps:
        setattr(parent, name, module)
        if isinstance(module, GatedProjection):
            parent.register_forward_pre_hook(hand_over)


def _gates(model: nn.Module, config: FFNConfig, seed: int) -> Iterator[Swap]:
    found = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not found:
        raise UserError(f"{type(model).__name__} has no attention that could be gated; set ffn.attention_gate to none")
    for name, attention in found:
        kind = f"{type(attention).__module__}.{type(attention).__qualname__}"
        projection: Any = getattr(attention, "proj", None)
        if kind not in GATED_ATTENTION or type(projection) is not nn.Linear:
            raise UserError(f"ffn.attention_gate cannot gate '{name}', a {kind}; set it to none, or take another net")
        if getattr(attention, "gate", None) is not None:
            raise UserError(f"'{name}' has a gate already; set ffn.attention_gate to none")
        with torch.device("meta"):
            gate = OutputGate(projection.out_features, projection.in_features, config)
        _start(gate, projection.weight, seed, f"{name}.proj.output_gate")
        yield attention, "proj", GatedProjection(projection, gate)


def _norms(model: nn.Module, config: FFNConfig, layers: list[str], seed: int) -> Iterator[Swap]:
    inside = [name for name, module in model.named_modules() if name in layers or _has_norms_of_its_own(name, module)]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _is_norm(module) and not any(name.startswith(f"{outer}.") for outer in inside)
    ]
    if not found:
        raise UserError(f"{type(model).__name__} has no norms to replace; set ffn.pointwise_norm to none")
    for name, norm in found:
        weight = getattr(norm, "weight", None)
        if type(norm).__name__ not in NORMS or weight is None or weight.dim() != 1:
            kind = type(norm).__name__
            raise UserError(
                f"ffn.pointwise_norm cannot replace '{name}', a {kind}; set it to none, or take another net"
            )
        with torch.device("meta"):
            new = PointwiseNorm(weight.shape[0], config)
        _start(new, weight, seed, name)
        path, _, leaf = name.rpartition(".")
        yield model.get_submodule(path), leaf, new


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "block" not in kind and (kind.endswith(("attention", "attn", "attentionrope")) or hasattr(module, "qkv"))


def _has_norms_of_its_own(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return _is_attention(module) or kind.startswith("AttentionPool") or name.endswith("patch_embed")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _start(layer: OutputGate | PointwiseNorm, like: Tensor, seed: int, name: str) -> None:
    """Give a layer on the meta device its start on the device of a parameter, the mix in float32 at least; where that
    parameter is on the meta device too, the layer stays there."""
    if like.device.type == "meta":
        return
    layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator(device="cpu").manual_seed(named_seed(seed, name)))
    layer.to(like.device, like.dtype)
    layer.mix.to(torch.promote_types(like.dtype, torch.float32))
