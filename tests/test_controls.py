"""Controls: frozen and shuffled gates, gates held at their mean, LA begun at a mean, width in place of gates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moa_lightning import FeedForward, FFNConfig, UserError, inject
from moa_lightning.activations import DICTIONARY
from moa_lightning.configs import load_config
from moa_lightning.controls import hold_mixes, start_mixes, token_means
from moa_lightning.experts import Experts
from moa_lightning.feedforward import matched_hidden_dim
from moa_lightning.mixing import Mixing, PairMixing
from moa_lightning.models import GPT, GPTConfig
from tests import reference
from tests.layers import every_form, every_gate, random_input, randomise

ROOT = Path(__file__).parents[1]
KINDS = pytest.mark.parametrize("kind", [Mixing, PairMixing])


def build(kind, gate: str, gates: str, dim: int = 5, **options):
    return kind(dim, DICTIONARY, (1,) if kind is Mixing else (1, 0), gate, gates=gates, **options)


def fragment(name: str) -> FFNConfig:
    return FFNConfig(**load_config(str(ROOT / f"configs/ffn/{name}.yaml")).content["model"]["init_args"]["ffn"])


# --- frozen -----------------------------------------------------------------------------------------------------------


@every_gate
@KINDS
@pytest.mark.parametrize("init", ["identity", "paper"])
def test_frozen_gates_are_drawn_at_their_scale_and_never_learn(kind, gate: str, init: str) -> None:
    mixing = build(kind, gate, "frozen", dim=64, gate_bias=True, init=init, gate_std=0.3)
    mixing.reset_parameters(torch.Generator().manual_seed(0))
    assert mixing.gate_weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert [name for name, _ in mixing.named_parameters()] == ["base"]
    assert {"base", "gate_weight", "gate_bias"} == set(mixing.state_dict())
    before = mixing.gate_weight.clone()
    mixing.coefficients(torch.randn(9, 64)).square().sum().backward()
    torch.optim.SGD(mixing.parameters(), lr=1.0).step()
    assert torch.equal(mixing.gate_weight, before)
    assert (mixing.base.grad != 0).all()


@every_gate
@KINDS
def test_frozen_gates_are_the_formula_with_their_own_u(kind, gate: str) -> None:
    frozen, trained = build(kind, gate, "frozen").double(), build(kind, gate, "trained").double()
    trained.load_state_dict(frozen.state_dict())
    x = random_input(2, 3, 5)
    assert torch.equal(frozen.coefficients(x), trained.coefficients(x))
    assert frozen.coefficients(x).flatten(2).std(dim=(0, 1)).min() > 0


@every_form
def test_frozen_gates_are_no_parameters(form: str, branches: str) -> None:
    layer = FeedForward(6, FFNConfig("moa", form, branches=branches, gates="frozen", gate_bias=True), hidden_dim=8)
    assert layer.parameter_count() == sum(p.numel() for p in layer.parameters())


# --- shuffled ---------------------------------------------------------------------------------------------------------


@every_gate
@KINDS
def test_a_token_has_the_gates_of_the_sample_before_it(kind, gate: str) -> None:
    mixing = build(kind, gate, "shuffled").double()
    randomise(mixing)
    x = random_input(4, 3, 5)
    donors = x.numpy()[[3, 0, 1, 2]]
    logits = donors @ mixing.gate_weight.detach().numpy().T
    gates = reference.gate_values(logits.reshape(12, -1), gate).reshape(4, 3, *mixing.base.shape)
    expected = mixing.base.detach().numpy() + gates - mixing.gate_zero
    np.testing.assert_allclose(mixing.coefficients(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_sample_alone_keeps_its_gates() -> None:
    shuffled, trained = build(Mixing, "sigmoid", "shuffled"), build(Mixing, "sigmoid", "trained")
    randomise(shuffled)
    trained.load_state_dict(shuffled.state_dict())
    x = torch.randn(1, 7, 5)
    assert torch.equal(shuffled.coefficients(x), trained.coefficients(x))


def test_shuffled_gates_tell_no_position_of_a_language_model_its_future() -> None:
    """Tokens from position 5 on, of any sample, change nothing before position 5, of any sample."""
    net = GPT(GPTConfig(depth=2, dim=16, num_heads=2), FFNConfig("moa", gates="shuffled"), 11, 8).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    tokens = torch.randint(0, 10, (3, 8))
    before = net(tokens)
    for sample in range(3):
        changed = tokens.clone()
        changed[sample, 5:] += 1
        after = net(changed)
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[(sample + 1) % 3, 5:], before[(sample + 1) % 3, 5:])  # its gates are lent


def test_experts_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match="experts"):
        Experts(2, 8, FFNConfig("moa", gates="shuffled"))
    experts = Experts(2, 8, FFNConfig("moa", gates="frozen"))
    assert experts.parameter_count() == sum(p.numel() for p in experts.parameters())
    with pytest.raises(UserError, match="experts"):
        token_means(experts, experts, [torch.randn(2, 3, 8)])


# --- gates held at their mean, and LA begun there ---------------------------------------------------------------------


class Twice(nn.Module):
    """Two layers one after the other, as the mixes of a net stand."""

    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward(5, config, hidden_dim=6) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@every_gate
@every_form
def test_held_gates_make_moa_the_la_of_their_mean(form: str, branches: str, gate: str) -> None:
    net = Twice(FFNConfig("moa", form, branches=branches, gate=gate, gate_bias=True)).double()
    for block in net.blocks:
        randomise(block)
    batches = [random_input(4, 3, 5), random_input(2, 3, 5, seed=1)]
    inputs = [torch.cat([x.flatten(0, 1) for x in batches])]
    inputs.append(inputs[0] + net.blocks[0](inputs[0]).detach())
    means = token_means(net, net, batches)
    for i, block in enumerate(net.blocks):
        for name, mixing in block.mixings().items():
            logits = inputs[i] @ mixing.gate_weight.detach().T + mixing.gate_bias.detach()
            gates = reference.gate_values(logits.numpy(), gate).mean(0).reshape(mixing.base.shape)
            expected = mixing.base.detach().numpy() + gates - mixing.gate_zero
            np.testing.assert_allclose(means[f"blocks.{i}.{name}"].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert set(hold_mixes(net, means)) == set(means)
    la = Twice(FFNConfig("la", form, branches=branches)).double()
    la.load_state_dict(net.state_dict())  # the same names and shapes: nothing of the gates is left
    assert torch.equal(net(batches[0]), la(batches[0]))
    for block in net.blocks:
        assert block.parameter_count() == sum(p.numel() for p in block.parameters())


def gpt(config: FFNConfig) -> GPT:
    return GPT(GPTConfig(depth=2, dim=8, num_heads=2), config, vocab_size=7, context_length=4)


def write_means(path: Path, means: dict[str, list[float]]) -> None:
    layers = {str(i): {"module": name, "mean": mean} for i, (name, mean) in enumerate(means.items())}
    path.write_text(json.dumps({"layers": layers}))


@pytest.mark.parametrize("base", ["trained", "held"])
def test_la_starts_at_the_means_of_a_run(tmp_path: Path, base: str) -> None:
    means = {f"blocks.{i}.mlp.up_mix": np.linspace(i, 1, 7).tolist() for i in range(2)}
    write_means(tmp_path / "mixing.json", means)
    net = gpt(FFNConfig("la", start_from=str(tmp_path), base=base))
    start_mixes(net)
    for i, block in enumerate(net.blocks):
        torch.testing.assert_close(block.mlp.up_mix.base.detach(), torch.tensor(means[f"blocks.{i}.mlp.up_mix"]))
        assert block.mlp.up_mix.base.requires_grad == (base == "trained")


def test_a_teacher_starts_as_its_student_did(tmp_path: Path) -> None:
    write_means(tmp_path / "mixing.json", {"teacher.blocks.0.up_mix": [2.0] * 7, "teacher.blocks.1.up_mix": [3.0] * 7})
    net = nn.ModuleDict({name: Twice(FFNConfig("la", start_from=str(tmp_path))) for name in ("student", "teacher")})
    start_mixes(net)
    for twin in net.values():
        assert [block.up_mix.base[0].item() for block in twin.blocks] == [2.0, 3.0]


def test_starts_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    net = gpt(FFNConfig("la", start_from=str(tmp_path)))
    assert start_mixes(net).missing == [tmp_path / "mixing.json"]
    write_means(tmp_path / "mixing.json", {"head.mlp.up_mix": [0.0] * 7})
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up_mix"):
        start_mixes(net)
    write_means(tmp_path / "mixing.json", {f"blocks.{i}.mlp.up_mix": [0.0] * 3 for i in range(2)})
    with pytest.raises(UserError, match=r"\(3,\)"):
        start_mixes(net)
    (tmp_path / "mixing.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        start_mixes(net)


# --- width ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128, 768])
@pytest.mark.parametrize("bias", [False, True])
def test_the_widened_baseline_has_moas_parameters_to_half_a_neuron(dim: int, bias: bool) -> None:
    names = ("gelu", "moa", "gelu_widened")
    plain, moa, widened = (FFNConfig(**{**fragment(name).as_dict(), "bias": bias}) for name in names)
    configs = {"plain": plain, "moa": moa, "wide": widened}
    counts = {name: FeedForward(dim, config).parameter_count() for name, config in configs.items()}
    neuron = 2 * dim + bias
    assert abs(counts["wide"] - counts["moa"]) <= 0.5 * neuron + 7
    assert counts["wide"] == counts["plain"] + 4 * neuron


def test_extra_width_reaches_layers_that_are_swapped_in() -> None:
    net = Twice(FFNConfig())
    inject(net, FFNConfig(hidden_extra=3))
    assert [block.up_proj.out_features for block in net.blocks] == [9, 9]
    for match in ("width", "parameters", "flops"):
        with_extra, without = (FFNConfig("moa", "gated", match=match, hidden_extra=extra) for extra in (2, 0))
        widths = [matched_hidden_dim(16, config, 64, match) for config in (with_extra, without)]
        assert widths[0] == widths[1] + 2
