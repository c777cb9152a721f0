"""Magnitude pruning: which weights may be pruned, which are, and masks that hold them at zero.

A mask of sparsity s removes the share s of all weights that may be pruned, the smallest by magnitude, ranked over the
whole net or in each layer (Han et al., arXiv 1506.02626). Iterative pruning with rewinding (Frankle and Carbin, arXiv
1803.03635; Frankle et al., arXiv 1912.05671) trains, ranks what has survived, goes back to the weights of an early
step and trains again: what an earlier mask removed stays removed. Equal magnitudes go by position, so a mask is a
function of the weights alone.

Weights keep their names and hold real zeros. torch.nn.utils.prune, and with it Lightning's ModelPruning, renames a
weight to weight_orig with a buffer weight_mask: optimiser groups, Muon's patterns, sharding and checkpoints would all
see another net; ModelPruning also forgets its masks when a run is resumed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError
from .experts import StackedLinear
from .mixing import MixCoefficients
from .random import named_seed
from .sharded import local, sharded_as

Scope = Literal["global", "layer"]
ROUNDED = 1e-4  # a sparsity that is given with four digits may be that much less than the one that is meant
STUDENT, TEACHER = ".student.", ".teacher."  # the teacher of a self-distillation is pruned as its student
NET, AVERAGE = "net.", "average."  # and the average of a task's weights as the weights


def prunable(net: nn.Module, gates: bool, dense_blocks: int) -> dict[str, nn.Parameter]:
    """Trained weights of the linear layers in the transformer blocks, by qualified name, a shared one by its first.

    Patches, embeddings, heads, routers, norms and biases always stay dense.

    Args:
        gates: the gates of learned mixes (K, d) too.
        dense_blocks: the first blocks of each stack that stay dense.

    Raises:
        UserError: nothing is left.
    """
    found: dict[str, nn.Parameter] = {}
    for path, block in _blocks(net, dense_blocks):
        for inside, module in block.named_modules():
            leaf = "weight" if isinstance(module, nn.Linear | StackedLinear) else "gate_weight"
            if leaf == "gate_weight" and not (gates and isinstance(module, MixCoefficients)):
                continue
            parameter = module._parameters.get(leaf)
            if parameter is not None and parameter.requires_grad and all(parameter is not p for p in found.values()):
                found[f"{path}.{inside}.{leaf}"] = parameter
    if not found:
        raise UserError("pruning finds no linear layer in trained transformer blocks; lower pruning.dense_blocks")
    return found


def _blocks(net: nn.Module, skipped: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in net.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for number, block in [*module.named_children()][skipped:]:
                yield f"{name}.{number}", block


def magnitude_masks(
    weights: Mapping[str, Tensor], before: Mapping[str, Tensor], sparsity: float, scope: Scope, part: bool = False
) -> dict[str, Tensor]:
    """True where a weight stays.

    Args:
        weights: by name, whole.
        before: masks of an earlier round, for all names or for none.
        sparsity: share of zeros wanted in all, rounded to whole weights; with scope "layer" in each of them.
        scope: rank over all weights, or in each layer.
        part: the earlier masks were made for a larger net, so here they may be sparser, and then stay as they are.

    Raises:
        UserError: the earlier masks are sparser.
    """
    if scope == "layer":
        groups = [[name] for name in weights]
    else:
        groups = [list(weights)]
    masks: dict[str, Tensor] = {}
    for names in groups:
        size = torch.cat([weights[name].detach().flatten().abs().float() for name in names])
        if before:
            size[~torch.cat([before[name].flatten() for name in names])] = -1.0  # they go first
        count, gone = round(sparsity * len(size)), int((size < 0).sum())
        if count < gone - ROUNDED * len(size) and not part:
            raise UserError(
                f"pruning.sparsity is {sparsity}, and the masks to go on from have {gone / len(size):.4g} in "
                f"{names[0] if scope == 'layer' else 'all'} already; give at least that"
            )
        kept = torch.ones(len(size), dtype=torch.bool)
        kept[size.argsort(stable=True)[: max(count, gone)]] = False
        parts = kept.split([weights[name].numel() for name in names])
        masks |= {name: part.view(weights[name].shape) for name, part in zip(names, parts, strict=True)}
    return masks


def shuffled(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random masks with the same number of weights in each layer."""
    mixed = {}
    for name, mask in masks.items():
        generator = torch.Generator().manual_seed(named_seed(seed, f"mask of {name}"))
        mixed[name] = mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
    return mixed


def packed(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks as a checkpoint holds them: eight places a byte."""
    return {
        name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(mask.flatten().numpy()))}
        for name, mask in masks.items()
    }


def unpacked(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks again.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        return {name: _unpacked(entry["bits"].numpy(), tuple(entry["shape"])) for name, entry in stored.items()}
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError("the masks in the checkpoint are damaged; give another checkpoint") from error


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    places = math.prod(shape)
    if bits.shape != (math.ceil(places / 8),):
        raise ValueError("too few or too many bits")
    return torch.from_numpy(np.unpackbits(bits, count=places).astype(bool)).view(shape)


def density(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of weights that stay, by layer."""
    return {name: float(mask.double().mean()) for name, mask in masks.items()}


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Share of zeros in all masks together."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class HeldMasks:
    """The parts of masks that lie on this process, beside the parameters that they hold at zero.

    Args:
        net: what the names belong to.
        masks: whole, the same on all processes.

    Raises:
        UserError: a mask of another shape than its weight.
    """

    def __init__(self, net: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(net.named_parameters())
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []  # with this process's part of what is pruned
        for name, mask in masks.items():
            twins = {name.replace(STUDENT, TEACHER), name.replace(NET, AVERAGE, 1)}
            for place in {name, *twins} & parameters.keys():
                parameter = parameters[place]
                if parameter.shape != mask.shape:
                    raise UserError(f"the mask of {name} has the shape {tuple(mask.shape)}, and its weight another one")
                self.pairs.append((parameter, local(sharded_as((~mask).to(parameter.device), parameter))))

    @torch.no_grad()
    def weights(self) -> None:
        """Zero the pruned weights."""
        for parameter, pruned in self.pairs:
            local(parameter).masked_fill_(pruned, 0.0)  # a product would leave -0.0, and NaN

    @torch.no_grad()
    def gradients(self) -> None:
        """Zero their gradients: they neither clip the others' nor leave a trace in the optimiser."""
        for parameter, pruned in self.pairs:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what the optimiser remembers of them from before they were pruned."""
        for parameter, pruned in self.pairs:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    local(value).masked_fill_(pruned, 0.0)
