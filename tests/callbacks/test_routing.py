"""What is logged of routers and of experts' mixes are the numbers of their formulas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moa_lightning import FFNConfig
from moa_lightning.callbacks import RoutingTelemetry
from moa_lightning.callbacks.mixing import capture, start_coefficients
from moa_lightning.callbacks.routing import scalars
from moa_lightning.experts import Experts, Rows
from moa_lightning.moe import MoE, MoEConfig, Routing
from tests.layers import randomise

from .toy import DIM, ToyTask, events, fit


def test_load_is_in_units_of_an_even_share() -> None:
    routing = Routing(
        load=torch.tensor([[6, 2, 0, 0], [1, 1, 1, 1]]),
        probability=torch.zeros(2, 4),
        z_loss=torch.zeros(2),
        entropy=torch.tensor([0.5, 0.75]),
        dropped=torch.tensor([0.25, 0.0]),
    )
    found = scalars(routing)
    assert [found[f"routing/block00/load/expert0{e}"] for e in range(4)] == [3.0, 1.0, 0.0, 0.0]
    assert [found[f"routing/block01/load/expert0{e}"] for e in range(4)] == [1.0] * 4
    assert (found["routing/block00/entropy"], found["routing/block01/entropy"]) == (0.5, 0.75)
    assert (found["routing/block00/dropped"], found["routing/block01/dropped"]) == (0.25, 0.0)
    assert len(found) == 12


class Routed(ToyTask):
    """Two blocks of experts, their routing kept as a GPT keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks = torch.nn.ModuleList(MoE(DIM, FFNConfig(), MoEConfig(3, 1)) for _ in range(2))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for block in self.net.blocks:
            y, routing = block(x)
            x = x + y
            found.append(routing)
        self.net.routing = Routing(*map(torch.stack, zip(*found, strict=True)))
        return x


def test_it_is_written_on_logging_steps(tmp_path: Path) -> None:
    fit(Routed(), tmp_path / "run", [RoutingTelemetry()], val=None)
    log = events(tmp_path / "run")
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("routing/")]
    assert len(tags) == 2 * (3 + 2)
    for tag in tags:
        assert [event.step for event in log.Scalars(tag)] == [1, 3, 5, 7, 9]
    loads = [log.Scalars(f"routing/block01/load/expert0{e}")[-1].value for e in range(3)]
    assert sum(loads) == pytest.approx(3.0)


class Together(Routed):
    """As a joint task: the experts are in one of its parts, which has a turn in every fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.net = self.net, torch.nn.Module()
        self.parts = {"vision": SimpleNamespace(), "language": SimpleNamespace(net=self.routed)}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batch |= {"vision": 1, "language": None if batch_idx % 4 else 1}
        self.net.blocks = self.routed.blocks
        loss = super().training_step(batch, batch_idx)
        self.routed.routing = self.net.routing
        return loss


def test_the_part_of_a_joint_task_with_experts_is_found_in_its_turns(tmp_path: Path) -> None:
    fit(Together(), tmp_path / "run", [RoutingTelemetry()], val=None, log_every_n_steps=1, max_steps=6)
    assert [event.step for event in events(tmp_path / "run").Scalars("routing/block00/entropy")] == [0, 4]


def test_a_net_without_experts_logs_nothing(tmp_path: Path) -> None:
    fit(ToyTask(), tmp_path / "run", [RoutingTelemetry()], val=None)
    assert not [tag for tag in events(tmp_path / "run").Tags()["scalars"] if tag.startswith("routing/")]


@pytest.mark.parametrize(("branches", "mix"), [("one", "gate_mix"), ("pairs", "pair_mix")])
def test_of_experts_each_token_has_its_own_coefficients(branches: str, mix: str) -> None:
    experts = Experts(3, DIM, FFNConfig("moa", "gated", branches=branches, dictionary=("identity", "gelu", "relu")))
    start = start_coefficients(getattr(experts, mix))
    assert start.sum() == 1.0
    assert start.shape == ((3,) if branches == "one" else (3, 3))
    randomise(experts)
    module, x = getattr(experts, mix), torch.randn(6, DIM)
    owner = torch.tensor([0, 0, 1, 1, 1, 2])
    packed = capture(module, x, Rows(owner, torch.tensor([2, 5, 6], dtype=torch.int32)))
    for row, e in enumerate(owner):
        gates = torch.sigmoid(module.gate_weight[e] @ x[row])
        torch.testing.assert_close(packed.gates[row], gates.detach())
        expected = module.base[e].flatten() + gates - 0.5
        torch.testing.assert_close(packed.coefficients[row], expected.detach())
    torch.testing.assert_close(packed.alpha, module.base.detach().mean(0).flatten())
    slots = capture(module, x.view(3, 2, DIM))
    assert slots.coefficients.shape == packed.coefficients.shape
