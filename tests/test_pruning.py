"""Magnitude pruning against a slow ranking in NumPy and against torch.nn.utils.prune."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.pruning import (
    HeldMasks,
    density,
    magnitude_masks,
    packed,
    prunable,
    shuffled,
    sparsity_of,
    unpacked,
)

SHAPES = {"a": (7, 5), "b": (3, 2, 4), "c": (11,)}


def slow_masks(weights, before, sparsity, scope):
    """One weight after the other: the survivors, smallest first, equal ones by position."""
    arrays = {name: weight.numpy() for name, weight in weights.items()}
    masks = {name: np.ones(array.shape, bool) for name, array in arrays.items()}
    for names in [[name] for name in arrays] if scope == "layer" else [list(arrays)]:
        places = [(name, place) for name in names for place in np.ndindex(arrays[name].shape)]
        gone = [(n, p) for n, p in places if before and not before[n][p]]
        alive = [(n, p) for n, p in places if (n, p) not in gone]
        alive.sort(key=lambda place: abs(float(arrays[place[0]][place[1]])))
        for name, place in [*gone, *alive][: round(sparsity * len(places))]:
            masks[name][place] = False
    return {name: torch.from_numpy(mask) for name, mask in masks.items()}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    weights["c"][2:6] = 0.0  # equal ones, as gates at their start
    return weights


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_those_of_a_slow_ranking_over_three_rounds(scope):
    before = {}
    for round_, sparsity in enumerate((0.2, 0.5, 0.9)):
        weights = draw(round_)
        for name, mask in before.items():
            weights[name] *= mask
        masks = magnitude_masks(weights, before, sparsity, scope)
        assert same(masks, slow_masks(weights, before, sparsity, scope))
        assert sparsity_of(masks) == pytest.approx(sparsity, abs=0.03)
        assert all((masks[name] <= mask).all() for name, mask in before.items())
        before = masks
    with pytest.raises(UserError, match="give at least that"):
        magnitude_masks(draw(9), before, 0.4, scope)
    assert same(magnitude_masks(draw(9), before, sparsity_of(before), "global"), before)  # nothing more to prune


def test_a_random_mask_has_the_densities_of_the_layers():
    masks = magnitude_masks(draw(0), {}, 0.6, "global")
    mixed = shuffled(masks, seed=1)
    assert density(mixed) == density(masks)
    assert not same(mixed, masks)
    assert same(mixed, shuffled(masks, seed=1))
    assert not same(mixed, shuffled(masks, seed=2))


def test_masks_survive_a_checkpoint(tmp_path):
    masks = magnitude_masks(draw(0), {}, 0.6, "global")
    torch.save(packed(masks), tmp_path / "masks")
    assert same(unpacked(torch.load(tmp_path / "masks", weights_only=True)), masks)
    with pytest.raises(UserError, match="damaged"):
        unpacked({"a": {"shape": [7, 5], "bits": torch.zeros(2, dtype=torch.uint8)}})


def test_linear_layers_of_the_blocks_are_pruned_and_nothing_else():
    moe = MoEConfig(experts=2, top_k=1)
    net = GPT(GPTConfig(depth=2, dim=16, num_heads=2), FFNConfig("moa"), 32, 8, moe=moe)
    plain = prunable(net, gates=False, dense_blocks=0)
    leaves = {name.partition(".")[2].partition(".")[2] for name in plain}
    assert all(name.startswith("blocks.") for name in plain)
    assert not any("router" in name or "norm" in name or "gate_weight" in name for name in leaves)
    assert any(parameter.dim() == 3 for parameter in plain.values())  # stacked experts
    gated = prunable(net, gates=True, dense_blocks=0)
    assert {name.rpartition(".")[2] for name in gated.keys() - plain.keys()} == {"gate_weight"}
    assert {name.split(".")[1] for name in prunable(net, True, 1)} == {"1"}
    with pytest.raises(UserError, match="dense_blocks"):
        prunable(net, True, 2)


def test_a_pruned_net_trains_as_one_of_torch_does():
    """AdamW with weight decay and a memory from before; the gradients of what stays are clipped alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    theirs = copy.deepcopy(net)
    masks = magnitude_masks({f"{i}.weight": net[i].weight for i in (0, 2)}, {}, 0.5, "global")
    for i in (0, 2):
        prune.custom_from_mask(theirs[i], "weight", masks[f"{i}.weight"])
    optimizers = [torch.optim.AdamW(n.parameters(), lr=0.01, weight_decay=0.3) for n in (net, theirs)]
    held = HeldMasks(net, masks)
    held.weights()
    for step in range(20):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        for n, optimizer in zip((net, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (n(x) - x[:, :3]).square().mean().backward()
            if n is net:
                held.gradients()
            nn.utils.clip_grad_norm_(n.parameters(), 0.2)
            optimizer.step()
        held.weights()
    for i in (0, 2):
        assert torch.allclose(net[i].weight, theirs[i].weight_orig * theirs[i].weight_mask, atol=1e-6)
        assert (net[i].weight[~masks[f"{i}.weight"]] == 0).all()
        moment = optimizers[0].state[net[i].weight]["exp_avg"]
        assert (moment[~masks[f"{i}.weight"]] == 0).all()
