"""Under FSDP2 with two processes: the gradient's norm is that of the whole, and a mix is seen with whole parameters."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moa_lightning.callbacks.mixing import capture
from moa_lightning.feedforward import FeedForward, FFNConfig
from moa_lightning.optim import total_norm
from tests.runs.group import start_group


def small_layer() -> FeedForward:
    torch.manual_seed(0)
    layer = FeedForward(6, FFNConfig(mixing="moa", form="gated", branches="both"))
    for mixing in layer.mixings().values():
        torch.nn.init.normal_(mixing.gate_weight)
    return layer


def main(folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layer, x = small_layer(), torch.load(folder / "x.pt")
    mesh = init_device_mesh("cpu", (2,))
    for mixing in layer.mixings().values():
        fully_shard(mixing, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in layer.parameters())
    seen = []
    layer.up_mix.register_forward_pre_hook(lambda module, arguments: seen.append(capture(module, arguments[-1])))
    layer(x).square().mean().backward()
    gradients = [p.grad for p in layer.parameters()]
    plain = torch.full((3,), 2.0)  # beside shards, as a parameter that a strategy left alone
    norms = {"sharded": total_norm(gradients), "mixed": total_norm([*gradients, plain])}
    torch.save(
        {**norms, "alpha": seen[0].alpha, "coefficients": seen[0].coefficients}, folder / f"{dist.get_rank()}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_processes_agree_with_one(tmp_path: Path):
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    start_group(["tests.callbacks.test_sharded", str(tmp_path)], tmp_path)

    layer = small_layer()
    layer(x).square().mean().backward()
    norm = torch.cat([p.grad.flatten().double() for p in layer.parameters()]).norm().item()
    coefficients = layer.up_mix.coefficients(x).flatten(0, 1).detach()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert type(found["sharded"]) is torch.Tensor
        assert found["sharded"].item() == pytest.approx(norm, rel=1e-5)
        assert found["mixed"].item() == pytest.approx((norm**2 + 12) ** 0.5, rel=1e-5)
        torch.testing.assert_close(found["coefficients"], coefficients)
        torch.testing.assert_close(found["alpha"], layer.up_mix.base.detach())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
