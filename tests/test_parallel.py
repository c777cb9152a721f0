"""How a net is sharded and recomputed: precision of the parts, same numbers, less memory."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from moa_lightning.feedforward import FFNConfig
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.parallel import checkpoint_blocks, shard, transformer_blocks
from moa_lightning.planning.tracker import Tracker

TOKENS = torch.arange(32).reshape(2, 16) % 11


def gpt(moe: MoEConfig = MoEConfig()) -> GPT:  # noqa: B008 - frozen
    net = GPT(GPTConfig(depth=2, dim=32, num_heads=2), FFNConfig("moa", hidden_ratio=2.0), 11, 16, moe=moe)
    for parameter in net.parameters():  # those that start at zero would hide what flows through them
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return net


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(net: GPT) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the bytes that the forward pass kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(TOKENS).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}, sum(kept.values())


def test_recomputed_blocks_give_the_same_gradients_and_keep_less():
    plain, recomputed = gpt(), gpt()
    names = list(recomputed.state_dict())
    checkpoint_blocks(recomputed)
    assert list(recomputed.state_dict()) == names
    expected, much = gradients(plain)
    found, little = gradients(recomputed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert little < 0.5 * much


def peak(net: GPT) -> int:
    """Bytes of tensors at the worst moment of forward and backward."""
    net(TOKENS).square().mean().backward()  # gradients are there from now on
    with Tracker() as tracker:
        net(TOKENS).square().mean().backward()
    return tracker.peak


def test_selective_recomputation_keeps_products_and_attention_only():
    plain, full, selective = gpt(), gpt(), gpt()
    checkpoint_blocks(full)
    checkpoint_blocks(selective, selective=True)
    expected, found = gradients(plain)[0], gradients(selective)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert peak(full) < peak(selective) < peak(plain)
    with Operations() as ran:
        loss = selective(TOKENS).square().mean()
    forward = ran.counts
    with Operations() as ran:
        loss.backward()
    again = ran.counts  # of what a backward pass does not do by itself
    assert forward["moa::mix"] == again["moa::mix"] == 2
    assert forward["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2
    assert again["aten::_scaled_dot_product_flash_attention_for_cpu"] == 0


def test_selective_recomputation_keeps_the_products_of_experts():
    found = []
    for recomputed in (False, True):
        net = gpt(MoEConfig(4, 2))
        if recomputed:
            checkpoint_blocks(net, selective=True)
        loss = net(TOKENS).square().mean()
        with Operations() as ran:
            loss.backward()
        found.append((ran.counts, {name: p.grad for name, p in net.named_parameters()}))
    (plain, expected), (selective, gradients) = found
    assert selective["aten::_grouped_mm"] == plain["aten::_grouped_mm"] > 0
    assert selective["moa::mix"] == 2
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __enter__(self):
        self.counts: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [False, True])
def test_low_precision_is_for_the_blocks_matrices_and_never_for_coefficients(group, low):
    net, seen = gpt(), {}
    whole = copy.deepcopy(net)
    shard(net, init_device_mesh("cpu", (1,), mesh_dim_names=("shards",)), low_precision_parameters=low)
    mlp = net.blocks[0].mlp
    mlp.up_mix.register_forward_pre_hook(lambda module, _: seen.update(base=module.base.dtype))
    mlp.up_proj.register_forward_pre_hook(lambda module, _: seen.update(weight=module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = net(TOKENS), whole(TOKENS)
    assert seen == {"base": torch.float32, "weight": torch.bfloat16 if low else torch.float32}
    difference = (found - expected).float().norm() / expected.float().norm()
    assert difference < 0.02 if low else difference == 0  # norms are rounded too; autocast rounds matrices anyway
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_blocks_are_found_in_every_stack():
    assert len(transformer_blocks(gpt())) == 2
