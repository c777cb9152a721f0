"""Muon for matrices and AdamW for all other parameters, in one optimiser.

    m = β m + (1 - β) g;   u = β m + (1 - β) g   (Nesterov);   W = (1 - η λ) W - η · 0.2 sqrt(max(out, in)) · O(u)

O(u) is u with its singular values near 1, by five Newton-Schulz steps (Jordan et al., "Muon: An optimizer for hidden
layers in neural networks", 2024; kellerjordan.github.io/posts/muon). The factor gives the update the size of AdamW's,
so that one learning rate and one weight decay serve both (Liu et al., "Muon is Scalable for LLM Training", arXiv
2502.16982). Stacked matrices (E, out, in), such as experts', are treated each for itself.

One optimiser, because two would count every step twice for Lightning. A subclass of torch's AdamW, whose fused step
reads `found_inf` on the device and leaves everything alone where it is 1; the Muon step does the same. Of a sharded
matrix the update is gathered once and each process orthogonalises the whole; of stacked matrices each process has some
whole ones. Newton-Schulz enlarges rounding errors in small singular values, so unlike AdamW's, runs on another number
of processes agree only roughly.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sharded import local, sharded_as, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic step, as published
STEPS = 5
EPS = 1e-7
RMS = 0.2  # of an AdamW update, per element


def orthogonalized(g: Tensor) -> Tensor:
    """O(g) for matrices (..., out, in): U S' Vᵀ of g = U S Vᵀ, S' roughly in [0.7, 1.2]; in bfloat16."""
    x = g.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups with a `momentum`.

    Args:
        groups: parameter groups; Muon's hold matrices (out, in), or stacks of them (E, out, in).
        options: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__([{"momentum": None, **group} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's step for its groups, after the closure, then Muon's."""
        loss = super().step(closure)
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["momentum"] is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group, skipped)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """What AdamW's step asks for the tensors of a group; of Muon's it sees none."""
        return super()._init_group({**group, "params": []} if group["momentum"] is not None else group, *lists)

    def _move(self, parameter: Tensor, group: dict[str, Any], skipped: Tensor | None) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), device=local(parameter).device)  # AdamW wants one in every state it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        weight, gradient, buffer = local(parameter), local(parameter.grad), local(state["momentum_buffer"])
        keep: float | Tensor = 1.0
        if skipped is not None:
            keep = 1.0 - skipped.to(weight.device)
            gradient = torch.where(keep > 0, gradient, 0.0)
        state["step"] += keep
        buffer.add_((gradient - buffer) * ((1 - momentum) * keep))
        update = _orthogonalized_shard(gradient.lerp(buffer, momentum), parameter).to(weight.dtype)
        rate = group["lr"] * keep
        weight.mul_(1 - rate * group["weight_decay"])
        weight.sub_(update * (rate * RMS * max(parameter.shape[-2:]) ** 0.5))


def _orthogonalized_shard(update: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of O(update), from its part."""
    if not isinstance(parameter, DTensor):
        return orthogonalized(update)
    if parameter.dim() > 2:  # sharded by experts
        return orthogonalized(update) if update.numel() else update
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(update, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return local(sharded_as(orthogonalized(whole(sharded)), parameter))
