"""An average of the weights over the optimiser steps of a run, kept beside the weights.

    a = a + (1 - d) (w - a) after every step,    d = min(decay, (1 + t) / (10 + t)) with t steps before this one

Such an average is often better than the last weights while the learning rate is high (Polyak and Juditsky, 1992;
Morales-Brotons et al., arXiv 2411.18704). The rising d lets it forget the start of a short run; it follows from the
step alone, so nothing but the averages has to be saved.

A module whose parameters have the names that the weights have in the net and are not trained. So checkpoints hold them,
and under FSDP2 they are sharded as the weights are. Trained parameters only: buffers (a router's bias) and an averaged
teacher are the net's own. Lightning's WeightAveraging copies the whole task, which a sharded one refuses; averages
buffers; and at the end of a run writes the averages over the weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

NO_AVERAGE = "the run kept no average of its weights (optimizer.average_decay): ask for the last ones"


class WeightAverage(nn.Module):
    """The averages of a net's trained parameters, under their names; they start as the weights.

    Args:
        net: with its initial values, sharded where it will be.
        decay: the largest weight of the old average.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        copies: dict[int, nn.Parameter] = {}
        for name, weight in net.named_parameters(remove_duplicate=False):  # a tied matrix has both of its names
            if weight.requires_grad:
                copy = copies.setdefault(id(weight), nn.Parameter(weight.detach().clone(), requires_grad=False))
                _place(self, name).register_parameter(name.rpartition(".")[2], copy)

    @torch.no_grad()
    def follow(self, net: nn.Module, step: int) -> None:
        """Move the averages after optimiser step `step` (0 is the first)."""
        averages, weights = self._pairs(net)
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def exchange(self, net: nn.Module) -> None:
        """Give the net the averages and keep its weights here, or the other way round."""
        for average, weight in zip(*self._pairs(net), strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self, net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        weights: dict[str, Any] = dict(net.named_parameters())
        named = list(self.named_parameters())
        return [average for _, average in named], [weights[name] for name, _ in named]


def net_weights(checkpoint: Mapping[str, Any], which: str | None = None) -> dict[str, Tensor]:
    """The net's tensors in a checkpoint of a task, under their names in the net.

    Args:
        which: "average" or "last"; None: those that the run evaluates.

    Raises:
        UserError: there is no average, or no net.
    """
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, Mapping):
        raise UserError("the checkpoint holds no net; give one that a run of moa has written")
    last, average = (
        {name.removeprefix(place): tensor for name, tensor in state.items() if name.startswith(place)}
        for place in ("net.", "average.")
    )
    if which is None:
        settings = checkpoint.get("hyper_parameters", {}).get("optimizer") or {}
        which = settings.get("evaluate", "average") if average else "last"
    if which == "average" and not average:
        raise UserError(NO_AVERAGE)
    return last | average if which == "average" else last


def _place(root: nn.Module, name: str) -> nn.Module:
    """The submodule that a dotted name lies in, made where it is missing."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
